"""Random one-layer drafts beside the random targets of `tests.fixtures`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import trees
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import eagle
from tests import fixtures

# Of the 11 tokens of a tiny target, in an order that is not theirs.
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
    chosen = np.asarray(vocabulary or VOCABULARY[: form.vocabulary], np.int32)
  trained = eagle.TrainedDraft(form=form, params=draft, vocabulary=chosen)
  return drafters.Weights(target, trained.weights)


def head(weights: drafters.Weights):
  """What the draft's scores are made with."""
  if 'vocabulary' not in weights.draft:
    return weights.target
  return draft_vocabulary.head(weights.target, weights.draft['vocabulary'])
