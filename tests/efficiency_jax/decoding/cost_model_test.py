"""The formulas against simulation and the paper's own figures."""

import numpy as np
import pytest

from efficiency_jax.decoding import cost_model

pytestmark = pytest.mark.short


def test_expected_tokens_is_the_mean_of_a_capped_geometric():
  rng = np.random.default_rng(0)
  kept = rng.random((200_000, 5)) < 0.7
  emitted = np.cumprod(kept, axis=1).sum(axis=1) + 1
  # Five sigmas of the mean.
  tolerance = 5 * emitted.std() / len(emitted) ** 0.5
  assert abs(cost_model.expected_tokens(0.7, 5) - emitted.mean()) < tolerance


@pytest.mark.parametrize(
  ('alpha', 'cost_ratio', 'length', 'gain'),
  [(0.8, 0.05, 8, 3.09), (0.6, 0.1, 3, 1.67), (0.9, 0.02, 19, 6.37)],
)
def test_best_length(alpha, cost_ratio, length, gain):
  assert cost_model.best_length(alpha, cost_ratio) == length
  assert round(cost_model.improvement(alpha, length, cost_ratio), 2) == gain


def test_table_2_of_the_paper_is_near_its_prediction():
  # T5-XXL with T5-small, translation, T = 0: gamma 7, alpha 0.75, 3.4x.
  assert abs(cost_model.improvement(0.75, 7, 0.008) - 3.4) < 0.05


def test_no_gain_when_acceptance_is_below_cost():
  assert cost_model.best_length(0.2, 0.3) == 0
  assert cost_model.improvement(0.2, 0, 0.3) == 1.0


def test_perfect_drafts():
  assert cost_model.improvement(1.0, 4, 0.0) == 5.0
  assert cost_model.operations_increase(1.0, 4, 0.0) == 1.0


def test_effective_cost_ratio_closes_the_loop():
  ratio = cost_model.effective_cost_ratio(0.03, 0.02, 5)
  assert ratio == pytest.approx(0.1)
  assert 5 * ratio + 1 == pytest.approx(0.03 / 0.02)


@pytest.mark.parametrize('alpha', [-0.1, 1.1, float('nan')])
def test_alpha_outside_its_range_is_refused(alpha):
  with pytest.raises(ValueError, match='alpha must be in'):
    cost_model.improvement(alpha, 3, 0.1)


def test_lengths_outside_their_range_are_refused():
  with pytest.raises(ValueError, match='gamma must be >= 0'):
    cost_model.improvement(0.5, -1, 0.1)
  with pytest.raises(ValueError, match='gamma must be >= 1'):
    cost_model.effective_cost_ratio(0.03, 0.02, 0)
