"""What the forward and the backward kernel of attention on a CPU share.

    64 keys, turned
    +-------------+
    | k' [D, 64]  |
    +-------------+
    x  [6, D] -> [6, 64]

A product of six rows and a tile of keys that was turned: for each of its D
lines, six numbers times as many vectors as stay in registers with their sums,
which are all four of AVX-512.

What a query sees is a span of keys and, where there are segments, those of its
own in it. A tile whose segments all lie before or after those of some queries
is skipped, so that packed texts cost what each of them costs alone.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_ir as ll
from pallas_kernels import masks

KEYS = 64  # of a tile
ROWS = 6  # queries at a time


class Sizes(NamedTuple):
  """The static part of the work."""

  q_size: int
  kv_size: int
  heads: int
  kv_heads: int
  width: int
  v_width: int
  scale: float  # of scores in units of log 2
  segments: bool  # whether there are any


class Limits(NamedTuple):
  """What queries see: arrays [B, ...], or in a kernel a row's addresses."""

  low: Any  # [Sq], the first key of a query
  high: Any  # [Sq], the one after the last
  of_queries: Any = None  # [Sq], segments, as those that follow
  of_keys: Any = None  # [tiles, KEYS]
  least: Any = None  # [tiles]
  most: Any = None  # [tiles]


class Head(NamedTuple):
  """A head of queries: its row, its number in it, and that of its keys."""

  row: Any
  head: Any
  kv_head: Any
  line: Any  # the head, counted over all rows


