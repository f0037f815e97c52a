"""Random one-layer drafts beside the random targets of `tests.fixtures`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import trees
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import speculative
from efficiency_jax.models import transformer
from tests import fixtures

# Tokens of a tiny target, in an order that is not theirs.
VOCABULARY = np.asarray([3, 0, 9, 2, 10, 7, 4, 1], np.int32)


@functools.cache
def weights(
  form: eagle.Form, seed: int = 0, vocabulary: tuple[int, ...] = ()
) -> drafters.Weights:
  """A target and a draft with peaked guesses of its own."""
  target = fixtures.params(form.target)
  rng = np.random.default_rng(seed)

  def one(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    if trees.path_string(path).endswith('kernel'):
      return jnp.asarray(1.5 * noise / np.sqrt(leaf.shape[0]), jnp.float32)
    return leaf + jnp.asarray(0.2 * noise, jnp.float32)

  draft = eagle.init(form, jax.random.key(seed), target)
  draft = jax.tree_util.tree_map_with_path(one, draft)
  chosen = None
  if form.vocabulary is not None:
    chosen = np.asarray(vocabulary or vocabulary_of(form), np.int32)
  trained = eagle.TrainedDraft(form=form, params=draft, vocabulary=chosen)
  return drafters.Weights(target, trained.weights)


def vocabulary_of(form: eagle.Form) -> tuple[int, ...]:
  """The tokens that a draft with a vocabulary may draft."""
  there = VOCABULARY[form.target.vocab_size > VOCABULARY]
  return tuple(there[: form.vocabulary].tolist())


def head(weights: drafters.Weights):
  """What the draft's scores are made with."""
  if 'vocabulary' not in weights.draft:
    return weights.target
  return draft_vocabulary.head(weights.target, weights.draft['vocabulary'])


def recomputed(form: eagle.Form, state: speculative.State):
  """Cache and features of the draft, from the text and nothing else."""
  both = weights(form)
  apply = jax.jit(transformer.apply_fn(form.target, layers=form.layers))
  hidden = apply(both.target, state.tokens)[0].hidden
  features = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  cache = jax.tree.map(jnp.zeros_like, state.draft.cache)
  read = eagle.gathered(form, both.draft, both.target, features)
  _, cache = _apply(form)(both.draft, both.target, state.tokens, read, cache)
  return cache, features


def scores_after(form: eagle.Form, state, features, row: int, text, known: int):
  """The draft's logits [R] after a text of less than 12 tokens.

  Only of the first `known` tokens the target's states are read; those after
  them are the draft's own, each found by reading the whole text anew.
  """
  both = weights(form)
  tokens = np.zeros((1, 12), np.int32)
  tokens[0, : len(text)] = text
  before = eagle.gathered(
    form, both.draft, both.target, features[row : row + 1, :12]
  )
  before = np.array(before)
  for place in range(known - 1, len(text)):
    empty = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), state.draft.cache)
    own, _ = _apply(form)(both.draft, both.target, tokens, before, empty)
    before[:, place + 1 : place + 2] = own[:, place : place + 1]
  return np.asarray(eagle.scores_fn(form)(head(both), own[0, len(text) - 1]))


@functools.cache
def _apply(form: eagle.Form):
  return jax.jit(functools.partial(eagle.apply, form))
