"""Rules choose leaves in order, and the report adds up."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax import trees
from efficiency_jax.linear import linear
from efficiency_jax.models import transformer
from efficiency_jax.quantization import rules
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.gobo import Gobo
from efficiency_jax.quantization.number_formats import Floats
from tests import fixtures

pytestmark = pytest.mark.short

_CONFIG = fixtures.config(width=32, ffn_width=64, head_dim=8)
_PARAMS = fixtures.params(_CONFIG)


def test_the_first_rule_that_matches_counts():
  quantized, report = rules.quantize(
    _PARAMS,
    [
      ('layers_1/', None),
      ('down', Integers(bits=4, per=32)),
      ('kernel$', Integers()),
      ('table', Floats(format='bf16')),
    ],
  )
  chex.assert_trees_all_equal(quantized['layers_1'], _PARAMS['layers_1'])
  block = quantized['layers_0']
  assert block['ffn']['down']['kernel'].bits == 4
  assert block['ffn']['gate_up']['kernel'].bits == 8
  assert quantized['embedding']['table'].values.dtype == jnp.bfloat16
  paths = [leaf.path for leaf in report.leaves]
  assert len(paths) == 5
  assert 'layers_0/ffn/down/kernel' in paths
  assert {leaf.method for leaf in report.leaves} == {
    'W4 absmax, group 32',
    'W8 absmax, channel',
    'bf16',
  }


def test_the_report_counts_what_is_stored_and_what_was_lost():
  quantized, report = rules.quantize(
    _PARAMS, [('down', Integers(bits=4, per=32))]
  )
  assert report.num_bytes == trees.count_bytes(quantized)
  assert report.weights == trees.count_parameters(_PARAMS)
  assert report.bits_per_weight == 8 * report.num_bytes / report.weights
  leaf = report.leaves[0]
  before = np.asarray(_PARAMS['layers_0']['ffn']['down']['kernel'], np.float64)
  after = leaves.dequantize(quantized['layers_0']['ffn']['down']['kernel'])
  error = np.abs(before - np.asarray(after))
  assert leaf.shape == (64, 32)
  assert leaf.bits_per_weight == 5
  assert leaf.num_bytes == 64 * 32 * 5 // 8
  np.testing.assert_allclose(
    leaf.mean_error, error.mean() / np.abs(before).mean(), rtol=1e-5
  )
  np.testing.assert_allclose(leaf.max_error, error.max(), rtol=1e-5)
  snr = 10 * math.log10((before**2).sum() / (error**2).sum())
  np.testing.assert_allclose(leaf.snr_db, snr, rtol=1e-4)
  assert leaf.outlier_share == 0


def test_outliers_are_reported_as_a_share():
  quantized, report = rules.quantize(
    _PARAMS, [('layers_0/ffn/down', Gobo(bits=4, threshold=-1.5))]
  )
  q = quantized['layers_0']['ffn']['down']['kernel']
  share = len(q.outliers.values) / (64 * 32)
  assert report.leaves[0].outlier_share == share > 0


def test_a_table_is_stored_as_it_scores():
  quantized, _ = rules.quantize(_PARAMS, [('table', Integers())])
  table = quantized['embedding']['table']
  assert table.values.shape == (32, 11)
  assert table.shape == (11, 32)
  # One scale for each token.
  assert table.scales.shape == (1, 11)
  restored = rules.dequantize(quantized)
  chex.assert_trees_all_equal_shapes_and_dtypes(restored, _PARAMS)
  chex.assert_trees_all_close(restored, _PARAMS, atol=0.01)


@pytest.mark.parametrize('activation', [None, leaves.Activation()])
def test_a_quantized_model_is_a_model(activation):
  """Nearly the logits of the model it was, through the same function."""
  quantized, _ = rules.quantize(
    _PARAMS, [('(kernel|table)$', Integers(activation=activation))]
  )
  apply = jax.jit(transformer.apply_fn(_CONFIG))
  tokens = np.random.default_rng(0).integers(0, 11, (2, 9))
  before, after = (apply(p, tokens)[0] for p in (_PARAMS, quantized))
  assert after.logits.dtype == jnp.float32
  logits = np.asarray(before.logits)
  error = np.abs(logits - np.asarray(after.logits))
  assert 0 < error.max() < 0.25 * np.std(logits)
  if activation is None:
    plain, _ = apply(jax.jit(rules.dequantize)(quantized), tokens)
    np.testing.assert_allclose(after.logits, plain.logits, atol=1e-4)


def _scaled(matrix):
  """Integers whose input features are multiplied first, as AWQ's are."""
  scales = jnp.linspace(0.5, 2.0, len(matrix))
  q = Integers()(matrix / scales[:, None])
  return dataclasses.replace(q, input_scales=scales)


@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('method', [_scaled, Gobo(threshold=-2.5)])
def test_dequantized_parameters_make_the_same_products(method, traced):
  x = jax.random.normal(jax.random.key(0), (3, 48))
  leaf = method(jax.random.normal(jax.random.key(1), (48, 20)))
  assert leaf.outliers is None or len(leaf.outliers.values) > 2
  table = dataclasses.replace(leaf, transposed=True)
  dequantize = jax.jit(rules.dequantize) if traced else rules.dequantize
  plain = dequantize({'kernel': leaf, 'table': table})
  products = x @ plain['kernel'], x @ plain['table'].T
  for got in products:
    np.testing.assert_allclose(got, linear(x, leaf), rtol=0, atol=1e-5)


def test_calibrated_methods_are_given_what_a_weight_multiplies():
  seen = []

  def method(matrix, inputs):
    seen.append((matrix.shape, inputs))
    return Integers()(matrix)

  method.calibrated = True
  given = {f'layers_{i}/ffn/down/kernel': i for i in range(2)}
  rules.quantize(_PARAMS, [('down', method)], given)
  assert seen == [((64, 32), 0), ((64, 32), 1)]
  with pytest.raises(ValueError, match='gate_up/kernel: .* pass inputs='):
    rules.quantize(_PARAMS, [('ffn/', method)], given)


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ([], 'rules are empty'),
    ([('nothing', Integers())], "rule 'nothing' applies to nothing"),
    ([('kernel', None), ('down', Integers())], 'an earlier rule took it'),
    ([('scale', Integers())], r'norm/scale \[32\] is no kernel or table'),
    (
      [('down', Integers(bits=4, per=48))],
      r'layers_0/ffn/down/kernel \[64, 32\]: groups of 48 do not divide',
    ),
  ],
)
def test_rules_that_cannot_be_followed_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    rules.quantize(_PARAMS, given)


def test_quantizing_twice_is_refused():
  once, _ = rules.quantize(_PARAMS, [('down', Integers())])
  with pytest.raises(ValueError, match='is a QTensor already: dequantize it'):
    rules.quantize(once, [('kernel', Integers(bits=4, per=32))])


def test_weights_that_are_no_numbers_are_refused():
  kernel = _PARAMS['layers_0']['ffn']['down']['kernel'].at[0, 0].set(jnp.nan)
  block = {**_PARAMS['layers_0'], 'ffn': {'down': {'kernel': kernel}}}
  with pytest.raises(ValueError, match='layers_0/ffn/down.*not finite'):
    rules.quantize({'layers_0': block}, [('down', Integers())])
