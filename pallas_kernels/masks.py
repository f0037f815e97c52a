"""What a query may see: one mask type for every attention kernel.

Query i of a row stands at position `i + offset`. It sees key j when all of
these hold:

* `j < kv_length`
* causal:   `j <= i + offset`
* window w: `j > i + offset - w` and, without causal, `j < i + offset + w`
* segments: `q_segments[i] == kv_segments[j]`
* tree:     key j stands before the queries (`j < offset`), or it is the query
  `j - offset` and an ancestor of query i; query i stands at `offset` plus its
  depth, which is what windows count by
* tiles:    the tile of (i, j) is kept
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Which tiles of the score matrix are computed; hashable.

  Attributes:
    size: Queries and keys of a tile.
    kept: For each row of tiles the columns that are kept, ascending.
  """

  size: tuple[int, int]
  kept: tuple[tuple[int, ...], ...]

  @classmethod
  def of(cls, size: tuple[int, int], kept: np.ndarray) -> 'Tiles':
    """From a boolean matrix with an entry a tile."""
    return cls(size, tuple(tuple(np.flatnonzero(row).tolist()) for row in kept))

  def as_array(self, columns: int) -> np.ndarray:
    """The boolean matrix again, with `columns` columns."""
    array = np.zeros((len(self.kept), columns), bool)
    for row, kept in enumerate(self.kept):
      array[row, list(kept)] = True
    return array

  def padded(self, fill: int) -> np.ndarray:
    """The kept columns, [rows, n] int32, each row filled up with `fill`."""
    longest = max(1, max(map(len, self.kept)))
    array = np.full((len(self.kept), longest), fill, np.int32)
    for row, kept in enumerate(self.kept):
      array[row, : len(kept)] = kept
    return array

  def density(self, columns: int) -> float:
    """Share of the tiles that are kept."""
    return sum(map(len, self.kept)) / (len(self.kept) * columns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """The static part of a mask, and what else shapes the scores; hashable.

  Attributes:
    scale: Factor of the scores.
    causal: Whether later keys are hidden.
    window: How many positions back, itself included, a query sees.
    softcap: c bounds the scores as `c tanh(s / c)`.
    tiles: Tiles to compute; None computes all.
  """

  scale: float
  causal: bool = False
  window: int | None = None
  softcap: float | None = None
  tiles: Tiles | None = None


class Limits(NamedTuple):
  """The part of a mask that may differ from row to row."""

  offset: jax.Array  # [B] int32, position of the first query
  kv_length: jax.Array  # [B] int32, keys beyond it are padding
  q_segments: jax.Array | None  # [B, Sq] int32
  kv_segments: jax.Array | None  # [B, Sk] int32
  ancestors: jax.Array | None = None  # [B, Sq, Sq] bool, each its own ancestor


def between(
  rule: Rule,
  kv_length: jax.Array,
  first: jax.Array,
  last: jax.Array,
  keys: jax.Array,
) -> jax.Array:
  """Whether a query at a position `first .. last` sees each key, segments and
  tiles aside. The shapes broadcast; it may be called inside a kernel."""
  seen = keys < kv_length
  if rule.causal:
    seen &= keys <= last
  if rule.window is not None:
    seen &= keys > first - rule.window
    if not rule.causal:
      seen &= keys < last + rule.window
  return seen


def visible(
  rule: Rule,
  limits: Limits,
  queries: jax.Array,  # [n] int32, indices i
  keys: jax.Array,  # [m] int32, indices j
) -> jax.Array:
  """Which of the keys each of the queries sees, tiles aside: [B, n, m] bool."""
  i, j = queries[None, :, None], keys[None, None, :]
  offset, length = (x[:, None, None] for x in limits[:2])
  position, key_position = i + offset, j
  seen = jnp.broadcast_to(
    j < length, jnp.broadcast_shapes(position.shape, j.shape)
  )
  if limits.ancestors is not None:
    depth = limits.ancestors.sum(-1, dtype=jnp.int32) - 1
    position = offset + jnp.take(depth, queries, axis=1)[:, :, None]
    node = jnp.clip(j - offset, 0, depth.shape[1] - 1)
    in_tree = j >= offset
    at_node = jnp.take_along_axis(depth[:, None], node, axis=2)
    key_position = jnp.where(in_tree, offset + at_node, j)
    ancestors = jnp.take(limits.ancestors, queries, axis=1)
    ancestor = jnp.take_along_axis(ancestors, node, axis=2)
    seen &= ~in_tree | (ancestor & (j - offset < depth.shape[1]))
  # No node is deeper than its index, so this hides no key within the length.
  seen &= between(rule, length, position, position, key_position)
  if limits.q_segments is not None:
    of_query = jnp.take(limits.q_segments, queries, axis=1, mode='clip')
    of_key = jnp.take(limits.kv_segments, keys, axis=1, mode='clip')
    seen &= of_query[:, :, None] == of_key[:, None, :]
  return seen


def as_array(
  rule: Rule, limits: Limits, q_size: int, kv_size: int
) -> jax.Array:
  """The whole mask, [B, Sq, Sk] bool: the meaning of the others."""
  seen = visible(rule, limits, jnp.arange(q_size), jnp.arange(kv_size))
  if rule.tiles is None:
    return seen
  rows, columns = rule.tiles.size
  kept = rule.tiles.as_array(-(-kv_size // columns))
  kept = kept.repeat(rows, 0)[:q_size].repeat(columns, 1)[:, :kv_size]
  return seen & kept


def key_range(
  rule: Rule,
  limits: Limits,
  first: jax.Array,  # [] int32, first query of a tile
  size: int,  # queries of the tile
  kv_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Keys `low .. high - 1` hold all that a tile of queries sees, in any row."""
  low, high = keys_of(rule, *limits[:2], first, first + size - 1, kv_size)
  return low.min(), high.max()


def keys_of(
  rule: Rule,
  offset: jax.Array,
  kv_length: jax.Array,
  first: jax.Array,
  last: jax.Array,
  kv_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Keys `low .. high - 1` hold all that the queries `first .. last` see; there
  are none where `low >= high`. The shapes broadcast."""
  low, high = 0 * (first + offset), kv_length + 0 * last
  if rule.causal:
    high = jnp.minimum(high, last + offset + 1)
  if rule.window is not None:
    low = jnp.maximum(low, first + offset - rule.window + 1)
    if not rule.causal:
      high = jnp.minimum(high, last + offset + rule.window)
  return low, jnp.clip(high, 0, kv_size)


def queries_of(
  rule: Rule,
  offset: jax.Array,
  kv_length: jax.Array,
  first: jax.Array,
  last: jax.Array,
  q_size: int,
) -> tuple[jax.Array, jax.Array]:
  """Queries `low .. high - 1` hold all that see a key of `first .. last`; there
  are none where `low >= high`. The shapes broadcast."""
  last = jnp.minimum(last, kv_length - 1)
  low, high = 0 * (first + offset), q_size + 0 * (last + offset)
  if rule.causal:
    low = jnp.maximum(low, first - offset)
  if rule.window is not None:
    high = jnp.minimum(high, last - offset + rule.window)
    if not rule.causal:
      low = jnp.maximum(low, first - offset - rule.window + 1)
  return low, jnp.clip(jnp.where(first <= last, high, 0), 0, q_size)
