"""Products of signs in plain JAX: runs everywhere, and fast on a CPU.

                        N columns, the axis of the vector registers
                      +-----------------------------------+
        word w of b'  | b_0w   b_1w   b_2w   ...          |
                      +-----------------------------------+
     word     | a_0w  | c_0n += popcount(a_0w xor b_nw)   |  a tile of counts,
     w of a   | a_1w  | c_1n += ...                       |  in cache while all
              | ...   | ...                               |  words go by
                      +-----------------------------------+

    c_mn = 0                                  before the first word
    c_mn = c_mn + popcount(a_mw xor b_nw)     w = 0 .. W - 1
    out_mn = K - 2 c_mn

A few rows alone would not pay for turning b around: they count along the words.
XLA shares the rows of either form between the cores.
"""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import shards

# Counts of a tile of rows: 4 MiB, in the shared cache of a few cores.
TILE = 1 << 20
# Words that go by between reading a count and writing it.
_STEP = 4
# Up to so many rows, b is read as it lies.
_FEW_ROWS = 8
# On a CPU, XLA sums longer axes in two passes, and keeps all terms in memory.
_LONGEST_SUM = 32


def binary_matmul(
  size: int,
  a: jax.Array,  # [M, W] uint32, zeros beyond `size`
  b: jax.Array,  # [N, W] uint32, zeros beyond `size`
) -> jax.Array:
  """K - 2 popcount(a xor b), [M, N] int32; see `api`."""
  rows, words = a.shape
  few = rows <= _FEW_ROWS and words <= _LONGEST_SUM**2
  differing = _row_by_row(a, b) if few else _tile_by_tile(a, b)
  return size - 2 * differing.astype(jnp.int32)


def _row_by_row(a: jax.Array, b: jax.Array) -> jax.Array:
  """Bits that differ, [M, N] uint32; reads b once a row of a."""
  parts = -(-a.shape[1] // _LONGEST_SUM)
  a, b = (_padded(x, parts).reshape(len(x), -1, parts) for x in (a, b))
  return _differing(a[:, None], b, (2, 3))


def _tile_by_tile(a: jax.Array, b: jax.Array) -> jax.Array:
  """Bits that differ, [M, N] uint32, a tile of rows of a at a time."""
  m, n = a.shape[0], b.shape[0]
  tiles = -(-m // max(1, TILE // n))
  rows = -(-m // tiles)
  a = jnp.pad(_padded(a, _STEP), ((0, tiles * rows - m), (0, 0)))
  # [tiles, steps, words of a step, rows] and [steps, words of a step, columns]
  a = a.reshape(tiles, rows, -1, _STEP).transpose(0, 2, 3, 1)
  b = _padded(b, _STEP).T.reshape(-1, _STEP, n)

  def tile(a):
    def step(i, counts):
      # A sum, and not an addition a word: XLA gets it into vector registers.
      return counts + _differing(a[i, :, :, None], b[i, :, None], 0)

    counts = shards.full((rows, n), 0, jnp.uint32, a)
    return lax.fori_loop(0, len(a), step, counts)

  return lax.map(tile, a).reshape(-1, n)[:m]


def _differing(a: jax.Array, b: jax.Array, axis: int | tuple[int, ...]):
  """Bits that differ between words, summed over an axis."""
  return lax.population_count(a ^ b).sum(axis, dtype=jnp.uint32)


def _padded(words: jax.Array, multiple: int) -> jax.Array:
  """[r, W] with W a multiple; the new words are alike in both operands."""
  return jnp.pad(words, ((0, 0), (0, -words.shape[1] % multiple)))
