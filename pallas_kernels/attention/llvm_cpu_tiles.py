"""What the forward and the backward kernel of attention on a CPU share.

    64 keys, turned
    +-------------+
    | k' [D, 64]  |
    +-------------+
    x  [6, D] -> [6, 64]

A product of six rows and a tile of keys that was turned: for each of its D
lines, six numbers times as many vectors as stay in registers with their sums,
which are all four of AVX-512.
"""

from collections.abc import Callable, Sequence
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


def sizes(rule: masks.Rule, q: jax.Array, v: jax.Array) -> Sizes:
  """Of q [B, Sq, H, D] and v [B, Sk, K, Dv]."""
  scale = rule.scale / math.log(2)
  (_, q_size, heads, width), (_, kv_size, kv_heads, v_width) = q.shape, v.shape
  return Sizes(q_size, kv_size, heads, kv_heads, width, v_width, scale)


def bounds(
  rule: masks.Rule, limits: masks.Limits, z: Sizes, batch: int
) -> list[jax.Array]:
  """The first key that each query sees, and the one after the last, [B, Sq]."""
  each = jnp.arange(z.q_size, dtype=jnp.int32)
  row = lambda x: x.astype(jnp.int32)[:, None]
  found = masks.keys_of(
    rule, row(limits.offset), row(limits.kv_length), each, each, z.kv_size
  )
  return [jnp.broadcast_to(x, (batch, z.q_size)) for x in found]


def spans(builder, z: Sizes, mine: Head, low, high) -> Callable[[Any], tuple]:
  """Emits what is read of the bounds: the span of keys that query i sees."""

  def span_of(i):
    index = ll.index(builder, mine.row, z.q_size, i)
    return tuple(ll.load_index(builder, base, index) for base in (low, high))

  return span_of


def joined(builder, spans: Sequence[tuple]) -> tuple:
  """The span from the first of their beginnings to the last of their ends."""
  low, high = spans[0]
  for begin, end in spans[1:]:
    low, high = ll.least(builder, low, begin), ll.most(builder, high, end)
  return low, high


def seen_by(builder, z: Sizes, span, span_of) -> tuple:
  """The keys from the first to the last that any query of a span sees."""
  nowhere = ll.number(z.kv_size), ll.number(0)
  with ll.carry(builder, *span, 1, nowhere) as (i, seen, keep):
    keep(joined(builder, [seen, span_of(i)]))
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
  builder, rows: list[list], spans, tile: tuple, instead: float
) -> list[list]:
  """What is in its query's span of keys, and a number instead of the rest."""
  begin, end = tile
  whole = ll.constant(1, ll.i1)
  for low, high in spans:
    whole = builder.and_(whole, builder.icmp_signed('<=', low, begin))
    whole = builder.and_(whole, builder.icmp_signed('>=', high, end))
  hidden = ll.spread(builder, ll.constant(instead))
  edge = lambda x: ll.spread(builder, builder.trunc(x, ll.i32))
  places = [
    ll.ramp(builder, builder.add(begin, ll.number(n)))
    for n in range(0, KEYS, ll.lanes())
  ]

  def select():
    for row, (low, high) in zip(rows, spans, strict=True):
      low, high = edge(low), edge(high)
      for value, place in zip(row, places, strict=True):
        seen = builder.and_(
          builder.icmp_signed('>=', place, low),
          builder.icmp_signed('<', place, high),
        )
        yield builder.select(seen, value, hidden)

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
