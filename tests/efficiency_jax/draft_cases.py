"""Drafts that nobody trained, of every kind, and text written with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import generation
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import untrained
from tests import fixtures

KEY = jax.random.key(0)
CARD = {'data': 'nothing at all', 'licence': 'Apache-2.0 – "as is"'}
VOCABULARY = np.asarray([3, 0, 256, 97, 98, 101, 116, 32], np.int32)
TREES = tuple(
  token_tree.from_choices(choices)
  for choices in ([(0,), (1,), (0, 0)], [(0,), (1,), (2,), (0, 0), (0, 1)])
)


@functools.cache
def language_model(**fields):
  config = fixtures.config(vocab_size=257, max_positions=256, **fields)
  lm = untrained.language_model()
  return dataclasses.replace(lm, config=config, params=fixtures.params(config))


def random_params(init):
  """Random parameters of the shapes that `init` would give."""
  rng = np.random.default_rng(0)
  one = lambda x: 0.5 * rng.standard_normal(x.shape) + (x.ndim == 1)
  return jax.tree.map(
    lambda x: jnp.asarray(one(x), jnp.float32), jax.eval_shape(init)
  )


def eagle_draft(lm, *, reduced: bool = True, shapes=TREES, **form):
  form = eagle.Form(
    target=lm.config, vocabulary=len(VOCABULARY) if reduced else None, **form
  )
  return eagle.TrainedDraft(
    form=form,
    params=random_params(lambda: eagle.init(form, KEY)),
    vocabulary=VOCABULARY if reduced else None,
    trees=shapes,
  )


def medusa_heads(lm, *, reduced: bool = True, **form):
  form = medusa.Heads(
    count=2, vocabulary=len(VOCABULARY) if reduced else None, **form
  )
  tokens = jnp.asarray(VOCABULARY) if reduced else None
  table = draft_vocabulary.head(lm.params, tokens)
  width, size = lm.config.width, lm.config.vocab_size
  init = lambda: medusa.init(form, KEY, width, size, table)
  return medusa.TrainedHeads(
    form=form,
    params=random_params(init),
    vocabulary=VOCABULARY if reduced else None,
    trees=TREES,
  )


def cut_model(lm, *, reduced: bool = True, shapes=(), **form):
  form = draft_model.Form(
    target=lm.config,
    vocabulary=len(VOCABULARY) if reduced else None,
    **{'layers': (1,), **form},
  )
  return draft_model.TrainedDraft(
    form=form,
    params=random_params(lambda: draft_model.init(form, lm.params)),
    vocabulary=VOCABULARY if reduced else None,
    trees=shapes,
  )


KINDS = {
  'eagle': eagle_draft,
  'eagle of all tokens': lambda lm: eagle_draft(
    lm, reduced=False, shapes=(), ffn_width=8
  ),
  'medusa': lambda lm: medusa_heads(
    lm, markov=2, rank=3, token=True, layers=(1,)
  ),
  'medusa of all tokens': lambda lm: medusa_heads(lm, reduced=False, own=True),
  'draft model': lambda lm: cut_model(lm, shapes=TREES, ffn_width=8),
  'draft model of all tokens': lambda lm: cut_model(
    lm, reduced=False, layers=(1, 0)
  ),
}


def write(lm, draft, drafter, length):
  return generation.generate(
    lm,
    ['to be or not to be', 'x'],
    drafter=drafter,
    heads=draft,
    draft_length=length,
    max_new_tokens=24,
    stop=False,
  ).rows


def check_alike(rows, others):
  for a, b in zip(rows, others, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.run, b.run)
    np.testing.assert_array_equal(a.refused, b.refused)
    # A text is the target's whatever is drafted: the drafts must be there.
    assert (a.refused >= 0).sum() >= 5
