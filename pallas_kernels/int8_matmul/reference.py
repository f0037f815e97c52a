"""What the int8 product means; the other implementations share its rounding.

s = max_j |x_j| / 127,   q_j = round(x_j / s)          a row of x
out = (q @ w) s_x s_w                                  q @ w in integers
"""

import jax
import jax.numpy as jnp
import numpy as np

# Symmetric: -128 has no partner and is never produced.
LARGEST = 127
# Below it a scale is not a normal float32, and has no usable reciprocal.
SMALLEST = float(np.finfo(np.float32).tiny)


def scales_of(absmax: jax.Array) -> jax.Array:
  """Scales of rows whose largest magnitudes are given, float32.

  Rows of zeros, and of magnitudes below 1.4e-36, get scale 1 and so values 0.
  """
  # A product, because compilers replace the division by a constant with one,
  # and then a compiled program would round otherwise than single operations.
  scales = absmax.astype(jnp.float32) * (1 / LARGEST)
  return jnp.where(scales < SMALLEST, 1.0, scales)


def quantize(x: jax.Array, scales: jax.Array) -> jax.Array:
  """x / scales rounded half to even, int8 in -127 .. 127."""
  ratio = jnp.round(x.astype(jnp.float32) * (1 / scales))
  # Over int32: not every compiler narrows a float to int8 at once.
  ratio = jnp.clip(ratio, -LARGEST, LARGEST).astype(jnp.int32)
  return ratio.astype(jnp.int8)


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Values [..., K] int8 and scales [...] float32; see `api`."""
  absmax = jnp.abs(x).max(-1, keepdims=True, initial=0)
  scales = scales_of(absmax)
  return quantize(x, scales), scales[..., 0]


def dequantize(
  product: jax.Array,  # [M, N] int32
  x_scales: jax.Array,  # [M, 1] float32
  w_scales: jax.Array,  # [1, N] float32
  dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """product x_scales w_scales in float32 and this order, rounded to `dtype`."""
  return (product.astype(jnp.float32) * x_scales * w_scales).astype(dtype)


def int8_matmul(
  x: jax.Array,  # [M, K] float, or int8
  w: jax.Array,  # [K, N] int8
  w_scales: jax.Array,  # [N] float32
  x_scales: jax.Array | None = None,  # [M] float32, of int8 x
  *,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """(q @ w) s_x s_w, [M, N]; see `api`."""
  values, scales = quantize_rows(x) if x_scales is None else (x, x_scales)
  product = values.astype(jnp.int32) @ w.astype(jnp.int32)
  return dequantize(product, scales[:, None], w_scales[None], out_dtype)
