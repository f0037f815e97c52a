"""Tests of what the width of a pass changes in the bits of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import engine
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import untrained
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from efficiency_jax.models import width
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.quantization import recipes
from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir
from tests import fixtures

pytestmark = pytest.mark.skipif(
  bool(llvm_cpu.missing()) or not llvm_ir.has('avx512vnni'),
  reason='needs kernels for this CPU, and VNNI',
)

_CONFIG = DecoderConfig(
  vocab_size=320,
  width=64,
  ffn_width=128,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  max_positions=512,
)


def _params(recipe, config=_CONFIG):
  params = fixtures.params(config, spread=0.2)
  return recipes.quantize(config, params, recipe)[0] if recipe else params


@pytest.mark.parametrize('cache_dtype', [jnp.float32, jnp.int8])
@pytest.mark.parametrize(
  ('recipe', 'change'),
  [
    ('W8A8', {}),
    ('W8A8', {'qk_norm': True, 'windows': (None, 40), 'post_norms': True}),
    ('W4A8', {'qkv_bias': True}),
  ],
)
def test_logits_keys_and_values_keep_their_bits(recipe, change, cache_dtype):
  config = dataclasses.replace(_CONFIG, **change)
  params = _params(recipe, config)
  assert width.is_independent(config, params, cache_dtype)
  step = jax.jit(transformer.apply_fn(config))
  tokens = np.random.default_rng(0).integers(0, 320, (2, 96))
  empty = kv_cache.init(config, 2, 128, cache_dtype)
  _, begun = step(params, jnp.asarray(tokens[:, :80]), empty)

  def passes(size):
    cache, logits = begun, []
    for first in range(80, 96, size):
      output, cache = step(params, tokens[:, first : first + size], cache)
      logits.append(output.logits)
    return jnp.concatenate(logits, 1), cache

  alone = passes(1)
  assert alone[0].std() > 0.1
  for size in (2, 8, 16):
    jax.tree.map(np.testing.assert_array_equal, passes(size), alone)


@pytest.mark.parametrize(
  ('recipe', 'config', 'cache_dtype'),
  [
    ('', _CONFIG, jnp.float32),
    ('int8', _CONFIG, jnp.float32),
    ('LLM.int8', _CONFIG, jnp.float32),
    ('W8A8 per tensor', _CONFIG, jnp.float32),
    ('W8A8', _CONFIG, jnp.bfloat16),
    (
      'W8A8',
      dataclasses.replace(_CONFIG, attention_softcap=20.0),
      jnp.float32,
    ),
    ('W8A8', dataclasses.replace(_CONFIG, head_dim=24), jnp.float32),
    ('W8A8', dataclasses.replace(_CONFIG, vocab_size=321), jnp.float32),
  ],
)
def test_other_models_are_not_promised(recipe, config, cache_dtype):
  params = _params(recipe, config)
  assert not width.is_independent(config, params, cache_dtype)


def test_an_engine_promises_chains_and_no_trees():
  lm = untrained.language_model(_CONFIG)
  lm = dataclasses.replace(lm, params=_params('W8A8'))
  chain = engine.prepare(lm, drafter='n-gram', cache_dtype='int8')
  assert chain.guarantee == 'greedy'
  tree = token_tree.from_choices([(0,), (1,), (0, 0)])
  branches = engine.prepare(lm, drafter='draft model', draft=lm, trees=(tree,))
  assert branches.guarantee == 'none'
