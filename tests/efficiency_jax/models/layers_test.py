"""Models made of parts of others."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.models import layers
from efficiency_jax.models import transformer
from tests import fixtures

_TOKENS = jnp.asarray([[1, 2, 3, 1, 2, 5], [7, 4, 9, 9, 0, 10]])


def _logits(config, params):
  return jax.jit(transformer.apply_fn(config))(params, _TOKENS)[0].logits


def test_selected_layers_keep_their_windows_and_arrays():
  config = fixtures.every_option()
  params = fixtures.params(config)
  smaller, kept = layers.select(config, params, (2, 0))
  assert smaller == layers.shallow(config, (2, 0))
  assert smaller.num_layers == 2
  assert smaller.windows == (5, 3)
  assert kept.keys() == params.keys() - {'layers_2'}
  assert kept['layers_0'] is params['layers_2']
  assert kept['layers_1'] is params['layers_0']
  assert kept['head'] is params['head']


@pytest.mark.parametrize('chosen', [(), (0, 3), (-1,)])
def test_layers_that_are_not_there(chosen):
  with pytest.raises(ValueError, match=r'layers must name blocks in 0\.\.2'):
    layers.shallow(fixtures.every_option(), chosen)


def test_units_that_add_nothing_can_go():
  """A zero in any of its three vectors silences a unit."""
  config = fixtures.every_option(mlp_bias=False)
  params = fixtures.params(config)
  dead = {0: 'gate', 5: 'up', 23: 'down', 11: 'gate'}
  for layer in range(config.num_layers):
    block = params[f'layers_{layer}']
    gate_up = block['ffn']['gate_up']['kernel']
    down = block['ffn']['down']['kernel']
    for unit, part in dead.items():
      # Another unit in each layer.
      unit = (unit + layer) % config.ffn_width
      if part == 'down':
        down = down.at[unit].set(0)
      else:
        column = unit + config.ffn_width * (part == 'up')
        gate_up = gate_up.at[:, column].set(0)
    ffn = {'gate_up': {'kernel': gate_up}, 'down': {'kernel': down}}
    params = {**params, f'layers_{layer}': {**block, 'ffn': ffn}}
  smaller, kept = layers.narrow(config, params, config.ffn_width - len(dead))
  assert smaller == dataclasses.replace(config, ffn_width=20)
  np.testing.assert_allclose(
    _logits(smaller, kept), _logits(config, params), atol=1e-5
  )
  # One more is missed.
  fewer = layers.narrow(config, params, 19)
  assert jnp.abs(_logits(*fewer) - _logits(config, params)).max() > 1e-3


def test_the_strongest_units_stay_in_their_order():
  config = fixtures.every_option()
  params = fixtures.params(config)
  ffn = params['layers_1']['ffn']
  gate, up = np.split(np.asarray(ffn['gate_up']['kernel']), 2, axis=1)
  down = np.asarray(ffn['down']['kernel'])
  norm = np.linalg.norm
  strength = [
    norm(gate[:, i]) * norm(up[:, i]) * norm(down[i]) for i in range(24)
  ]
  best = sorted(np.argsort(strength)[-7:])
  _, kept = layers.narrow(config, params, 7)
  got = kept['layers_1']['ffn']
  expected = np.concatenate([gate[:, best], up[:, best]], axis=1)
  np.testing.assert_array_equal(got['gate_up']['kernel'], expected)
  np.testing.assert_array_equal(got['down']['kernel'], down[best])
  bias = np.asarray(ffn['gate_up']['bias'])
  np.testing.assert_array_equal(
    got['gate_up']['bias'], np.concatenate([bias[:24][best], bias[24:][best]])
  )
  assert got['down']['bias'] is ffn['down']['bias']
  assert kept['layers_1']['attention'] is params['layers_1']['attention']


def test_all_units_are_the_same_model():
  config = fixtures.every_option()
  params = fixtures.params(config)
  same, kept = layers.narrow(config, params, config.ffn_width)
  assert same == config
  chex.assert_trees_all_equal(kept, params)


@pytest.mark.parametrize('width', [0, 25])
def test_impossible_widths_are_refused(width):
  config = fixtures.config()
  with pytest.raises(ValueError, match=r'ffn_width must be in 1\.\.24'):
    layers.narrow(config, fixtures.params(config), width)
