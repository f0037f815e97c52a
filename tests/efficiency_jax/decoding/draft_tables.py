"""Drafts that are tables of probabilities, and the trees that suit them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import draft_trees
from efficiency_jax.decoding import dynamic_tree


def best_paths(growth, chance):
  """The paths that are kept, best first; `chance(path)` [V] is q after it."""
  worth, level = {(): 1.0}, [()]
  candidates = {(): 1.0}
  for _ in range(growth.height):
    born = {}
    for path in level:
      q = chance(path)
      for token in np.argsort(-q, kind='stable')[: growth.expand]:
        born[*path, int(token)] = worth[path] * q[token]
    worth |= born
    candidates |= born
    # Sorting is stable: of equals the first.
    level = sorted(born, key=lambda path: -born[path])[: growth.expand]
  kept = sorted(candidates, key=lambda path: -candidates[path])
  return kept[: growth.nodes + 1]


def paths(tokens, parents):
  """The path to each node of one row."""
  paths = [()]
  for token, parent in zip(tokens, parents[1:], strict=True):
    paths.append((*paths[parent], int(token)))
  return paths


class Table:
  """A draft with the law `q[path]`, whose state is the path itself."""

  def __init__(self, q, vocab, height):
    self.q, self.vocab, self.height = q, vocab, height
    self.fed = []

  def row(self, row):
    """The law of a row."""
    return lambda path: self.q[row][path]

  def guess(self, states, most):
    """As `dynamic_tree.grow` asks for it."""
    shape = (*states.shape[:2], self.vocab)
    kind = jax.ShapeDtypeStruct(shape, jnp.float32)
    gains = jax.pure_callback(self._gains, kind, states)
    gains, best = jax.lax.top_k(gains, most)
    return best, gains

  def _gains(self, states):
    gains = [
      [self.q[row][self._path(state)] for state in some]
      for row, some in enumerate(np.asarray(states))
    ]
    return np.log(gains).astype(np.float32)

  def feed(self, tokens, before, ancestors, carry):
    """Likewise; `carry` counts the calls."""
    self.fed.append(tokens.shape[1])
    kind = jax.ShapeDtypeStruct(before.shape, before.dtype)
    states = jax.pure_callback(self._after, kind, tokens, before, ancestors)
    return states, carry + 1

  def _after(self, tokens, before, ancestors):
    tokens, before, ancestors = map(np.asarray, (tokens, before, ancestors))
    ancestors = np.broadcast_to(ancestors, (*tokens.shape, tokens.shape[1]))
    states = before.copy()
    for row, node in np.ndindex(tokens.shape):
      path = self._path(before[row, node])
      # The path once more, of what the node sees: parents come first.
      seen = tokens[row][ancestors[row, node]].tolist()
      assert [*path, tokens[row, node]] == seen
      states[row, node, len(path)] = tokens[row, node]
    return states

  def _path(self, state):
    return tuple(int(x) for x in state if x >= 0)

  def grow(self, growth):
    """What a growth makes of it."""
    return self._run(dynamic_tree.grow, growth)

  def fill(self, tree):
    """What a tree makes of it."""
    return self._run(draft_trees.fill, tree)

  def _run(self, make, shape):
    root = np.full((len(self.q), 1, self.height), -1, np.int32)
    made = jax.jit(lambda root: make(shape, root, self.guess, self.feed, 0))
    return jax.tree.map(np.asarray, made(root))


def random_table(vocab, height, batch):
  """A law for each row, over all paths below a height."""
  rng = np.random.default_rng(0)
  paths = [
    path
    for size in range(height)
    for path in itertools.product(range(vocab), repeat=size)
  ]
  draw = lambda: {path: rng.dirichlet(np.full(vocab, 0.5)) for path in paths}
  return Table([draw() for _ in range(batch)], vocab, height)
