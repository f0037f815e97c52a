"""Outlier features: planted ones are found; both shares of the paper count."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.models import transformer
from efficiency_jax.quantization import outlier_features
from efficiency_jax.quantization.outlier_features import Features
from efficiency_jax.quantization.outlier_features import Reached
from tests import fixtures


def test_rows_that_count_are_compared_with_the_threshold():
  x = jnp.array([[6.0, -7.0, 5.9], [100.0, 100.0, 100.0], [-6.5, 0.0, 1.0]])
  found = outlier_features.reached(x, 6.0, jnp.array([True, False, True]))
  assert int(found.rows) == 2
  np.testing.assert_array_equal(found.counts, [2, 1, 0])
  np.testing.assert_allclose(found.largest, [6.5, 7.0, 5.9], rtol=1e-6)


def test_a_feature_needs_a_quarter_of_layers_and_six_percent_of_tokens():
  share = np.zeros((4, 5))
  share[0, 0] = 0.24  # one layer of four, 6 % of all tokens
  share[:, 1] = 0.06
  share[0, 2] = 0.23  # too few tokens
  share[:, 3] = 0.05  # likewise
  found = Features(share=share, largest=share.astype(np.float32))
  np.testing.assert_array_equal(found.outliers(), [0, 1])
  np.testing.assert_array_equal(found.outliers(0.5), [1])
  np.testing.assert_array_equal(found.outliers(0.25, 0.0), [0, 1, 2, 3])
  assert found.columns == (4 + 2 + 2 + 2) / 4


def test_layers_come_in_their_order():
  one = lambda size: Reached(
    np.int32(1), np.zeros(2, np.int32), np.full(2, size, np.float32)
  )
  found = outlier_features.by_kind(
    {
      'embedding/table': one(9.0),
      'layers_10/ffn/down/kernel': one(10.0),
      'layers_2/ffn/down/kernel': one(2.0),
    }
  )
  assert set(found) == {'head', 'ffn/down'}
  np.testing.assert_array_equal(found['ffn/down'].largest[:, 0], [2.0, 10.0])


@functools.cache
def _model(num_layers):
  config = fixtures.config(vocab_size=256, num_layers=num_layers)
  return config, transformer.init(config, jax.random.key(0))


def _planted(factor, num_layers=1):
  """A model whose layers all multiply dimension 5 by a factor before qkv."""
  config, params = _model(num_layers)
  params = dict(params)
  for layer in range(num_layers):
    scale = np.ones(config.width, np.float32)
    scale[5] = factor
    name = f'layers_{layer}'
    params[name] = {**params[name], 'attention_norm': {'scale': scale}}
  return transformer.apply_fn(config), params


def test_a_planted_feature_is_found_where_it_is():
  apply, params = _planted(1000.0, num_layers=2)
  tokens = np.random.default_rng(0).integers(0, 256, (4, 32))
  segments = np.ones_like(tokens)
  found = outlier_features.observe(
    apply, params, [(tokens, segments)], threshold=50.0
  )
  chex.assert_shape(found['attention/qkv'].share, (2, 16))
  np.testing.assert_array_equal(found['attention/qkv'].outliers(), [5])
  assert not len(found['ffn/gate_up'].outliers())


def test_parts_of_text_and_padding_change_nothing():
  apply, params = _planted(1.0)
  tokens = np.random.default_rng(0).integers(0, 256, (4, 32))
  segments = np.ones_like(tokens)
  segments[:, 20:] = 0
  whole = outlier_features.observe(
    apply, params, [(tokens, segments)], threshold=2.0
  )
  other = np.where(segments > 0, tokens, 7)
  parts = outlier_features.observe(
    apply,
    params,
    [(other[:1], segments[:1]), (other[1:], segments[1:])],
    threshold=2.0,
  )
  for kind, found in whole.items():
    np.testing.assert_allclose(found.share, parts[kind].share, atol=0.02)
    np.testing.assert_allclose(found.largest, parts[kind].largest, rtol=1e-4)
    assert 0 <= found.share.max() <= 1


def test_nothing_to_look_at_is_an_error():
  apply, params = _planted(1.0)
  tokens = np.zeros((1, 8), np.int32)
  for batches in ([], [(tokens, tokens)]):
    with pytest.raises(ValueError, match='at least one batch'):
      outlier_features.observe(apply, params, batches)


def test_activations_that_are_not_finite_are_an_error():
  apply, params = _planted(np.nan)
  tokens = np.ones((1, 8), np.int32)
  with pytest.raises(ValueError, match='multiplies is not finite'):
    outlier_features.observe(apply, params, [(tokens, tokens)])
