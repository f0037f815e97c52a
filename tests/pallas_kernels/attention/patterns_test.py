"""Patterns are what their papers draw."""

import numpy as np
import pytest

from pallas_kernels.attention import patterns

TILE = (16, 32)


def _drawn(tiles, columns):
  rows = tiles.as_array(columns)
  return [''.join('#' if kept else '.' for kept in row) for row in rows]


def test_local_and_global():
  tiles = patterns.local_global(TILE, 90, 170, near=1, everywhere=1)
  assert _drawn(tiles, 6) == [
    '######',
    '###...',
    '####..',
    '#.###.',
    '#..###',
    '#...##',
  ]
  assert tiles.density(6) == pytest.approx(24 / 36)


def test_strided():
  tiles = patterns.strided((8, 8), 48, 48, stride=3)
  assert _drawn(tiles, 6) == [
    '#..#..',
    '##.#..',
    '####..',
    '####..',
    '#.###.',
    '#..###',
  ]


def test_butterfly_reaches_everything_in_log_steps():
  tiles = patterns.butterfly((8, 8), 64, 64)
  # 5 = 101: itself, 100, 111 and 001.
  assert _drawn(tiles, 8)[5] == '.#..##.#'
  matrix = tiles.as_array(8).astype(int)
  assert (matrix.sum(1) == 4).all()  # log2(8) + 1
  assert (np.linalg.matrix_power(matrix, 3) > 0).all()
  assert (np.linalg.matrix_power(matrix, 2) == 0).any()
