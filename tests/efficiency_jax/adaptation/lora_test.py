"""An adapted model is first the model itself, then the merged one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import trees
from efficiency_jax.adaptation import lora
from efficiency_jax.leaves import LoraTensor
from efficiency_jax.linear import linear
from efficiency_jax.models import transformer
from efficiency_jax.quantization.codebooks import Codes
from tests import fixtures

_CONFIGS = (
  fixtures.config(),
  fixtures.every_option(num_layers=2, windows=(3, None)),
)
_linear = jax.jit(linear)
_TOKENS = jnp.asarray([[1, 5, 2, 2, 9, 0], [3, 3, 0, 9, 4, 4]], jnp.int32)
_RULES = ('attention/qkv/kernel$', 'layers_1/ffn/')


def _adapted(config, rules=('/kernel$',)):
  params = fixtures.params(config)
  return lora.adapt(params, rules, rank=3, alpha=6.0, key=jax.random.key(0))


def _moved(adapted):
  """The same with an adapter that says something."""
  rng = np.random.default_rng(0)
  noisy = lambda x: jnp.asarray(
    np.asarray(x) + 0.3 * rng.standard_normal(x.shape), x.dtype
  )
  return lora.with_factors(adapted, jax.tree.map(noisy, lora.factors(adapted)))


def _logits(config, params):
  apply = jax.jit(transformer.apply_fn(config))
  return np.asarray(apply(params, _TOKENS)[0].logits)


@pytest.mark.parametrize('config', _CONFIGS, ids=['plain', 'every option'])
def test_a_new_adapter_changes_no_bit(config):
  params = fixtures.params(config)
  adapted, _ = _adapted(config)
  expected = _logits(config, params)
  got = _logits(config, adapted)
  if config == _CONFIGS[0]:
    np.testing.assert_array_equal(got, expected)
  # With biases and activations around them the additions of zero change what
  # is fused, and so the order of other sums.
  np.testing.assert_allclose(got, expected, atol=1e-5)
  for plain in (lora.base(adapted), lora.merge(adapted)):
    jax.tree.map(np.testing.assert_array_equal, plain, params)
  assert np.abs(_logits(config, _moved(adapted)) - expected).max() > 0.1


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('rows', [1, 3])
def test_a_new_adapter_changes_no_bit_of_a_product(dtype, rows):
  rng = np.random.default_rng(0)
  x, kernel, bias = (
    jnp.asarray(rng.standard_normal(shape), dtype)
    for shape in ((rows, 16), (16, 24), (24,))
  )
  adapted, _ = lora.adapt(
    {'kernel': kernel}, ['kernel'], 3, 6.0, jax.random.key(0)
  )
  np.testing.assert_array_equal(
    _linear(x, adapted['kernel'], bias), _linear(x, kernel, bias)
  )


@pytest.mark.parametrize('config', _CONFIGS, ids=['plain', 'every option'])
def test_the_merged_model_is_the_adapted_one(config):
  adapted = _moved(_adapted(config)[0])
  merged = lora.merge(adapted)
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(merged))
  assert jax.tree.structure(merged) == jax.tree.structure(lora.base(adapted))
  np.testing.assert_allclose(
    _logits(config, merged), _logits(config, adapted), atol=2e-4
  )
  jax.tree.map(
    np.testing.assert_array_equal, lora.base(adapted), fixtures.params(config)
  )


def test_rules_choose_and_the_report_counts():
  config = fixtures.config()
  params = fixtures.params(config)
  adapted, report = _adapted(config, _RULES)
  found = {
    path: leaf
    for path, leaf in (
      (trees.path_string(path), leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        adapted, is_leaf=lambda x: isinstance(x, LoraTensor)
      )
    )
    if isinstance(leaf, LoraTensor)
  }
  expected = (
    'layers_0/attention/qkv/kernel',
    'layers_1/attention/qkv/kernel',
    'layers_1/ffn/down/kernel',
    'layers_1/ffn/gate_up/kernel',
  )
  assert tuple(found) == report.paths == expected
  assert report.frozen == trees.count_parameters(params)
  wide_and_out = [3 * sum(leaf.base.shape) for leaf in found.values()]
  assert report.trained == sum(wide_and_out)
  assert all(leaf.scale == 2.0 for leaf in found.values())
  # Random, and not the same everywhere.
  first, second = (found[path].a for path in expected[:2])
  assert 0.1 < np.std(first) < 0.5
  assert (first != second).all()
  # What is trained has the paths of the kernels.
  trained = lora.factors(adapted)
  assert [path for path, _ in trees.leaves(trained)] == [
    f'{path}/{name}' for path in expected for name in 'ab'
  ]
  again = lora.with_factors(adapted, trained)
  assert jax.tree.structure(again) == jax.tree.structure(adapted)
  jax.tree.map(np.testing.assert_array_equal, again, adapted)


def test_gradients_reach_the_factors_alone_and_are_those_of_the_sum():
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  x, w, a, b, weight = (
    array(*s) for s in ((5, 8), (8, 6), (8, 2), (2, 6), (5, 6))
  )

  def adapted(w, a, b):
    leaf = LoraTensor(base=w, a=a, b=b, scale=0.7)
    return jnp.sum(weight * jnp.tanh(linear(x, leaf)))

  def dense(w, a, b):
    return jnp.sum(weight * jnp.tanh(x @ (w + 0.7 * a @ b)))

  both = lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(w, a, b)
  got, (none, *mine) = both(adapted)
  right, (_, *expected) = both(dense)
  np.testing.assert_allclose(got, right, rtol=1e-4)
  assert (np.asarray(none) == 0).all()
  for got, right in zip(mine, expected, strict=True):
    np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_adapted_is_refused():
  config = fixtures.config()
  with pytest.raises(ValueError, match="rule 'querys' applies to nothing"):
    _adapted(config, ('/kernel$', 'querys'))
  with pytest.raises(ValueError, match='embedding/table .* is none'):
    _adapted(config, ('embedding',))
  with pytest.raises(ValueError, match='rank must be >= 1, got 0'):
    lora.adapt(
      fixtures.params(config), ['kernel'], 0, 1.0, key=jax.random.key(0)
    )
  with pytest.raises(ValueError, match='qkv/kernel is adapted already'):
    lora.adapt(_adapted(config)[0], ['qkv'], 2, 1.0, key=jax.random.key(0))


def _with_factors_of_inputs(weight):
  """Four bits whose input features are multiplied first, as AWQ's are."""
  factors = jnp.linspace(0.5, 2.0, len(weight))
  leaf = Codes()(weight / factors[:, None])
  return dataclasses.replace(leaf, input_scales=factors)


