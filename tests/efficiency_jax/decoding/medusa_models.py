"""Random heads beside the random targets of `tests.fixtures`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding import verifiers
from tests import fixtures

TARGET = fixtures.config()
# Of its 11 tokens, in an order that is not theirs.
VOCABULARY = np.asarray([3, 0, 9, 2, 10, 7, 4, 1], np.int32)
FORMS = (
  medusa.Heads(count=3),
  medusa.Heads(count=3, blocks=2, rank=2, token=True),
  medusa.Heads(count=4, own=True, markov=3),
  medusa.Heads(count=3, vocabulary=8, rank=2, confidence=True, layers=(0,)),
  medusa.Heads(count=3, vocabulary=8, own=True),
  medusa.Heads(count=3, vocabulary=8, markov=3, confidence=True),
  medusa.Heads(
    count=3, vocabulary=8, markov=3, confidence=True, token=True, layers=(1, 0)
  ),
)


# Of a form, a key, a width, a number of tokens and a table.
init = jax.jit(medusa.init, static_argnums=(0, 2, 3))


@functools.cache
def table(heads: medusa.Heads):
  """What `medusa.init` copies for heads of their own."""
  params = fixtures.params(TARGET)
  if heads.vocabulary is None:
    return {'embedding': params['embedding']}
  return draft_vocabulary.head(params, jnp.asarray(VOCABULARY))


@functools.cache
def weights(heads: medusa.Heads) -> drafters.Weights:
  """The target, and heads that guess something of their own."""
  params = init(
    heads, jax.random.key(0), TARGET.width, TARGET.vocab_size, table(heads)
  )
  rng = np.random.default_rng(0)

  def noisy(x):
    noise = rng.standard_normal(x.shape).astype(np.float32)
    return jnp.asarray(np.asarray(x) + np.float32(0.5) * noise)

  trained = medusa.TrainedHeads(
    form=heads,
    params=jax.tree.map(noisy, params),
    vocabulary=None if heads.vocabulary is None else VOCABULARY,
    trees=(),
  )
  return drafters.Weights(fixtures.params(TARGET), trained.weights)


@functools.cache
def _exact(heads: medusa.Heads):
  """The parameters of the target and of the heads in float64."""
  return jax.tree.map(lambda x: np.asarray(x, float), tuple(weights(heads)))


def formula(
  heads: medusa.Heads, hidden: np.ndarray, k: int, previous: int, token: int
) -> np.ndarray:
  """Logits [R] of head k = 1 .. K for a state [(1 + F) D] and tokens before.

  Those are the one before its guess and the one before all guesses.
  """
  target, draft = _exact(heads)
  embedding = target['embedding']['table']
  head = draft[f'head_{k - 1}']
  x = _state(heads, head, hidden, token)
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
  heads: medusa.Heads, hidden: np.ndarray, k: int, previous: int, token: int
) -> float:
  """How sure head k = 1 .. K is of its guess, in 0 .. 1."""
  target, draft = _exact(heads)
  head = draft[f'head_{k - 1}']
  seen = _state(heads, head, hidden, token)
  if heads.markov:
    token = target['embedding']['table'][previous]
    seen = np.append(seen, token @ draft['markov']['down']['kernel'])
  judge = head['confidence']
  return 1 / (1 + np.exp(-seen @ judge['kernel'][:, 0] - judge['bias'][0]))


def hidden_width(heads: medusa.Heads) -> int:
  """(1 + F) D."""
  return TARGET.width * (1 + len(heads.layers))


def _state(
  heads: medusa.Heads, head, hidden: np.ndarray, token: int
) -> np.ndarray:
  """What the blocks of a head make of a state [(1 + F) D]."""
  seen = np.split(np.asarray(hidden, float), 1 + len(heads.layers))
  x = seen[0]
  target, draft = _exact(heads)
  if heads.token:
    seen.append(target['embedding']['table'][token])
  if heads.token or heads.layers:
    scales = [np.sqrt((one**2).mean() + 1e-6) for one in seen]
    joined = np.concatenate([a / b for a, b in zip(seen, scales, strict=True)])
    inner = joined @ draft['trunk']['kernel']
    x = x + inner / (1 + np.exp(-inner))
  for i in range(heads.blocks):
    inner = x @ head[f'block_{i}']['kernel']
    x = x + inner / (1 + np.exp(-inner))
  return x


@dataclasses.dataclass(frozen=True)
class Knowing(drafters.Chain):
  """Puts the next tokens of known texts on one branch, others elsewhere.

  The parameters of the draft are the texts [B, N] and which nodes [nodes] are
  on the branch.
  """

  shape: token_tree.TokenTree
  name: str = 'knowing'
  num_kinds: int = 1

  def tree(self, length):
    return self.shape

  def init(self, weights, context, longest, hidden=None):
    return ()

  def propose(self, weights, state, cache, context, length, purpose):
    known, on_branch = weights.draft
    place = context.length[:, None] + jnp.arange(self.shape.height)
    place = jnp.minimum(place, known.shape[1] - 1)
    right = jnp.take_along_axis(known, place, axis=1)
    depth = self.shape.depth[1:] - 1
    # What is not on the branch is wrong, each sibling in its own way.
    wrong = (right[:, depth] + 1 + self.shape.rank[1:]) % TARGET.vocab_size
    tokens = jnp.where(on_branch[1:], right[:, depth], wrong)
    count = jnp.full(context.length.shape, length, jnp.int32)
    return verifiers.Proposal(tokens, count, None), state, cache

  def observe(self, state, context, longest, features=None):
    zero = jnp.zeros_like(context.length)
    return state, drafters.Forecast(zero + longest, zero)


def knowing(texts, branch) -> drafters.Weights:
  """Weights of `Knowing`."""
  known = np.asarray([t + [0] * (40 - len(t)) for t in texts], np.int32)
  return drafters.Weights(fixtures.params(TARGET), (known, branch))
