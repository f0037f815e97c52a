"""Which tiles block-sparse attention keeps: fixed patterns of few parameters.

All take the tile size and the sizes of the sequences, and give a
`masks.Tiles`. Tiles on the diagonal are always kept, so every query of a square
attention sees at least itself.
"""

import numpy as np

from pallas_kernels.masks import Tiles


def local_global(
  tile: tuple[int, int],
  q_size: int,
  kv_size: int,
  *,
  near: int,
  everywhere: int,
) -> Tiles:
  """Tiles up to `near` from the diagonal, and the first `everywhere` columns
  and rows: every query sees them, and they see every key (arXiv 2004.05150)."""
  row, column = _grid(tile, q_size, kv_size)
  kept = abs(row - column) <= near
  return Tiles.of(tile, kept | (row < everywhere) | (column < everywhere))


def strided(
  tile: tuple[int, int], q_size: int, kv_size: int, *, stride: int
) -> Tiles:
  """The `stride` tiles before the diagonal and every `stride`-th column of
  tiles (Sparse Transformers, arXiv 1904.10509)."""
  row, column = _grid(tile, q_size, kv_size)
  back = row - column
  return Tiles.of(
    tile, ((back >= 0) & (back < stride)) | (column % stride == 0) | (back == 0)
  )


def butterfly(tile: tuple[int, int], q_size: int, kv_size: int) -> Tiles:
  """Tiles (i, j) whose numbers differ in at most one bit: the flat butterfly of
  arXiv 2112.00029, the pattern of block-sparse FlashAttention. Any tile reaches
  any other in log2(tiles) layers, with log2(tiles) + 1 tiles a row."""
  row, column = _grid(tile, q_size, kv_size)
  differ = row ^ column
  return Tiles.of(tile, (differ & (differ - 1)) == 0)


def _grid(tile, q_size: int, kv_size: int) -> tuple[np.ndarray, np.ndarray]:
  rows, columns = -(-q_size // tile[0]), -(-kv_size // tile[1])
  return np.ogrid[:rows, :columns]
