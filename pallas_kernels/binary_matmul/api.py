"""Products of matrices of signs, stored 32 signs a word.

A binarized network multiplies +1 and -1 alone (arXiv 1602.02830), and two signs
multiply to -1 where their bits differ. So a sum of K products is a count:

  sum_k sign(a_k) sign(b_k) = K - 2 popcount(bits(a) xor bits(b))

It is exact, whichever implementation computes it.
"""

from collections.abc import Callable
import functools
import operator

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.binary_matmul import blockwise
from pallas_kernels.binary_matmul import llvm_cpu
from pallas_kernels.binary_matmul import mosaic_gpu
from pallas_kernels.binary_matmul import mosaic_tpu
from pallas_kernels.binary_matmul import reference

WORD = 32  # signs of a word


def on_clean_words(function: Callable[..., jax.Array]):
  """An implementation that is given zeros for the bits beyond `size`."""

  @functools.wraps(function)
  def run(size, a, b):
    return function(size, _without_tail(a, size), _without_tail(b, size))

  return run


IMPLEMENTATIONS = {
  'reference': on_clean_words(reference.binary_matmul),
  'blockwise': on_clean_words(blockwise.binary_matmul),
  'mosaic_tpu': on_clean_words(mosaic_tpu.binary_matmul),
  'mosaic_gpu': on_clean_words(mosaic_gpu.binary_matmul),
  'llvm_cpu': llvm_cpu.binary_matmul,
}


def pack_signs(x: jax.Array, axis: int = -1) -> jax.Array:
  """Signs of `x` as bits: bit b of word w is 1 where `x[32 w + b] >= 0`.

  So zero is +1, as in arXiv 1602.02830, and so is negative zero; NaN is -1.

  Args:
    x: Real numbers, [..., K, ...].
    axis: The axis of the K numbers.

  Returns:
    [..., ceil(K / 32), ...] uint32. Bits beyond K are zero.
  """
  bits = jnp.moveaxis(jnp.asarray(x) >= 0, axis, -1)
  *rest, size = bits.shape
  words = words_of(size)
  bits = jnp.pad(bits, [(0, 0)] * len(rest) + [(0, words * WORD - size)])
  bits = bits.reshape(*rest, words, WORD).astype(jnp.uint32)
  # Every bit stands at its own place, so that their sum is their union.
  packed = jnp.sum(bits << _places(), axis=-1, dtype=jnp.uint32)
  return jnp.moveaxis(packed, -1, axis)


def unpack_signs(words: jax.Array, size: int, axis: int = -1) -> jax.Array:
  """The signs that `pack_signs` packed: +1 and -1.

  Args:
    words: [..., ceil(size / 32), ...] uint32.
    size: K, how many signs there are.
    axis: The axis of the words.

  Returns:
    [..., K, ...] int8.

  Raises:
    ValueError: `words` holds another number of words, or not words.
  """
  words = jnp.asarray(words)
  size = _checked_size(size)
  _check_words('words', words, axis, size)
  words = jnp.moveaxis(words, axis, -1)
  return jnp.moveaxis(reference.signs(words, size, jnp.int8), -1, axis)


def binary_matmul(
  a: jax.Array,  # [..., W] uint32
  b: jax.Array,  # [N, W] uint32
  size: int,
  *,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """sum_k sign(a_k) sign(b_k), the product of `a` with `b` transposed.

  Both are packed along the inner axis by `pack_signs`, W = ceil(K / 32). The
  32 W - K bits beyond the inner size count for nothing, whatever they hold.

  Args:
    a: Signs of M rows, or of any number of leading axes.
    b: Signs of N rows.
    size: K, the number of signs of a row; static.
    implementation: None, `blockwise`, `mosaic_tpu`, `mosaic_gpu`, `llvm_cpu`,
      `reference`, or several of them in the order to try; see `dispatch`.

  Returns:
    [..., N] int32, exact for K below 2^31.

  Raises:
    ValueError: Words of another type or number, or an unknown implementation.
    NotImplementedError: No implementation that was named takes the arguments.
  """
  a, b = jnp.asarray(a), jnp.asarray(b)
  size = _checked_size(size)
  if a.ndim < 1 or b.ndim != 2:
    raise ValueError(
      f'a has shape {a.shape} and b {b.shape}: right are [..., W] and [N, W].'
    )
  _check_words('a', a, -1, size)
  _check_words('b', b, -1, size)
  shape = (*a.shape[:-1], b.shape[0])
  if 0 in shape:
    return jnp.zeros(shape, jnp.int32)
  out = dispatch.call(
    'binary_matmul',
    dispatch.bind(IMPLEMENTATIONS, size),
    implementation,
    a.reshape(-1, a.shape[-1]),
    b,
  )
  return out.reshape(shape)


def words_of(size: int) -> int:
  """How many words hold `size` signs."""
  return -(-size // WORD)


def _places() -> jax.Array:
  return jnp.arange(WORD, dtype=jnp.uint32)


def _without_tail(words: jax.Array, size: int) -> jax.Array:
  """`words` [rows, W] with zeros for the bits beyond `size`."""
  used = size % WORD
  if not used:
    return words
  last = jnp.arange(words.shape[-1]) == words.shape[-1] - 1
  return words & jnp.where(last, jnp.uint32(2**used - 1), jnp.uint32(2**32 - 1))


def _checked_size(size: int) -> int:
  size = operator.index(size)
  if size < 1:
    raise ValueError(f'size is {size}; a row holds at least one sign.')
  return size


def _check_words(name: str, words: jax.Array, axis: int, size: int) -> None:
  if words.dtype != jnp.uint32:
    raise ValueError(f'{name} is {words.dtype}; pack_signs gives uint32.')
  if words.shape[axis] != words_of(size):
    raise ValueError(
      f'{name} has {words.shape[axis]} words along axis {axis}, and'
      f' size={size} signs are {words_of(size)} words.'
    )
