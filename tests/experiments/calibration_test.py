"""Trees grown on one half of the texts and judged on the other."""

import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import token_tree
from experiments import calibration

pytestmark = pytest.mark.short


def test_places_go_by_rows_into_two_halves():
  arrays = {
    'tokens': np.arange(15).reshape(5, 3),
    'hidden': np.zeros((5, 3, 2), np.float16),
    'loss_mask': np.ones((5, 3), np.float32),
  }

  def ranks(batch):
    assert batch['hidden'].dtype == jnp.float32
    found = jnp.stack([batch['tokens'], -batch['tokens']], axis=-1)
    return found, batch['tokens'] % 3 != 2

  even, odd = calibration.places(ranks, arrays, 2)
  assert even[:, 0].tolist() == [0, 1, 6, 7, 12, 13]
  assert odd.tolist() == [[3, -3], [4, -4], [9, -9], [10, -10]]


def test_trees_are_judged_on_texts_that_they_were_not_grown_on():
  # On its own half the second guess is right; on the other half the first.
  own, other = np.full((10, 2), 1), np.full((10, 2), 0)
  own[:3] = 0
  shapes, rows = calibration.trees((own, other), (3, 4), most=3)
  assert [tree.choices for tree in shapes] == [
    [(0,), (1,)],
    [(0,), (1,), (1, 0)],
  ] or all(len(t) == n for t, n in zip(shapes, (3, 4), strict=True))
  chain = next(row for row in rows if row['method'] == 'chain')
  assert chain['expected'] == pytest.approx(3.0)
  assert chain['fitted'] == pytest.approx(1.6)
  joint = next(r for r in rows if r['method'] == 'joint')
  assert joint['expected'] == pytest.approx(
    token_tree.expected_tokens(shapes[0], token_tree.joint(other))
  )


def test_sizes_beyond_what_can_grow_are_one_tree():
  found = np.zeros((4, 1), int)
  shapes, _ = calibration.trees((found, found), (2, 4, 8), most=2)
  assert sorted({len(tree) for tree in shapes}) == [len(t) for t in shapes]


def test_accuracies_count_every_position():
  found = np.array([[0, 1], [1, -1], [0, 0], [2, 1]])
  np.testing.assert_allclose(
    calibration.accuracies(found, 3),
    [[0.5, 0.25, 0.25], [0.25, 0.5, 0.0]],
  )