@pytest.mark.parametrize('method', [Codes(), _with_factors_of_inputs])
def test_a_kernel_in_four_bits_can_be_adapted(method):
  """No gradient reaches it, and what is trained is merged with what it says."""
  rng = np.random.default_rng(0)
  weight = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
  frozen = {'kernel': jax.jit(lambda w: method(w))(weight)}
  adapted, _ = lora.adapt(frozen, ['kernel'], 2, 4.0, key=jax.random.key(1))
  x = jnp.asarray(rng.standard_normal((3, 64)), jnp.float32)
  np.testing.assert_array_equal(
    _linear(x, adapted['kernel']), _linear(x, frozen['kernel'])
  )
  loss = lambda factors: jnp.sum(
    linear(x, lora.with_factors(adapted, factors)['kernel']) ** 2
  )
  factors = lora.factors(adapted)
  loss_and_grads = jax.jit(jax.value_and_grad(loss))
  before, grads = loss_and_grads(factors)
  moved = jax.tree.map(lambda f, g: f - 1e-3 * g, factors, grads)
  assert loss_and_grads(moved)[0] < before
  trained = lora.with_factors(adapted, moved)
  np.testing.assert_allclose(
    x @ lora.merge(trained)['kernel'],
    _linear(x, trained['kernel']),
    rtol=1e-4,
    atol=1e-4,
  )