def head_of(builder, z: Sizes, line) -> Head:
  """The head with a number over all rows."""
  row = builder.sdiv(line, ll.number(z.heads))
  head = builder.srem(line, ll.number(z.heads))
  kv_head = builder.sdiv(head, ll.number(z.heads // z.kv_heads))
  return Head(row, head, kv_head, line)


def queries(builder, z: Sizes, mine: Head, base, width: int):
  """The address of query 0 in an array [B, Sq, H, width]."""
  index = ll.index(builder, mine.row, z.q_size * z.heads, mine.head)
  return ll.place(builder, base, builder.mul(index, ll.number(width)))


def keys(builder, z: Sizes, mine: Head, base, width: int):
  """The address of key 0 in an array [B, Sk, K, width]."""
  index = ll.index(builder, mine.row, z.kv_size * z.kv_heads, mine.kv_head)
  return ll.place(builder, base, builder.mul(index, ll.number(width)))


def sizes(
  rule: masks.Rule, limits: masks.Limits, q: jax.Array, v: jax.Array
) -> Sizes:
  """Of q [B, Sq, H, D] and v [B, Sk, K, Dv]."""
  scale = rule.scale / math.log(2)
  (_, q_size, heads, width), (_, kv_size, kv_heads, v_width) = q.shape, v.shape
  segments = limits.q_segments is not None
  return Sizes(
    q_size, kv_size, heads, kv_heads, width, v_width, scale, segments
  )


def bounds(
  rule: masks.Rule, limits: masks.Limits, z: Sizes, batch: int
) -> Limits:
  """What each query sees, in arrays [B, ...] of int32."""
  each = jnp.arange(z.q_size, dtype=jnp.int32)
  row = lambda x: x.astype(jnp.int32)[:, None]
  found = masks.keys_of(
    rule, row(limits.offset), row(limits.kv_length), each, each, z.kv_size
  )
  span = [jnp.broadcast_to(x, (batch, z.q_size)) for x in found]
  if not z.segments:
    return Limits(*span)
  of_queries, of_keys = (x.astype(jnp.int32) for x in limits[2:4])
  # The last tile is filled up with its last key.
  padding = (0, 0), (0, -z.kv_size % KEYS)
  of_keys = jnp.pad(of_keys, padding, mode='edge').reshape(batch, -1, KEYS)
  return Limits(*span, of_queries, of_keys, of_keys.min(-1), of_keys.max(-1))


def without_hidden(
  rule: masks.Rule, limits: masks.Limits, q_size: int, *arrays: jax.Array
) -> list[jax.Array]:
  """Keys and values [B, Sk, K, D], zero where no query sees them.

  Between the keys of a segment may stand others, which are read with a weight
  of zero; 0 times NaN is NaN.
  """
  if limits.q_segments is None:
    return list(arrays)
  keys = jnp.arange(arrays[0].shape[1])
  seen = _seen_keys(rule, limits, q_size, keys)
  return [jnp.where(seen[:, :, None, None], x, 0) for x in arrays]


def _seen_keys(rule, limits: masks.Limits, q_size: int, keys) -> jax.Array:
  """Which keys any query sees, [B, Sk]; those beyond the length do not count.

  Mostly the query at a key's own position sees it, and nothing is looked for.
  """
  own = keys - limits.offset[:, None]
  segments = jnp.take_along_axis(
    limits.q_segments, jnp.clip(own, 0, q_size - 1), axis=1
  )
  by_own = (own >= 0) & (own < q_size) & (segments == limits.kv_segments)
  by_own |= keys >= limits.kv_length[:, None]

  def look():
    queries, size = jnp.arange(q_size), len(keys)
    # Some keys at a time: a mask of all would grow with the square.
    some = jnp.arange(size + -size % KEYS).reshape(-1, KEYS)
    seen = lambda keys: masks.visible(rule, limits, queries, keys).any(1)
    found = jax.lax.map(seen, jnp.minimum(some, size - 1))
    return found.swapaxes(0, 1).reshape(len(by_own), -1)[:, :size]

  return jax.lax.cond(by_own.all(), lambda: by_own, look)


def limits_of(builder, z: Sizes, mine: Head, addresses: Sequence) -> Limits:
  """Those of the row of a head."""
  tiles = -(-z.kv_size // KEYS)
  widths = z.q_size, z.q_size, z.q_size, tiles * KEYS, tiles, tiles
  return Limits(
    *(
      ll.place(builder, base, builder.mul(mine.row, ll.number(width)), ll.i32)
      for base, width in zip(addresses, widths, strict=False)
    )
  )


def span_of(builder, limits: Limits, i) -> tuple:
  """The span of keys that query i sees."""
  return tuple(ll.load_index(builder, base, i) for base in limits[:2])


def within_tile(builder, z: Sizes, limits: Limits, queries, seen, tile):
  """What of a span of keys lies in a tile, if some queries may see it there.

  It is empty, and ends before it begins, where their segments all are before or
  after those of the tile.
  """
  begin, end = common(builder, seen, tile)
  if not z.segments:
    return begin, end
  last = builder.sub(queries[1], ll.number(1))
  first = ll.load_index(builder, limits.of_queries, queries[0])
  with ll.carry(builder, *queries, 1, (first, first)) as (i, found, keep):
    one = ll.load_index(builder, limits.of_queries, ll.least(builder, i, last))
    keep((ll.least(builder, found[0], one), ll.most(builder, found[1], one)))
  number = builder.sdiv(tile[0], ll.number(KEYS))
  least, most = (ll.load_index(builder, base, number) for base in limits[4:6])
  meet = builder.and_(
    builder.icmp_signed('<=', found[0], most),
    builder.icmp_signed('>=', found[1], least),
  )
  return begin, builder.select(meet, end, ll.number(0))


def joined(builder, spans: Sequence[tuple]) -> tuple:
  """The span from the first of their beginnings to the last of their ends."""
  low, high = spans[0]
  for begin, end in spans[1:]:
    low, high = ll.least(builder, low, begin), ll.most(builder, high, end)
  return low, high


def seen_by(builder, z: Sizes, limits: Limits, span) -> tuple:
  """The keys from the first to the last that any query of a span sees."""
  nowhere = ll.number(z.kv_size), ll.number(0)
  with ll.carry(builder, *span, 1, nowhere) as (i, seen, keep):
    keep(joined(builder, [seen, span_of(builder, limits, i)]))
  return tuple(seen)


def common(builder, a: tuple, b: tuple) -> tuple:
  """What two spans have in common; empty if it ends before it begins."""
  return ll.most(builder, a[0], b[0]), ll.least(builder, a[1], b[1])


def turn(builder, z: Sizes, lines, width: int, tile, turned) -> None:
  """Keys or values of a tile, [width, KEYS]; beyond the end the last one."""
  lanes = ll.lanes()
  with ll.count(builder, 0, KEYS, lanes) as j:
    places = []
    for n in range(lanes):
      key = builder.add(builder.add(tile, j), ll.number(n))
      key = ll.least(builder, key, ll.number(z.kv_size - 1))
      places.append(builder.mul(key, ll.number(z.kv_heads * width)))
    with ll.count(builder, 0, width, lanes) as d:
      block = [
        ll.load_vector(builder, ll.place(builder, lines, builder.add(place, d)))
        for place in places
      ]
      for n, vector in enumerate(ll.transposed(builder, block)):
        index = builder.mul(builder.add(d, ll.number(n)), ll.number(KEYS))
        index = builder.add(index, j)
        ll.store(builder, vector, ll.place(builder, turned, index))


def product(builder, x, width: int, turned) -> list[list]:
  """Six rows [6, width] times a turned tile: a list of vectors a row."""
  rows = [[] for _ in range(ROWS)]
  for part in ll.groups(KEYS // ll.lanes(), columns()):
    zeros = [ll.zeros()] * (len(part) * ROWS)
    with ll.carry(builder, 0, width, 1, zeros) as (d, sums, keep):
      index = builder.mul(d, ll.number(KEYS))
      numbers = [
        ll.place(builder, x, builder.add(d, ll.number(n * width)))
        for n in range(ROWS)
      ]
      line = vectors(builder, ll.place(builder, turned, index), part)
      keep(added(builder, numbers, line, sums))
    for row in rows:
      row += sums[: len(part)]
      sums = sums[len(part) :]
  return rows


def masked(
  builder,
  z: Sizes,
  limits: Limits,
  rows: list[list],
  seen: Sequence[tuple],
  tile: tuple,
  instead: float,
) -> list[list]:
  """What six queries see of a tile, and a number instead of the rest.

  Args:
    builder: Of the instructions.
    z: Sizes.
    limits: Of the row.
    rows: Vectors of each query.
    seen: For each its place in the row, and the span of keys that it sees.
    tile: The keys.
    instead: The number.
  """
  begin, end = tile
  whole = ll.constant(int(not z.segments), ll.i1)
  for _, (low, high) in seen:
    whole = builder.and_(whole, builder.icmp_signed('<=', low, begin))
    whole = builder.and_(whole, builder.icmp_signed('>=', high, end))
  hidden = ll.spread(builder, ll.constant(instead))
  wide = lambda x: ll.spread(builder, builder.trunc(x, ll.i32))
  places = [
    ll.ramp(builder, builder.add(begin, ll.number(n)))
    for n in range(0, KEYS, ll.lanes())
  ]

  def select():
    for row, (i, (low, high)) in zip(rows, seen, strict=True):
      low, high = wide(low), wide(high)
      if z.segments:
        own = wide(ll.load_index(builder, limits.of_queries, i))
      for n, (value, place) in enumerate(zip(row, places, strict=True)):
        inside = builder.and_(
          builder.icmp_signed('>=', place, low),
          builder.icmp_signed('<', place, high),
        )
        if z.segments:
          key = builder.add(begin, ll.number(n * ll.lanes()))
          others = ll.place(builder, limits.of_keys, key, ll.i32)
          others = ll.load_vector(builder, others, ll.i32)
          same = builder.icmp_signed('==', others, own)
          inside = builder.and_(inside, same)
        yield builder.select(inside, value, hidden)

  flat = [value for row in rows for value in row]
  flat = ll.either(builder, whole, flat, select)
  size = len(places)
  return [flat[i : i + size] for i in range(0, len(flat), size)]


def weighted(
  builder, z: Sizes, lines, width, part, seen, tile, weights, sums
) -> list:
  """Adds the lines of the keys that are seen, times weights, to six rows.

  Args:
    builder: Of the instructions.
    z: Sizes.
    lines: Address of the line of key 0, `width` numbers.
    width: Of a line.
    part: Which vectors of it.
    seen: A span of keys; no other line is read.
    tile: The first key of the tile.
    weights: [6, KEYS] of the tile.
    sums: What is added to, six times `part`.
  """
  with ll.carry(builder, *seen, 1, sums) as (j, sums, keep):
    line = ll.place(
      builder, lines, builder.mul(j, ll.number(z.kv_heads * width))
    )
    near = builder.sub(j, tile)
    numbers = [
      ll.place(builder, weights, builder.add(near, ll.number(n * KEYS)))
      for n in range(ROWS)
    ]
    keep(added(builder, numbers, vectors(builder, line, part), sums))
  return sums


def columns() -> int:
  """Vectors at a time, so that six rows of them are sums in registers."""
  return 4 if ll.registers() == 32 else 2


def vectors(builder, base, part: range) -> list:
  """Some of the vectors of a line."""
  return [
    ll.load_vector(builder, ll.place(builder, base, i * ll.lanes()))
    for i in part
  ]


def added(builder, places, line, sums) -> list:
  """The sums of rows, to which numbers times vectors are added."""
  new = []
  for n, place in enumerate(places):
    value = ll.spread(builder, ll.load(builder, place))
    for i, vector in enumerate(line):
      total = sums[n * len(line) + i]
      new.append(ll.apply(builder, 'fma', value, vector, total))
  return new
