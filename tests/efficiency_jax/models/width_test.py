"""Tests of what the width of a pass changes in the bits of a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import engine
from efficiency_jax import generation
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import untrained
from efficiency_jax.leaves import Activation
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from efficiency_jax.models import width
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.quantization import recipes
from efficiency_jax.quantization import rules
from efficiency_jax.quantization.absmax import Integers
from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir
from tests import fixtures

pytestmark = [
  pytest.mark.optimized,
  pytest.mark.skipif(
    bool(llvm_cpu.missing()) or not llvm_ir.has('avx512vnni'),
    reason='needs kernels for this CPU, and VNNI',
  ),
]

_CONFIG = DecoderConfig(
  vocab_size=320,
  width=64,
  ffn_width=64,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  max_positions=512,
)


@functools.cache
def _params(recipe, config=_CONFIG):
  params = fixtures.params(config, spread=0.2)
  return recipes.quantize(config, params, recipe)[0] if recipe else params


@pytest.mark.parametrize(
  ('recipe', 'change', 'cache_dtype'),
  [
    ('W8A8', {}, jnp.int8),
    (
      'W8A8',
      {'qk_norm': True, 'windows': (None, 40), 'post_norms': True},
      jnp.float32,
    ),
    pytest.param(
      *('W4A8', {'qkv_bias': True}, jnp.float32), marks=pytest.mark.slow
    ),
  ],
)
def test_logits_keys_and_values_keep_their_bits(recipe, change, cache_dtype):
  config = dataclasses.replace(_CONFIG, **change)
  params = _params(recipe, config)
  assert width.is_independent(config, params, cache_dtype)
  step = jax.jit(transformer.apply_fn(config))
  tokens = np.random.default_rng(0).integers(0, 320, (1, 80))

  def passes(size, begun, first, last):
    cache, logits = begun, []
    for start in range(first, last, size):
      output, cache = step(params, tokens[:, start : start + size], cache)
      logits.append(output.logits)
    return np.concatenate(logits, 1), cache

  # A block of attention ends among the tokens that are compared.
  empty = kv_cache.init(config, 1, 128, cache_dtype)
  _, begun = passes(8, empty, 0, 56)
  passes = functools.partial(passes, begun=begun, first=56, last=72)

  alone = passes(1)
  assert alone[0].std() > 0.1
  for size in (8, 16):
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
    # The norm of a head alone does not fill vectors.
    (
      'W8A8',
      dataclasses.replace(_CONFIG, width=72, qk_norm=True),
      jnp.float32,
    ),
  ],
)
def test_other_models_are_not_promised(recipe, config, cache_dtype):
  params = _params(recipe, config)
  assert not width.is_independent(config, params, cache_dtype)


@pytest.mark.parametrize(
  'method',
  [
    # Groups that are multiplied in floats.
    Integers(bits=8, per=16, activation=Activation()),
    # One scale for all rows, unless it is known beforehand.
    Integers(bits=8, activation=Activation(per='tensor')),
  ],
)
def test_rows_that_share_something_are_not_promised(method):
  params, _ = rules.quantize(_params(''), recipes.every(method))
  assert not width.is_independent(_CONFIG, params, jnp.float32)


def test_a_norm_in_half_precision_is_not_promised():
  params = _params('W8A8')
  scale = params['final_norm']['scale'].astype(jnp.bfloat16)
  params = {**params, 'final_norm': {'scale': scale}}
  assert not width.is_independent(_CONFIG, params, jnp.float32)


def test_long_groups_are_not_promised_where_many_rows_leave_the_kernel():
  config = dataclasses.replace(_CONFIG, ffn_width=2 * 8224)
  method = Integers(bits=8, per=8224, activation=Activation())
  rest = Integers(bits=8, activation=Activation())
  params, _ = rules.quantize(
    transformer.init(config, jax.random.key(0)),
    (('down/kernel$', method), (recipes.MATRICES, rest)),
  )
  assert not width.is_independent(config, params, jnp.float32)


def test_drafted_text_is_plain_text():
  """16 tokens a pass of two rows; a draft may be too long for a promise."""
  lm = untrained.language_model(_CONFIG)
  params = fixtures.params(_CONFIG, spread=0.6)
  params, _ = recipes.quantize(_CONFIG, params, 'W8A8')
  lm = dataclasses.replace(lm, params=params)
  prompts = ['to be or not to be or', 'x']

  def tokens(prompts, **choices):
    made = generation.generate(
      lm, prompts, max_new_tokens=24, cache_dtype='int8', **choices
    )
    assert made.guarantee == 'greedy'
    return [row.tokens.tolist() for row in made.rows]

  plain = tokens(prompts, drafter='plain')
  assert plain[0] != plain[1]
  assert plain == tokens(prompts, drafter='n-gram', draft_length=7)
  long = engine.prepare(lm, drafter='n-gram', draft_length=64)
  assert long.guarantee == 'none'


def test_an_engine_promises_chains_and_no_trees():
  lm = untrained.language_model(_CONFIG)
  lm = dataclasses.replace(lm, params=_params('W8A8'))
  chain = engine.prepare(lm, drafter='n-gram', cache_dtype='int8')
  assert chain.guarantee == 'greedy'
  tree = token_tree.from_choices([(0,), (1,), (0, 0)])
  branches = engine.prepare(lm, drafter='draft model', draft=lm, trees=(tree,))
  assert branches.guarantee == 'none'
