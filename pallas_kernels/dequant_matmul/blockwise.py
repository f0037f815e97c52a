"""The product in plain JAX: runs everywhere, and fast on a CPU.

                  block of columns        the loop goes over blocks
                +------+------+------+
     packed w   | n 0  | n 1  | ...  |    dequantized a block at a time, which
                +------+------+------+    stays in cache until it is multiplied

     out[:, n] = sum_h x_h @ w_h[:, n]            x @ w
     out_h     = sum_n x[:, n] @ w_h[:, n]'       x @ w'

h is a half of the bytes. The two halves of a packed block are multiplied one by
one, each with its own rows of x, so that they need not be woven together.
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.dequant_matmul import formats

# Numbers of a block: 4 MiB of float32. Smaller blocks pay more for the loop,
# larger ones leave the cache.
BLOCK = 1 << 20
_UNIT = 128  # columns of a block are a multiple


def dequant_matmul(
  x: jax.Array,  # [M, K], or [M, N] if transposed
  values: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  scales: jax.Array,  # [K / G, N] float32 or float16
  codebook: jax.Array | None = None,  # [16] float32
  *,
  transposed: bool,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """x @ w [M, N], or x @ w' [M, K]; see `api`."""
  n, packed = values.shape[1], values.dtype == jnp.uint8
  if len(x) == 1:
    # On a CPU XLA turns a one-row product into a matrix-vector product that
    # first widens a narrow matrix. So the block is never made narrow.
    x = x.astype(jnp.float32)
  width = max(1, BLOCK // (values.shape[0] * (2 if packed else 1)) // _UNIT)
  width = min(n, width * _UNIT)
  count = -(-n // width)

  def product(start, width):
    """[M, width], or the share of these columns in every [M, K or K / 2]."""
    cut = lambda array: lax.dynamic_slice_in_dim(array, start, width, 1)
    parts = _dequantize(cut(values), cut(scales), codebook, x.dtype)
    if transposed:
      return [_dot(cut(x), part, 1) for part in parts]
    own = formats.columns_of_halves(x) if packed else [x]
    pairs = zip(own, parts, strict=True)
    return sum(_dot(columns, part, 0) for columns, part in pairs)

  # The last block may be narrower. It comes first: the loop then starts from
  # numbers that are as replicated or sharded as its own.
  start = (count - 1) * width
  last = product(start, n - start)
  if transposed:
    step = lambda i, out: jax.tree.map(jnp.add, out, product(i * width, width))
    out = _loop(count - 1, step, last)
    out = _whole(*out) if packed else out[0]
  else:
    # All in float32: XLA on a CPU widens the whole of a narrow array to put a
    # block into it.
    step = lambda i, out: lax.dynamic_update_slice_in_dim(
      out, product(i * width, width), i * width, 1
    )
    out = _loop(count - 1, step, jnp.pad(last, ((0, 0), (start, 0))))
  return out.astype(out_dtype)


def _loop(count, step, out):
  # Not even an empty loop, around which XLA fuses less.
  return lax.fori_loop(0, count, step, out) if count else out


def _dequantize(values, scales, codebook, dtype) -> list[jax.Array]:
  """A block of w: [K, n], or its two halves [K / 2, n]."""
  parts = [values]
  if values.dtype == jnp.uint8:
    parts = formats.halves(values, signed=codebook is None)
  if codebook is not None:
    parts = [formats.look_up(part, codebook) for part in parts]
  groups, n = scales.shape

  def scaled(part):
    part = part.astype(jnp.float32).reshape(groups, -1, n) * scales[:, None]
    return part.reshape(-1, n).astype(dtype)

  return [scaled(part) for part in parts]


def _dot(x, w, axis) -> jax.Array:
  return lax.dot_general(
    x, w, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
  )


def _whole(low: jax.Array, high: jax.Array) -> jax.Array:
  """The inverse of `formats.columns_of_halves`: twice [M, K / 2] to [M, K]."""
  low, high = (x.reshape(len(x), -1, formats.HALF) for x in (low, high))
  return jnp.stack([low, high], axis=2).reshape(len(low), -1)
