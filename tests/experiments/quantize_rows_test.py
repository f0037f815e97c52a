"""Which models a row of the ladder runs, and in which arrays."""

import dataclasses

import jax
import pytest

from configs import quantize_smollm2
from efficiency_jax import leaves
from efficiency_jax.evaluation import quality
from efficiency_jax.io import untrained
from efficiency_jax.quantization import recipes
from experiments import quantize_rows
from tests import fixtures


@pytest.fixture(scope='module')
def lm():
  plain = untrained.language_model()
  return dataclasses.replace(plain, params=fixtures.params(plain.config))


def _is_leaf(node):
  return isinstance(node, leaves.QTensor)


def test_the_reference_is_not_run_again(lm, monkeypatch):
  config = quantize_smollm2.get_config('tiny')
  known = quantize_rows.reference(lm, config)
  monkeypatch.delattr(quality, '_divergences')
  row = quantize_rows.measure_quality(lm, known, config)
  assert row['kl'] == 0
  assert row['perplexity_ratio'] == 1


@pytest.mark.parametrize(
  ('method', 'floats'), [('int8', True), ('GOBO 3 bits', True), ('W8A8', False)]
)
def test_weights_alone_are_measured_in_floats(lm, method, floats):
  params, _ = recipes.quantize(lm.config, lm.params, method)
  stored = dataclasses.replace(lm, params=params)
  measured = quantize_rows.as_floats(stored)
  found = jax.tree.leaves(measured.params, is_leaf=_is_leaf)
  assert any(map(_is_leaf, found)) != floats
