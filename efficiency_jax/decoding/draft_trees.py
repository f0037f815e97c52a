"""Trees filled by a draft that knows what its guesses follow.

The draft guesses the tokens after the text, reads some of them, guesses what
follows each of those, and so on: one pass a level. A `TokenTree` says which
guesses have a place before there are any, a `Growth` takes those that the draft
is surest of. Nothing is sampled, so either draft is deterministic.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import dynamic_tree
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding.dynamic_tree import Growth
from efficiency_jax.decoding.token_tree import TokenTree
from efficiency_jax.decoding.verifiers import Proposal
from efficiency_jax.types import Cache

# Known before anything is compiled.
Shape = TokenTree | Growth

# See `dynamic_tree.grow`.
Guess = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
Feed = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def check(shapes: Sequence[Shape], size: int | None = None) -> None:
  """Raises a ValueError if a drafter cannot have these shapes.

  A length must name one of them, and no node may have more children than there
  are tokens that may be drafted, `size` if that is known.
  """
  sizes = [len(shape) for shape in shapes]
  if len(set(sizes)) < len(sizes):
    raise ValueError(f'trees must differ in size, got sizes {sizes}.')
  widest = max(map(_children, shapes), default=0)
  if size is not None and widest > size:
    raise ValueError(
      f'nodes must have at most {size} children, the tokens that may be'
      f' drafted, got a tree with {widest}.'
    )


def _children(shape: Shape) -> int:
  """The most that a node of it may have."""
  return shape.expand if isinstance(shape, Growth) else shape.rank.max() + 1


def of_length(shapes: Sequence[Shape], length: int) -> Shape:
  """The shape of `length` draft tokens among those given, or a chain."""
  fitting = [shape for shape in shapes if len(shape) == length + 1]
  return fitting[0] if fitting else token_tree.chain(length)


def room(shapes: Sequence[Shape], longest: int) -> int:
  """The most draft tokens that are read at once behind the text.

  `longest` is the length of the longest draft; what grows may read more tokens
  than it keeps.
  """
  grown = [shape.expanded for shape in shapes if isinstance(shape, Growth)]
  return max([longest, *grown])


def propose(
  shape: Shape,
  root: jax.Array,  # [B, 1, D]
  guess: Guess,
  feed: Feed,
  cache: Cache,
) -> tuple[Proposal, Cache]:
  """The draft's best guesses as a tree after the text.

  Args:
    shape: Of the tree.
    root: The draft's state after the text.
    guess: As for `dynamic_tree.grow`.
    feed: Likewise; what it carries on is the cache, which it is always given
      with the length of the text.
    cache: Of the draft, holding the text.

  Returns:
    The proposal, and the cache with its length as it was.
  """
  length, parents = cache.length, None

  def feed_behind_text(tokens, before, ancestors, cache):
    # All levels are fed again with each, in the place of those before.
    return feed(tokens, before, ancestors, cache._replace(length=length))

  if isinstance(shape, Growth):
    tokens, parents, cache = dynamic_tree.grow(
      shape, root, guess, feed_behind_text, cache
    )
  else:
    tokens, cache = fill(shape, root, guess, feed_behind_text, cache)
  count = jnp.full(length.shape, tokens.shape[1], jnp.int32)
  proposal = Proposal(tokens, count, None, parents)
  return proposal, cache._replace(length=length)


def fill(
  tree: TokenTree,
  root: jax.Array,  # [B, 1, D]
  guess: Guess,
  feed: Feed,
  carry: Any,
) -> tuple[jax.Array, Any]:
  """A draft's best guesses after each node of a tree, level by level.

  The child of rank r holds the r-th best token. Arguments are those of
  `dynamic_tree.grow`, but `feed` is given ancestors [n, n], one for all rows.

  Returns:
    Tokens [B, N - 1] int32 of the nodes but the root, and what the last call
    carried on. Nodes without children are not fed.
  """
  parents = np.asarray(tree.parents)
  tokens = jnp.zeros((root.shape[0], len(tree)), jnp.int32)
  # The nodes whose children come next, and their states.
  nodes, states = np.zeros(1, int), root
  fed, before = [], []
  for depth in range(1, tree.height + 1):
    born = np.flatnonzero(tree.depth == depth)
    above = np.searchsorted(nodes, parents[born])
    best, _ = guess(states, int(tree.rank[born].max()) + 1)
    tokens = tokens.at[:, born].set(best[:, above, tree.rank[born]])
    if depth < tree.height:
      inner = tree.is_inner[born]
      nodes = born[inner]
      fed.extend(nodes)
      before.append(states[:, above[inner]])
      states, carry = feed(
        tokens[:, np.asarray(fed)],
        jnp.concatenate(before, axis=1),
        jnp.asarray(tree.ancestors[np.ix_(fed, fed)]),
        carry,
      )
      states = states[:, -len(nodes) :]
  return tokens[:, 1:], carry
