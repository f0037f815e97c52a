"""What the int8 product means; the other implementations share its rounding.

s = max_j |x_j| / 127,   q_j = round(x_j / s)          a row of x
out = s sum_g (s_g sum_{k in g} q_k w_k + o_g sum_{k in g} q_k)

The sums of a group are of integers. All else is float32: every product is
rounded before it is added, and terms are added in the order of the formula.
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import shards
from pallas_kernels.dequant_matmul import formats

# Symmetric: -128 has no partner and is never produced.
LARGEST = 127


def scales_of(absmax: jax.Array) -> jax.Array:
  """Scales of rows whose largest magnitudes are given, float32.

  Rows of zeros, and of magnitudes below 1.4e-36, get scale 1 and so values 0.
  """
  # A product, because compilers replace the division by a constant with one,
  # and then a compiled program would round otherwise than single operations.
  return formats.usable(absmax.astype(jnp.float32) * (1 / LARGEST))


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
  """product w_scales x_scales in float32 and this order, rounded to `dtype`."""
  return (product.astype(jnp.float32) * w_scales * x_scales).astype(dtype)


def only_scales_of_columns(
  w: jax.Array, w_scales: jax.Array, w_offsets: jax.Array | None
) -> None:
  """Refuses weights that are not int8 with one scale a column."""
  if w.dtype != jnp.int8 or w_scales.ndim != 1 or w_offsets is not None:
    raise NotImplementedError(
      f'weights are {w.dtype} with scales {w_scales.shape} and'
      f' {"no " if w_offsets is None else ""}offsets, not int8 with a scale a'
      ' column'
    )


def rows_of(
  w: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  w_scales: jax.Array,  # [N] or [K / G, N]
  w_offsets: jax.Array | None,  # like w_scales
  index: jax.Array,  # [R] integers
) -> jax.Array:
  """Some rows of the weight, [R, N] float32."""
  size, values = len(w), jnp.take(w, index, axis=0)
  if w.dtype == jnp.uint8:
    size, place = 2 * size, index % formats.BLOCK
    bytes_at = index // formats.BLOCK * formats.HALF + place % formats.HALF
    low, high = formats.halves(jnp.take(w, bytes_at, axis=0), signed=True)
    values = jnp.where(place[:, None] < formats.HALF, low, high)
  scales = jnp.atleast_2d(w_scales)
  group = index // (size // len(scales))
  part = lambda of: jnp.take(jnp.atleast_2d(of), group, axis=0)
  rows = values.astype(jnp.float32) * part(scales).astype(jnp.float32)
  return rows if w_offsets is None else rows + part(w_offsets)


def int8_matmul(
  x: jax.Array,  # [M, K] float, or int8
  w: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  w_scales: jax.Array,  # [N] or [K / G, N]
  x_scales: jax.Array | None = None,  # [M] float32, of int8 x
  w_offsets: jax.Array | None = None,  # like w_scales
  *,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """The formula above, [M, N]; see `api`."""
  values, scales = quantize_rows(x) if x_scales is None else (x, x_scales)
  if w.dtype == jnp.uint8:
    w = formats.unpack_int4(w, signed=True)
  groups = len(jnp.atleast_2d(w_scales))
  (rows, inner), columns = x.shape, w.shape[1]
  values = values.astype(jnp.int32).reshape(rows, groups, inner // groups)
  w = w.astype(jnp.int32).reshape(groups, inner // groups, columns)
  of_groups = lambda a: jnp.atleast_2d(a).astype(jnp.float32)[:, None]
  product = jnp.einsum('mgk,gkn->gmn', values, w).astype(jnp.float32)
  terms = product * of_groups(w_scales)
  if w_offsets is not None:
    sums = values.sum(-1).T[..., None].astype(jnp.float32)
    terms = jnp.stack([terms, sums * of_groups(w_offsets)], 1)
    terms = terms.reshape(2 * groups, rows, columns)
  # A loop, so that no compiler adds a product before it has been rounded; a
  # loop of one step is none, but to zero it may be added.
  zeros = shards.full((rows, columns), 0.0, jnp.float32, terms)
  total, _ = lax.scan(lambda a, b: (a + b, None), zeros, terms)
  return (total * scales[:, None]).astype(out_dtype)
