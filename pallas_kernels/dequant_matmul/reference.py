"""What a product with quantized weights means: dequantize, and multiply."""

import jax
import jax.numpy as jnp

from pallas_kernels.dequant_matmul import formats


def dequantize(
  values: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  scales: jax.Array,  # [K / G, N] float32 or float16
  codebook: jax.Array | None = None,  # [16] float32
) -> jax.Array:
  """The whole weight, [K, N] float32; for tests and for changing formats."""
  if values.dtype == jnp.uint8:
    values = formats.unpack_int4(values, signed=codebook is None)
  if codebook is not None:
    values = jnp.take(codebook, values, axis=0)
  # Not -1, which stands for no number where there are no columns.
  groups, shape = len(scales), values.shape
  values = values.reshape(groups, shape[0] // groups, shape[1])
  return (values.astype(jnp.float32) * scales[:, None]).reshape(shape)


def dequant_matmul(
  x: jax.Array,  # [M, K], or [M, N] if transposed
  values: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  scales: jax.Array,  # [K / G, N] float32 or float16
  codebook: jax.Array | None = None,  # [16] float32
  *,
  transposed: bool,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """x @ w [M, N], or x @ w' [M, K]; w in the dtype of x, sums in float32."""
  w = dequantize(values, scales, codebook).astype(x.dtype)
  w = w.T if transposed else w
  return jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(out_dtype)
