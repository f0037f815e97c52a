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
  # Of what `init` makes, only names and shapes are used.
  shapes = jax.eval_shape(lambda: eagle.init(form, jax.random.key(0)))

  def one(path, leaf):
    noise = rng.standard_normal(leaf.shape)
    name = trees.path_string(path)
    if name.endswith('kernel'):
      return jnp.asarray(1.5 * noise / np.sqrt(leaf.shape[0]), jnp.float32)
    if name.startswith('final_norm'):
      begun = np.asarray(target['final_norm']['scale'])
    else:
      begun = name.endswith('scale') and not form.config.norm_plus_one
    return jnp.asarray(begun + 0.2 * noise, jnp.float32)

  draft = jax.tree_util.tree_map_with_path(one, shapes)
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


@functools.partial(jax.jit, static_argnums=0)
def scores(form: eagle.Form, weights: drafters.Weights, states):
  """The draft's logits [..., R] of its own states [..., D]."""
  return eagle.scores_fn(form)(head(weights), states)


def recomputed(form: eagle.Form, state: speculative.State):
  """Cache and features of the draft, from the text and nothing else."""
  return _recomputed(form, weights(form), state.tokens, state.draft.cache)


@functools.partial(jax.jit, static_argnums=0)
def _recomputed(form, both, tokens, cache):
  apply = transformer.apply_fn(form.target, layers=form.layers)
  hidden = apply(both.target, tokens)[0].hidden
  features = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))[:, :-1]
  cache = jax.tree.map(jnp.zeros_like, cache)
  read = eagle.gathered(form, both.draft, both.target, features)
  _, cache = eagle.apply(form, both.draft, both.target, tokens, read, cache)
  return cache, features


def scores_after(form: eagle.Form, state, features, row: int, text, known: int):
  """The draft's logits [R] after a text of less than 12 tokens.

  Only of the first `known` tokens the target's states are read; those after
  them are the draft's own, each found by reading the whole text anew.
  """
  both = weights(form)
  tokens = np.zeros((1, 12), np.int32)
  tokens[0, : len(text)] = text
  features = np.asarray(features)[row : row + 1, :12]
  before = np.array(_gathered(form, both, features))
  for place in range(known - 1, len(text)):
    own, logits = _read(form, both, tokens, before, state.draft.cache)
    own = np.asarray(own)
    before[:, place + 1 : place + 2] = own[:, place : place + 1]
  return np.asarray(logits)[0, len(text) - 1]


@functools.partial(jax.jit, static_argnums=0)
def _gathered(form, both, features):
  return eagle.gathered(form, both.draft, both.target, features)


@functools.partial(jax.jit, static_argnums=0)
def _read(form, both, tokens, before, cache):
  """States and logits of a draft on one text, with an empty cache like this."""
  cache = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), cache)
  own, _ = eagle.apply(form, both.draft, both.target, tokens, before, cache)
  return own, scores(form, both, own)
