"""Errors of means are those of statistics, and intervals cover."""

import numpy as np
import pytest

from efficiency_jax.evaluation import estimates
from efficiency_jax.evaluation.estimates import Estimate


def test_units_of_one_size_give_the_error_of_a_mean():
  values = np.random.default_rng(0).normal(2.0, 3.0, 50)
  found = Estimate(values, np.ones(50))
  np.testing.assert_allclose(found.value, values.mean())
  expected = values.std(ddof=1) / np.sqrt(50)
  np.testing.assert_allclose(found.standard_error, expected)
  # Student's t of 49 degrees of freedom.
  np.testing.assert_allclose(
    found.high - found.value, 2.009575 * expected, 1e-6
  )
  np.testing.assert_allclose(found.value - found.low, 2.009575 * expected, 1e-6)
  # Thrice as many tokens in every unit: the same a token.
  thrice = Estimate(3 * values, np.full(50, 3))
  np.testing.assert_allclose(thrice.value, found.value)
  np.testing.assert_allclose(thrice.standard_error, found.standard_error)


def test_right_and_wrong_give_the_error_of_a_share():
  right = np.array([True] * 30 + [False] * 70)
  found = Estimate(right, np.ones(100))
  assert found.value == 0.3
  np.testing.assert_allclose(found.standard_error, np.sqrt(0.3 * 0.7 / 99))


def _text(rng, units):
  """Losses that windows of different sizes share more or less of."""
  counts = rng.integers(20, 200, units)
  level = rng.normal(3.0, 0.5, units)
  return Estimate(counts * level, counts)


def test_intervals_of_text_cover_the_truth():
  rng = np.random.default_rng(0)
  repeats = 3000
  inside = 0
  for _ in range(repeats):
    found = _text(rng, 12)
    inside += found.low <= 3.0 <= found.high
  # One sigma is sqrt(0.95 * 0.05 / 3000) = 0.004. Sizes that differ threefold
  # cost a ratio of few units one more percent.
  assert 0.95 - 0.01 - 4 * 0.004 <= inside / repeats <= 0.95 + 4 * 0.004


def test_the_error_is_that_of_a_bootstrap():
  rng = np.random.default_rng(1)
  found = _text(rng, 200)
  drawn = rng.integers(0, 200, (4000, 200))
  again = found.sums[drawn].sum(1) / found.counts[drawn].sum(1)
  # The spread of 4000 numbers is known to 1 / sqrt(8000) = 1.1 %.
  np.testing.assert_allclose(found.standard_error, again.std(), rtol=0.045)


def test_pairs_see_what_two_intervals_cannot():
  rng = np.random.default_rng(2)
  a = _text(rng, 100)
  noise = rng.normal(0.01, 0.02, 100)
  b = Estimate(a.sums + noise * a.counts, a.counts)
  found = estimates.compare(b, a)
  np.testing.assert_allclose(found.value, b.value - a.value)
  np.testing.assert_allclose(found.sums, noise * a.counts)
  apart = np.hypot(a.standard_error, b.standard_error)
  assert found.standard_error < apart / 10
  assert 0 < found.low < 0.01 < found.high


def test_a_difference_from_itself_is_nothing():
  a = _text(np.random.default_rng(3), 10)
  found = estimates.compare(a, a)
  assert (found.value, found.low, found.high) == (0, 0, 0)


def test_one_unit_says_nothing_of_its_error():
  found = Estimate(np.array([6.0]), np.array([2]))
  assert found.value == 3
  assert (found.low, found.high) == (-np.inf, np.inf)
  assert found.standard_error == np.inf


def test_other_units_are_not_compared():
  a = Estimate(np.ones(3), np.array([1, 2, 3]))
  for counts in ([1, 2, 4], [3, 3]):
    b = Estimate(np.ones(len(counts)), np.array(counts))
    with pytest.raises(ValueError, match='on the same units'):
      estimates.compare(a, b)


@pytest.mark.parametrize(
  ('sums', 'counts', 'message'),
  [
    ([1.0], [1, 2], 'one length'),
    ([[1.0]], [[1]], 'one length'),
    ([0.0, 0.0], [0, 0], 'nothing was counted'),
    ([], [], 'nothing was counted'),
  ],
)
def test_what_cannot_be_averaged_is_refused(sums, counts, message):
  with pytest.raises(ValueError, match=message):
    Estimate(np.array(sums), np.array(counts))
