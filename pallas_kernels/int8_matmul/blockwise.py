"""The int8 product in plain JAX: runs everywhere, and fast on a CPU.

There are no blocks to write but the groups that share scales: XLA has a product
of int8 operands with an int32 result on every platform, tiles it itself, and
never holds a wider copy of the weights. Except for one row, see `_product`.
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.dequant_matmul import formats
from pallas_kernels.int8_matmul import reference


def int8_matmul(
  x: jax.Array,  # [M, K] float, or int8
  w: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  w_scales: jax.Array,  # [N] or [K / G, N]
  x_scales: jax.Array | None = None,  # [M] float32, of int8 x
  w_offsets: jax.Array | None = None,  # like w_scales
  *,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """(q @ w) s_x, [M, N]; see `api`."""
  if x_scales is None:
    x, x_scales = reference.quantize_rows(x)
  scales = jnp.atleast_2d(w_scales)
  offsets = None if w_offsets is None else jnp.atleast_2d(w_offsets)
  groups = len(scales)

  def part(array, g, axis=0):
    size = array.shape[axis] // groups
    return lax.dynamic_slice_in_dim(array, g * size, size, axis)

  def term(g):
    values = part(x, g, 1)
    product = _product(values, part(w, g)).astype(jnp.float32) * part(scales, g)
    if offsets is None:
      return product
    sums = values.astype(jnp.int32).sum(-1, keepdims=True)
    return product + sums.astype(jnp.float32) * part(offsets, g)

  # The first comes before: the loop then starts from numbers that are as
  # replicated or sharded as its own, and one group is no loop.
  total = term(0)
  if groups > 1:
    total = lax.fori_loop(1, groups, lambda g, out: out + term(g), total)
  return (total * x_scales[:, None]).astype(out_dtype)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
  """Exact product of int8 x and int8 or packed w, int32."""
  if w.dtype == jnp.uint8:
    halves = formats.halves(w, signed=True)
    pairs = zip(formats.columns_of_halves(x), halves, strict=True)
    return sum(_product(own, half.astype(jnp.int8)) for own, half in pairs)
  # On a CPU XLA turns a one-row product into a matrix-vector product, which
  # first converts the whole weight to int32 and takes ten times as long as two
  # rows.
  rows = jnp.concatenate([x, x]) if x.shape[0] == 1 else x
  product = lax.dot_general(
    rows, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
  )
  return product[: x.shape[0]]
