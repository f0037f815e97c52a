"""The int8 product in plain JAX: runs everywhere, and fast on a CPU.

There are no blocks to write: XLA has a product of int8 operands with an int32
result on every platform, tiles it itself, and never holds a wider copy of the
weights. Except for one row, see `_product`.
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.int8_matmul import reference


def int8_matmul(
  x: jax.Array,  # [M, K] float, or int8
  w: jax.Array,  # [K, N] int8
  w_scales: jax.Array,  # [N] float32
  x_scales: jax.Array | None = None,  # [M] float32, of int8 x
  *,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """(q @ w) s_x s_w, [M, N]; see `api`."""
  if x_scales is None:
    x, x_scales = reference.quantize_rows(x)
  product = _product(x, w)
  return reference.dequantize(
    product, x_scales[:, None], w_scales[None], out_dtype
  )


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
  """Exact product of int8 matrices, int32."""
  # On a CPU XLA turns a one-row product into a matrix-vector product, which
  # first converts the whole weight to int32 and takes ten times as long as two
  # rows.
  rows = jnp.concatenate([x, x]) if x.shape[0] == 1 else x
  product = lax.dot_general(
    rows, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
  )
  return product[: x.shape[0]]
