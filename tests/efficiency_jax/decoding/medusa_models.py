"""Random heads beside the random targets of `tests.fixtures`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import medusa
from tests import fixtures

TARGET = fixtures.config()
# Of its 11 tokens, in an order that is not theirs.
VOCABULARY = np.asarray([3, 0, 9, 2, 10, 7, 4, 1], np.int32)
FORMS = (
  medusa.Heads(count=3),
  medusa.Heads(count=3, blocks=2, rank=2),
  medusa.Heads(count=4, own=True, markov=3),
  medusa.Heads(count=3, vocabulary=8, rank=2, confidence=True),
  medusa.Heads(count=3, vocabulary=8, own=True),
  medusa.Heads(count=3, vocabulary=8, markov=3, confidence=True),
)


def table(heads: medusa.Heads):
  """What `medusa.init` copies for heads of their own."""
  params = fixtures.params(TARGET)
  if heads.vocabulary is None:
    return {'embedding': params['embedding']}
  return draft_vocabulary.head(params, jnp.asarray(VOCABULARY))


@functools.cache
def weights(heads: medusa.Heads) -> drafters.Weights:
  """The target, and heads that guess something of their own."""
  params = medusa.init(
    heads, jax.random.key(0), TARGET.width, TARGET.vocab_size, table(heads)
  )
  rng = np.random.default_rng(0)
  noisy = lambda x: x + 0.5 * rng.standard_normal(x.shape).astype(np.float32)
  trained = medusa.TrainedHeads(
    form=heads,
    params=jax.tree.map(noisy, params),
    vocabulary=None if heads.vocabulary is None else VOCABULARY,
    trees=(),
  )
  return drafters.Weights(fixtures.params(TARGET), trained.weights)


def formula(
  heads: medusa.Heads, hidden: np.ndarray, k: int, previous: int
) -> np.ndarray:
  """Logits [R] of head k = 1 .. K for a state [D] and the token before."""
  everything = weights(heads)
  target, draft = jax.tree.map(
    lambda x: np.asarray(x, float), (everything.target, everything.draft)
  )
  embedding = target['embedding']['table']
  head = draft[f'head_{k - 1}']
  x = _state(heads, head, hidden)
  if heads.own:
    scores = head['output']['embedding']['table'] @ x
  elif heads.vocabulary is not None:
    scores = embedding[VOCABULARY] @ x
  else:
    scores = embedding @ x
  if heads.rank:
    scores += x @ head['down']['kernel'] @ head['up']['kernel']
  if heads.markov:
    down, up = (draft['markov'][name]['kernel'] for name in ('down', 'up'))
    scores += embedding[previous] @ down @ up
  return scores


def trust(
  heads: medusa.Heads, hidden: np.ndarray, k: int, previous: int
) -> float:
  """How sure head k = 1 .. K is of its guess, in 0 .. 1."""
  everything = weights(heads)
  target, draft = jax.tree.map(
    lambda x: np.asarray(x, float), (everything.target, everything.draft)
  )
  head = draft[f'head_{k - 1}']
  seen = _state(heads, head, hidden)
  if heads.markov:
    token = target['embedding']['table'][previous]
    seen = np.append(seen, token @ draft['markov']['down']['kernel'])
  judge = head['confidence']
  return 1 / (1 + np.exp(-seen @ judge['kernel'][:, 0] - judge['bias'][0]))


def _state(heads: medusa.Heads, head, hidden: np.ndarray) -> np.ndarray:
  """What the blocks of a head make of a state [D]."""
  x = np.asarray(hidden, float)
  for i in range(heads.blocks):
    inner = x @ head[f'block_{i}']['kernel']
    x = x + inner / (1 + np.exp(-inner))
  return x
