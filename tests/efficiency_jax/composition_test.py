"""Techniques together: quantized targets, caches, drafts, and speculation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import untrained
from efficiency_jax.quantization import recipes
from efficiency_jax.quantization import rules
from efficiency_jax.quantization.codebooks import Codes
from tests import fixtures

# Blocks of two shapes of matrices; a method is compiled for each shape.
_CONFIG = fixtures.config(
  vocab_size=257,
  width=64,
  ffn_width=64,
  head_dim=16,
  num_layers=1,
  max_positions=256,
)
_PROMPTS = ['to be or not to be or', 'x']
_TREE = token_tree.from_choices([(0,), (1,), (0, 0)])


@functools.cache
def _lm(recipe=''):
  lm = untrained.language_model(_CONFIG)
  # Of fixtures, because an untrained model says one token for ever.
  lm = dataclasses.replace(lm, params=fixtures.params(lm.config, spread=0.2))
  if not recipe:
    return lm
  params, _ = recipes.quantize(lm.config, lm.params, recipe)
  return dataclasses.replace(lm, params=params)


def _eagle(lm):
  form = eagle.Form(target=lm.config, vocabulary=20)
  return eagle.TrainedDraft(
    form=form,
    params=eagle.init(form, jax.random.key(0), _lm().params),
    vocabulary=np.arange(20),
    trees=(_TREE,),
  )


def _heads(lm):
  form = medusa.Heads(count=2)
  params = medusa.init(
    form, jax.random.key(0), lm.config.width, lm.config.vocab_size, {}
  )
  return medusa.TrainedHeads(form=form, params=params, trees=(_TREE,))


def _tokens(lm, **choices):
  made = generation.generate(lm, _PROMPTS, max_new_tokens=16, **choices)
  return [row.tokens.tolist() for row in made.rows]


@pytest.mark.parametrize(
  ('recipe', 'cache'),
  [
    pytest.param('W8A8', 'int8', marks=pytest.mark.slow),
    pytest.param('NF4', None, marks=pytest.mark.slow),
    pytest.param('W4A8', None, marks=pytest.mark.slow),
    pytest.param('W4A8', 'int8', marks=pytest.mark.slow),
  ],
)
def test_a_quantized_target_is_exact_for_itself_with_every_draft(recipe, cache):
  """On models as small as this one; see `Engine.guarantee`."""
  lm = _lm(recipe)
  plain = _tokens(lm, drafter='plain', cache_dtype=cache)
  assert plain == _tokens(
    lm, drafter='n-gram', draft_length=3, cache_dtype=cache
  )
  trained = {'eagle': _eagle(lm), 'medusa': _heads(lm)}
  for drafter, heads in trained.items():
    drafted = _tokens(
      lm, drafter=drafter, heads=heads, draft_length=3, cache_dtype=cache
    )
    assert plain == drafted


@pytest.mark.parametrize(
  ('recipe', 'cache', 'expected'),
  [
    ('', None, 'greedy'),
    ('NF4', None, 'greedy'),
    ('W8A8', None, 'none'),
    ('', 'int8', 'none'),
  ],
)
def test_nothing_is_promised_where_roundings_may_turn(recipe, cache, expected):
  options = {'drafter': 'n-gram', 'draft_length': 3, 'cache_dtype': cache}
  assert engine_lib.prepare(_lm(recipe), **options).guarantee == expected
  options = {'drafter': 'plain', 'cache_dtype': cache}
  assert engine_lib.prepare(_lm(recipe), **options).guarantee == 'greedy'


def test_quantization_changes_the_text_or_the_test_is_blind():
  texts = [_tokens(_lm(name), drafter='plain') for name in ('', 'int2')]
  assert texts[0] != texts[1]


@pytest.mark.parametrize('method', [Codes()])
def test_a_quantized_draft_of_a_model_in_floats_loses_nothing(method):
  lm = _lm()
  plain = _tokens(lm, drafter='plain')
  for drafter, heads in (('eagle', _eagle(lm)), ('medusa', _heads(lm))):
    params, report = rules.quantize(heads.params, [('kernel$', method)])
    assert report.leaves
    small = dataclasses.replace(heads, params=params)
    assert plain == _tokens(lm, drafter=drafter, heads=small, draft_length=3)


@pytest.mark.slow
def test_a_sampled_text_of_a_quantized_target_is_that_of_its_seed():
  lm = _lm('W8A8')
  options = {'temperature': 1.0, 'seed': 3, 'cache_dtype': 'int8'}
  plain = _tokens(lm, drafter='plain', verifier='coupled', **options)
  assert plain == _tokens(
    lm, drafter='eagle', heads=_eagle(lm), draft_length=3, **options
  )
