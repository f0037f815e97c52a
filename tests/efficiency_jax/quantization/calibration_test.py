"""What weights multiply is what the model computes, and scales follow it."""

import chex
import jax
import numpy as np
import pytest

from efficiency_jax.models import transformer
from efficiency_jax.quantization import calibration
from tests import fixtures

pytestmark = pytest.mark.short

_CONFIG = fixtures.config()
_PARAMS = fixtures.params(_CONFIG)
_APPLY = transformer.apply_fn(_CONFIG)
_TOKENS = np.random.default_rng(0).integers(0, 11, (3, 2, 8))


def test_every_product_of_the_model_is_seen():
  found = calibration.observe(_APPLY, _PARAMS, _TOKENS, rows=48)
  names = {
    f'layers_{i}/{name}/kernel'
    for i in range(2)
    for name in ('attention/qkv', 'attention/output', 'ffn/gate_up', 'ffn/down')
  }
  assert set(found) == names | {'embedding/table'}
  assert found['layers_0/ffn/down/kernel'].gram.shape == (24, 24)


def test_sums_are_those_of_what_was_multiplied():
  """The head multiplies the final hidden states, which the model gives."""
  found = calibration.observe(_APPLY, _PARAMS, _TOKENS, rows=48)
  apply = jax.jit(_APPLY)
  hidden = [
    np.asarray(apply(_PARAMS, t)[0].hidden).reshape(-1, 16) for t in _TOKENS
  ]
  x = np.concatenate(hidden).astype(np.float64)
  got = found['embedding/table']
  assert got.rows == len(x) == 48
  np.testing.assert_allclose(got.gram, x.T @ x, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(got.sizes, np.abs(x).sum(0), rtol=1e-5)
  np.testing.assert_allclose(got.largest, np.abs(x).max(0), rtol=1e-6)
  np.testing.assert_allclose(
    got.batch_largest, [np.abs(h).max() for h in hidden], rtol=1e-6
  )
  assert got.histogram.sum() == x.size


def test_seeing_changes_nothing():
  # A new function each time: it is traced again.
  traced = lambda: jax.jit(lambda *inputs: _APPLY(*inputs)[0])
  before = traced()(_PARAMS, _TOKENS[0])
  calibration.observe(_APPLY, _PARAMS, _TOKENS, rows=1)
  after = traced()(_PARAMS, _TOKENS[0])
  chex.assert_trees_all_equal(before, after)


_inputs = jax.jit(calibration.inputs)


def _normal(rows=4000, outlier=None):
  x = np.random.default_rng(0).standard_normal((rows, 8)).astype(np.float32)
  if outlier is not None:
    x[7, 3] = outlier
  batches = [_inputs(part) for part in np.split(x, 4)]
  total = batches[0]
  for batch in batches[1:]:
    total = calibration.merge(total, batch)
  return x, total


def test_the_histogram_counts_sizes_to_one_percent():
  x, total = _normal()
  edges = 2.0 ** (np.arange(2560) / 64 - 20)
  cumulated = np.cumsum(total.histogram)
  for bound in (0.5, 1.0, 2.0):
    at = np.searchsorted(edges, bound)
    assert abs(cumulated[at] - (np.abs(x) <= edges[at]).sum()) <= 2


def test_the_four_modes_on_text_with_one_outlier():
  x, total = _normal(outlier=60.0)
  scale = lambda mode, bits=8: float(
    calibration.activation_scale(total, mode, bits)
  )
  assert scale('absmax') == pytest.approx(60 / 127)
  # 99.99 % of 32,000 are all but three.
  bound = np.sort(np.abs(x), axis=None)[-4]
  assert scale('percentile') == pytest.approx(bound / 127, rel=0.02)
  means = np.mean([np.abs(part).max() for part in np.split(x, 4)])
  assert scale('moving average') == pytest.approx(means / 127)

  def error(s, bits):
    largest = 2 ** (bits - 1) - 1
    q = np.clip(np.round(x / s), -largest, largest)
    return np.mean((q * s - x) ** 2)

  for bits in (4, 8):
    grid = np.geomspace(0.5, 60, 200) / (2 ** (bits - 1) - 1)
    best = min(error(s, bits) for s in grid)
    # The histogram's idea of an error, so not exactly the best.
    assert error(scale('mse', bits), bits) < 1.05 * best


def test_nothing_but_zeros_has_a_usable_scale():
  zeros = _inputs(np.zeros((4, 3), np.float32))
  assert calibration.activation_scale(zeros, 'absmax') == 1


def test_text_that_is_too_short_or_breaks_the_model_is_refused():
  with pytest.raises(ValueError, match='has 16 tokens and needs 1024'):
    calibration.observe(_APPLY, _PARAMS, _TOKENS[:1])
  with pytest.raises(ValueError, match='has 0 tokens'):
    calibration.observe(_APPLY, _PARAMS, [])
  broken = jax.tree.map(lambda x: np.asarray(x) * np.inf, _PARAMS)
  with pytest.raises(ValueError, match='multiplies is not finite'):
    calibration.observe(_APPLY, broken, _TOKENS, rows=1)
  with pytest.raises(ValueError, match="got 'median'"):
    calibration.activation_scale(_normal()[1], 'median')
