"""Engines with a draft of one layer; `generation_test` has the others."""

import dataclasses

import jax
import numpy as np
import pytest

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import untrained


@pytest.fixture(scope='module')
def lm():
  return untrained.language_model()


def _draft(lm, **options):
  form = eagle.Form(target=lm.config, vocabulary=20)
  return eagle.TrainedDraft(
    form=form,
    params=eagle.init(form, jax.random.key(0), lm.params),
    vocabulary=np.arange(20),
    **options,
  )


def test_a_draft_of_one_layer_decodes_as_plain(lm):
  prompts = ['to be or not to be or', 'x']
  tree = token_tree.from_choices([(0,), (1,), (0, 0)])
  plain = generation.generate(lm, prompts, drafter='plain', max_new_tokens=12)
  for heads, length in ((_draft(lm), 2), (_draft(lm, trees=(tree,)), 3)):
    mine = generation.generate(
      lm,
      prompts,
      drafter='eagle',
      heads=heads,
      draft_length=length,
      max_new_tokens=12,
    )
    for a, b in zip(plain.rows, mine.rows, strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)


def test_lengths_and_verifiers_follow_the_draft(lm):
  tree = token_tree.from_choices([(0,), (1,), (0, 0)])
  prepare = lambda **options: (
    engine_lib.prepare(lm, drafter='eagle', greedy=False, **options).decoder
  )
  chains, trees = (
    prepare(heads=_draft(lm)),
    prepare(heads=_draft(lm, trees=(tree,))),
  )
  assert chains.verifier.name == 'block'
  assert chains.schedule.lengths == engine_lib.ADAPTIVE_LENGTHS
  assert trees.verifier.name == 'coupled'
  assert trees.schedule.lengths == (0, 3)


def test_a_foreign_draft_is_refused(lm):
  with pytest.raises(ValueError, match="'eagle' needs heads="):
    engine_lib.prepare(lm, drafter='eagle')
  with pytest.raises(ValueError, match="'medusa' needs heads="):
    engine_lib.prepare(lm, drafter='medusa', heads=_draft(lm))
  config = dataclasses.replace(lm.config, max_positions=7)
  foreign = dataclasses.replace(lm, config=config)
  with pytest.raises(ValueError, match='for another config'):
    engine_lib.prepare(foreign, drafter='eagle', heads=_draft(lm))
