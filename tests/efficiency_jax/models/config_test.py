"""Configs refuse what no model can be, and name the field."""

import pytest

from efficiency_jax.models import config as config_lib
from tests import fixtures


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'vocab_size': 0}, 'vocab_size must be a whole number >= 1, got 0'),
    ({'width': 16.0}, 'width must be a whole number'),
    ({'num_layers': -1}, 'num_layers'),
    ({'num_heads': 3}, 'num_kv_heads must divide num_heads = 3, got 2'),
    ({'head_dim': 5}, 'head_dim must be even'),
    ({'activation': 'relu'}, "activation 'relu' is not supported"),
    ({'windows': (4,)}, 'windows must name all 2 layers'),
    ({'norm_epsilon': 0.0}, 'norm_epsilon must be finite and > 0'),
    ({'rope_theta': float('nan')}, 'rope_theta must be finite and > 0'),
  ],
)
def test_impossible_configs_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    fixtures.config(**fields)


def test_impossible_rope_scalings_are_refused():
  with pytest.raises(ValueError, match="'yarn' is not supported"):
    config_lib.RopeScaling(kind='yarn', factor=2.0)
  with pytest.raises(ValueError, match='factor must be > 0'):
    config_lib.RopeScaling(kind='linear', factor=0.0)


def test_windows_belong_to_layers():
  config = fixtures.every_option()
  assert [config.window(layer) for layer in range(3)] == [3, None, 5]
  assert fixtures.config().window(1) is None
  assert config.truncated(2).windows == (3, None)
  assert config.truncated(2).num_layers == 2
  assert fixtures.config().truncated(1).windows == ()
  for layers in (0, 4):
    with pytest.raises(ValueError, match='num_layers must be in 1..3'):
      config.truncated(layers)


def test_configs_are_values():
  assert fixtures.every_option() == fixtures.every_option()
  assert hash(fixtures.every_option()) == hash(fixtures.every_option())
