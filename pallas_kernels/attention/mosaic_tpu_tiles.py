"""Which tiles the TPU kernels of attention visit, and the scores of one.

             keys                     walk of the rows      walk of the columns
           +----+----+----+----+
  queries  | ## |    |    |    |      row 0: column 0       column 0: rows 0, 1
           +----+----+----+----+
           | ## | ## |    |    |      row 1: columns 0, 1   column 1: row 1
           +----+----+----+----+
           |    |    |    | ## |      row 2: column 3       column 2: none
           +----+----+----+----+
            the tiles of a mask                             column 3: row 2

The inner axis of a grid has one step for each tile of the longest line. The
lists are in scalar memory before a kernel starts, so the pipeline fetches the
listed tiles only; in the steps that a shorter line has left it names the tile
that is there already, which fetches nothing.
"""

from typing import NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from pallas_kernels import masks

_LANES = 128  # of a vector register
_SUBLANES = 16  # of a bfloat16 one; a float32 one has half as many


class Layout(NamedTuple):
  """How the scores of one head are cut; all of it is static."""

  rule: masks.Rule
  size: tuple[int, int]  # queries and keys of a tile
  count: tuple[int, int]  # rows and columns of tiles
  lengths: tuple[int, int]  # Sq and Sk
  segmented: bool


