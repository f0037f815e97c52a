"""Tests of a model whose matrices lie in panels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import generation
from efficiency_jax import leaves
from efficiency_jax import linear
from efficiency_jax import panels
from efficiency_jax.adaptation import lora
from efficiency_jax.io import untrained
from efficiency_jax.leaves import LoraTensor
from efficiency_jax.leaves import PanelTensor
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from efficiency_jax.quantization import recipes
from efficiency_jax.quantization import rules
from pallas_kernels import llvm_cpu

pytestmark = pytest.mark.skipif(
  bool(llvm_cpu.missing()), reason=str(llvm_cpu.missing())
)


def _lm(**changes):
  """A model of which every matrix fits panels."""
  config = untrained.language_model().config
  changes = {'vocab_size': 288} | changes
  return untrained.language_model(dataclasses.replace(config, **changes))


def _in_panels(lm):
  return dataclasses.replace(lm, params=panels.for_cpu(lm.params))


def _typed(params):
  is_leaf = lambda node: isinstance(node, PanelTensor)
  nodes = jax.tree.leaves(params, is_leaf=is_leaf)
  return [node for node in nodes if is_leaf(node)]


@pytest.mark.parametrize('tied', [True, False])
def test_every_matrix_lies_in_panels_and_none_is_changed(tied):
  lm = _lm(tie_embeddings=tied)
  made = panels.for_cpu(lm.params)
  matrices = [x for x in jax.tree.leaves(lm.params) if x.ndim == 2]
  assert [x.shape for x in _typed(made)] == [x.shape for x in matrices]
  assert all(x.dtype == jnp.float32 for x in _typed(made))
  jax.tree.map(np.testing.assert_array_equal, rules.dequantize(made), lm.params)


def test_what_does_not_fit_stays():
  """A table of 289 rows, numbers of another kind, and what lies in panels."""
  lm = _lm(vocab_size=289)
  made = panels.for_cpu(lm.params)
  assert made['embedding']['table'] is lm.params['embedding']['table']
  assert len(_typed(made)) == 8
  again = panels.for_cpu(made)
  assert jax.tree.structure(again) == jax.tree.structure(made)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), lm.params)
  assert not _typed(panels.for_cpu(half))


def test_panels_are_for_a_cpu(monkeypatch):
  lm = _lm()
  monkeypatch.setattr(
    llvm_cpu, 'missing', lambda: 'programs are for a tpu here'
  )
  assert panels.for_cpu(lm.params) is lm.params


@pytest.mark.parametrize('tied', [True, False])
def test_logits_are_those_of_the_model(tied):
  lm = _lm(tie_embeddings=tied)
  tokens = jax.random.randint(jax.random.key(0), (2, 50), 0, 288)
  apply = jax.jit(transformer.apply_fn(lm.config))
  expected = apply(lm.params, tokens)[0].logits
  params = panels.for_cpu(lm.params)
  found = apply(params, tokens)[0].logits
  np.testing.assert_allclose(found, expected, atol=2e-5)
  cache, steps = kv_cache.init(lm.config, 2, 64), []
  for start, stop in ((0, 45), (45, 46), (46, 50)):
    output, cache = apply(params, tokens[:, start:stop], cache)
    cache = cache._replace(length=jnp.full((2,), stop, jnp.int32))
    steps.append(output.logits)
  found = jnp.concatenate(steps, axis=1)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_rows_of_a_table_are_those_of_the_table():
  """Also of tokens that there are not, which are cut off as elsewhere."""
  table = _lm().params['embedding']['table']
  typed = panels.for_cpu({'table': table})['table']
  tokens = jnp.asarray([[0, 31, 32], [287, 288, -1]])
  np.testing.assert_array_equal(
    linear.embed(tokens, typed), linear.embed(tokens, table)
  )
  index = jnp.arange(287, 0, -3)[:64]
  some = linear.rows_of_table(typed, index)
  assert isinstance(some, PanelTensor)
  np.testing.assert_array_equal(leaves.dequantize(some), table[index])
  few = linear.rows_of_table(typed, index[:5])
  np.testing.assert_array_equal(few, table[index[:5]])


@pytest.mark.parametrize('drafter', ['n-gram', 'early exit'])
def test_drafts_write_plain_text(drafter):
  lm = _in_panels(_lm())
  options = {'max_new_tokens': 24, 'stop': False}
  prompts = ['abcabcabc', 'a longer one of these prompts']
  plain = generation.generate(lm, prompts, drafter='plain', **options)
  found = generation.generate(lm, prompts, drafter=drafter, **options)
  assert found.texts == plain.texts
  assert found.guarantee == 'greedy'


def test_gradients_reach_the_weights():
  lm = _lm()
  apply = transformer.apply_fn(lm.config)
  tokens = jnp.arange(40)[None]
  loss = lambda params: jnp.square(apply(params, tokens)[0].logits).sum()
  expected = jax.grad(loss)(lm.params)
  found = rules.dequantize(jax.grad(loss)(panels.for_cpu(lm.params)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
    found,
    expected,
  )


def test_an_adapter_reads_panels_and_is_merged_without():
  kernel = jax.random.normal(jax.random.key(0), (64, 96))
  factors = {
    'a': jax.random.normal(jax.random.key(1), (64, 4)),
    'b': jax.random.normal(jax.random.key(2), (4, 96)),
    'scale': 0.5,
  }
  base = panels.for_cpu({'kernel': kernel})['kernel']
  x = jax.random.normal(jax.random.key(3), (3, 64))
  plain, typed = (LoraTensor(base=w, **factors) for w in (kernel, base))
  np.testing.assert_allclose(
    linear.linear(x, typed), linear.linear(x, plain), atol=1e-4
  )
  np.testing.assert_array_equal(
    lora.merge({'kernel': typed})['kernel'],
    lora.merge({'kernel': plain})['kernel'],
  )


def test_quantization_comes_before():
  lm = _in_panels(_lm())
  with pytest.raises(ValueError, match='is a PanelTensor already'):
    recipes.quantize(lm.config, lm.params, 'int8')
