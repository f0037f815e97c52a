"""Trees of draft tokens that grow where the draft is sure (EAGLE-2).

    worth(node) = product of q(token | the path before it) along the path

The draft's own q is a good guess of the chance that a token is accepted, so
worth is that of the whole path. A tree grows level by level (arXiv 2406.16858):

    expand   of each level the nodes with the most worth, and of each of them
             the tokens with the most q
    keep     of all those candidates the nodes with the most worth

Worth never rises along a path and parents win ties, so what is kept is a tree.
It differs by row and by round; how many nodes it has does not. `Growth` is what
is known before anything is compiled, a `Forest` the trees that came of it.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
  """How trees grow; hashable.

  Attributes:
    nodes: Draft tokens that are kept, the root not among them.
    expand: How many nodes of each level are expanded, and into how many tokens
      each.
    height: Levels, and the most tokens that a round may accept.
  """

  nodes: int
  expand: int
  height: int

  def __post_init__(self):
    if self.expand < 1 or not 1 <= self.height <= self.nodes:
      raise ValueError(
        'expand must be >= 1 and height in 1..nodes, got expand'
        f' {self.expand}, height {self.height} and nodes {self.nodes}.'
      )
    candidates = self.expand + (self.height - 1) * self.expand**2
    if self.nodes > candidates:
      raise ValueError(
        f'nodes must be <= {candidates}, the candidates of expand'
        f' {self.expand} and height {self.height}, got {self.nodes}.'
      )

  def __len__(self) -> int:
    return self.nodes + 1

  @property
  def expanded(self) -> int:
    """Nodes that the draft reads: those of all levels but the last."""
    return self.expand * (self.height - 1)

  @property
  def is_chain(self) -> bool:
    """Never known beforehand."""
    return False


@dataclasses.dataclass(frozen=True, eq=False)
class Forest:
  """A tree of N nodes for each row; the arrays of a `TokenTree` with a batch.

  Attributes:
    parents: [B, N] int32, the parent of each node, which stands before it; -1
      of node 0, the root.
    height: No node is deeper.
  """

  parents: jax.Array
  height: int

  @property
  def is_chain(self) -> bool:
    """Never known beforehand."""
    return False

  @functools.cached_property
  def ancestors(self) -> jax.Array:
    """Whether node j is node i or an ancestor of it: [B, N, N] bool."""
    batch, nodes = self.parents.shape
    above = jnp.maximum(self.parents, 0)
    own = jnp.eye(nodes, dtype=bool)
    found = jnp.broadcast_to(own, (batch, nodes, nodes))
    for _ in range(self.height):
      found = own | _take(found, above)
    return found

  @functools.cached_property
  def depth(self) -> jax.Array:
    """Steps from the root to each node: [B, N] int32."""
    return self.ancestors.sum(-1, dtype=jnp.int32) - 1

  def at_parents(self, values: jax.Array) -> jax.Array:
    """Values [B, N, ...] at the parent of each draft token: [B, N - 1, ...]."""
    return _take(values, self.parents[:, 1:])

  def has_children(self, node: jax.Array) -> jax.Array:
    """Whether node `node[b]` of row b has children: [B] bool."""
    return jnp.any(self.parents == node[:, None], axis=1)

  def path_to(self, node: jax.Array) -> jax.Array:
    """The way from the root to node `node[b]`: [B, height + 1] int32.

    Beyond the node it goes on to the first child, and stays there.
    """
    on_it = _take(self.ancestors, node[:, None])[:, 0]
    on_it |= self.parents == node[:, None]
    levels = jnp.arange(self.height + 1)[:, None]
    first = jnp.argmax(on_it[:, None] & (self.depth[:, None] == levels), axis=2)
    return lax.cummax(first.astype(jnp.int32), axis=1)


class Level(NamedTuple):
  """Candidates of one depth."""

  tokens: jax.Array  # [B, m] int32
  worth: jax.Array  # [B, m] float32, the logarithm
  parents: jax.Array  # [B, m] int32, among the candidates of all levels


def grow(
  growth: Growth,
  root: jax.Array,  # [B, 1, D]
  guess: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]],
  feed: Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]],
  carry: Any,
) -> tuple[jax.Array, jax.Array, Any]:
  """The trees that a draft grows after the text.

  Args:
    growth: How.
    root: The draft's state after the text.
    guess: `guess(states [B, n, D], k)` gives the k best next tokens after each
      state [B, n, k] and their log-probabilities, best first.
    feed: `feed(tokens [B, n], before [B, n, D], ancestors [B, n, n], carry)`
      gives the states [B, n, D] after nodes whose parents have the states
      `before`, and what to carry on. Nodes of earlier levels are fed again with
      each level: then the new ones see, of all that stands behind the text,
      their ancestors alone.
    carry: What the first call is given.

  Returns:
    Tokens [B, nodes] int32, parents [B, nodes + 1] int32 in the notation of
    `Forest`, and what the last call carried on.
  """
  batch, k = root.shape[0], growth.expand

  def children(states, worth, nodes) -> Level:
    """Of nodes [B, n] with these states [B, n, D] and this worth."""
    tokens, gains = guess(states, k)
    worth, nodes = worth[..., None] + gains, nodes[..., None]
    of_all = lambda x: jnp.broadcast_to(x, tokens.shape).reshape(batch, -1)
    return Level(*map(of_all, (tokens, worth, nodes)))

  zero = jnp.zeros((batch, 1), jnp.int32)
  levels = [Level(zero, zero.astype(jnp.float32), zero - 1)]
  levels.append(children(root, levels[0].worth, zero))
  # Of the nodes that are fed; their parents are counted with the root.
  tokens, before, parents = [], [], [zero - 1]
  states = root
  for depth in range(1, growth.height):
    worth, best = lax.top_k(levels[-1].worth, k)
    above = best // k  # which of the nodes that were expanded last
    tokens.append(_take(levels[-1].tokens, best))
    before.append(_take(states, above))
    parents.append(above + _size(parents[:-1]))
    seen = Forest(jnp.concatenate(parents, axis=1), depth).ancestors[:, 1:, 1:]
    states, carry = feed(
      jnp.concatenate(tokens, axis=1),
      jnp.concatenate(before, axis=1),
      seen,
      carry,
    )
    states = states[:, -k:]
    nodes = best + _size([level.tokens for level in levels[:-1]])
    levels.append(children(states, worth, nodes))
  candidates = Level(*(jnp.concatenate(x, axis=1) for x in zip(*levels)))
  tokens, parents = _keep(candidates, growth.nodes)
  return tokens, parents, carry


def _keep(candidates: Level, nodes: int) -> tuple[jax.Array, jax.Array]:
  """The root and the best `nodes` candidates: tokens and parents of `grow`."""
  # Of equals the first, and parents stand before their children.
  _, kept = lax.top_k(candidates.worth, nodes + 1)
  kept = jnp.sort(kept, axis=1)
  above = _take(candidates.parents, kept)
  place = jnp.sum(kept[:, None] < above[..., None], axis=2, dtype=jnp.int32)
  parents = jnp.where(above < 0, -1, place)
  return _take(candidates.tokens, kept[:, 1:]), parents


def _size(parts: list[jax.Array]) -> int:
  return sum(part.shape[1] for part in parts)


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
  """Row by row: [B, N, ...], [B, n] -> [B, n, ...]."""
  return jax.vmap(lambda row, at: row[at])(values, index)