def layout(rule, q, k, v, limits, tile: tuple[int, int]) -> Layout:
  """Cuts the scores into tiles of at most `tile`, or those of the rule.

  Raises:
    NotImplementedError: The kernels do not take the dtypes or the tiles.
  """
  dtypes = {str(x.dtype) for x in (q, k, v)}
  if dtypes not in ({'float32'}, {'bfloat16'}):
    raise NotImplementedError(
      f'{", ".join(sorted(dtypes))}: the TPU kernels take float32 or bfloat16.'
    )
  lengths = q.shape[1], k.shape[1]
  if rule.tiles is None:
    size = (
      min(tile[0], _up(lengths[0], _LANES)),
      min(tile[1], _up(lengths[1], _LANES)),
    )
  else:
    size = rule.tiles.size
    if size[0] % _SUBLANES or size[1] % _LANES:
      raise NotImplementedError(
        f'tiles of {size[0]} x {size[1]}: those of a TPU are multiples of'
        f' {_SUBLANES} queries and {_LANES} keys.'
      )
  count = tuple(-(-s // n) for s, n in zip(lengths, size, strict=True))
  return Layout(rule, size, count, lengths, limits.q_segments is not None)


class Walk(NamedTuple):
  """The tiles of each line (a row or a column of tiles); static.

  Its numbers are in `scalars`: offset [B], kv_length [B], the first slot and
  the one after the last [B * lines], and the tile of each slot [lines * width].
  Without a list the tile of a slot is its number.
  """

  lines: int
  steps: int  # of the longest line
  width: int | None  # of a list, if there is one

  def at(self, scalars, b, line, step) -> tuple[jax.Array, jax.Array]:
    """The tile across `line` in `step`, and whether it is a new one."""
    _, _, first, stop, listed = scalars
    end = stop[b * self.lines + line]
    slot = first[b * self.lines + line] + step
    tile = jnp.maximum(jnp.minimum(slot, end - 1), 0)
    if self.width is not None:
      tile = listed[line * self.width + tile]
    return tile, slot < end


def walk_rows(cut: Layout, limits: masks.Limits):
  """The walk over the columns of each row of tiles, and its scalars."""
  return _walk(cut, limits, masks.keys_of, 0)


def walk_columns(cut: Layout, limits: masks.Limits):
  """The walk over the rows of each column of tiles, and its scalars."""
  return _walk(cut, limits, masks.queries_of, 1)


def _walk(cut: Layout, limits: masks.Limits, span_of, axis: int):
  rule, across = cut.rule, 1 - axis
  size, lines, length = cut.size[axis], cut.count[axis], cut.lengths[axis]
  step_size, steps = cut.size[across], cut.count[across]
  offset = limits.offset
  kv_length = jnp.minimum(limits.kv_length, cut.lengths[1])
  first = jnp.arange(lines) * size
  last = jnp.minimum(first + size, length) - 1
  low, high = span_of(
    rule,
    offset[:, None],
    kv_length[:, None],
    first,
    last,
    cut.lengths[across],
  )
  high = jnp.where(low < high, high, 0)
  first, stop = low // step_size, -(-high // step_size)  # [B, lines]
  if rule.window is not None:
    # So many positions that a line of tiles sees touch at most so many tiles.
    span = size + (rule.window - 1) * (1 if rule.causal else 2)
    steps = min(steps, (span - 2) // step_size + 2)
  if rule.tiles is None:
    walk, listed = Walk(lines, steps, None), jnp.zeros(1, jnp.int32)
  else:
    kept = rule.tiles.as_array(cut.count[1])
    kept = masks.Tiles.of(cut.size, kept.T if axis else kept)
    listed = jnp.asarray(kept.padded(cut.count[across]))  # [lines, width]
    slot = lambda tile: (listed < tile[..., None]).sum(-1)
    first, stop = slot(first), slot(stop)
    walk = Walk(lines, min(steps, listed.shape[1]), listed.shape[1])
    # A line without tiles has to name one all the same.
    listed = jnp.minimum(listed, cut.count[across] - 1).ravel()
  scalars = (offset, kv_length, first.ravel(), stop.ravel(), listed)
  return walk, tuple(x.astype(jnp.int32) for x in scalars)


def visible(cut: Layout, scalars, b, row, column, segments, transposed=False):
  """Which keys the queries of a tile see: [n, m], or [m, n] transposed.

  `segments` are those of the queries [1, n] and of the keys [1, m].
  """
  (n, m), axis = cut.size, int(transposed)
  shape = (m, n) if transposed else (n, m)
  query = row * n + lax.broadcasted_iota(jnp.int32, shape, axis)
  if cut.lengths[0] % n:
    # Those of the padding see no more than the last query does.
    query = jnp.minimum(query, cut.lengths[0] - 1)
  keys = column * m + lax.broadcasted_iota(jnp.int32, shape, 1 - axis)
  position = query + scalars[0][b]
  seen = masks.between(cut.rule, scalars[1][b], position, position, keys)
  if cut.segmented:
    of_query, of_key = (x[...].reshape(1, -1) for x in segments)
    if transposed:
      seen &= of_query == upright(of_key)
    else:
      seen &= upright(of_query) == of_key
  return seen


def without_unseen(cut: Layout, scalars, b, row, column, seen, x):
  """Keys or values [m, D] with zeros where no query of the tile looks.

  What an unseen key holds must not matter, and 0 times NaN is NaN.
  """
  n, m = cut.size
  if cut.segmented:
    used = upright(seen.astype(jnp.float32).max(0, keepdims=True)) > 0
  else:
    first = row * n
    last = jnp.minimum(first + n, cut.lengths[0]) - 1
    offset, length = scalars[0][b], scalars[1][b]
    keys = column * m + lax.broadcasted_iota(jnp.int32, (m, 1), 0)
    used = masks.between(cut.rule, length, first + offset, last + offset, keys)
  return jnp.where(used, x, 0)


def scores(rule: masks.Rule, seen, left, right) -> jax.Array:
  """Products of the rows of both, scaled and capped, -inf if not seen."""
  s = product(left, right, 1, 1) * rule.scale
  if rule.softcap is not None:
    s = rule.softcap * jnp.tanh(s / rule.softcap)
  return jnp.where(seen, s, -jnp.inf)


def product(left, right, left_axis: int, right_axis: int) -> jax.Array:
  """Sums over an axis of each matrix, in float32."""
  return lax.dot_general(
    left,
    right,
    (((left_axis,), (right_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def upright(row: jax.Array) -> jax.Array:
  """[1, n] -> [n, 1]."""
  return jnp.broadcast_to(row, (_LANES, row.shape[1])).T[:, :1]


def head_major(x: jax.Array, size: int, count: int) -> jax.Array:
  """[B, S, H, D] -> [B, H, count * size, D], padded with zeros."""
  padding = count * size - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
  return x.transpose(0, 2, 1, 3)


def lined(x: jax.Array, size: int, count: int, mode='constant') -> jax.Array:
  """[..., S] -> [..., count, 1, size]: one row of lanes for each tile."""
  padding = [(0, 0)] * (x.ndim - 1) + [(0, count * size - x.shape[-1])]
  return jnp.pad(x, padding, mode).reshape(*x.shape[:-1], count, 1, size)


def segments(cut: Layout, limits: masks.Limits) -> tuple[jax.Array, ...]:
  """Both segment ids in lines, or nothing."""
  if not cut.segmented:
    return ()
  pairs = zip((limits.q_segments, limits.kv_segments), cut.size, cut.count)
  # A query of the padding is of the segment of the last one; see `visible`.
  return tuple(
    lined(x.astype(jnp.int32), size, count, 'edge') for x, size, count in pairs
  )


def cost(cut: Layout, products: int, heads: int, *arrays) -> pl.CostEstimate:
  """What a kernel of so many products of matrices a tile costs, about."""
  tiles = cut.count[0] * cut.count[1]
  if cut.rule.tiles is not None:
    tiles = sum(map(len, cut.rule.tiles.kept))
  elif cut.rule.causal:
    tiles = -(-tiles // 2)
  area = arrays[0].shape[0] * heads * tiles * cut.size[0] * cut.size[1]
  return pl.CostEstimate(
    flops=2 * products * area * arrays[0].shape[-1],
    transcendentals=area,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
  )


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
