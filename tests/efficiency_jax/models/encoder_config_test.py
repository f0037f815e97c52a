"""Configs refuse what no encoder can be, and name the field."""

import pytest

from tests.efficiency_jax.io import tiny_encoders

pytestmark = pytest.mark.short


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'vocab_size': 0}, 'vocab_size must be a whole number >= 1, got 0'),
    ({'width': 16.0}, 'width must be a whole number'),
    ({'num_heads': 3}, 'num_heads must divide width = 16, got 3'),
    ({'max_positions': 0}, 'max_positions'),
    ({'first_position': -1}, 'first_position must be a whole number >= 0'),
    ({'token_types': -1}, 'token_types'),
    ({'norm_epsilon': 0.0}, 'norm_epsilon must be finite and > 0'),
    ({'norm_epsilon': float('nan')}, 'norm_epsilon'),
  ],
)
def test_impossible_configs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    tiny_encoders.config(**fields)


def test_configs_are_values():
  first, second = (tiny_encoders.config('mpnet') for _ in range(2))
  assert first == second
  assert hash(first) == hash(second)
  assert first.head_dim == 4
