"""Gradients of attention on a CPU: one pass over the tiles of keys.

                 24 queries, copied        for each tile of 64 keys:
                 +------+ +------+
                 | q    | | dout |         k', v'  turned once
                 +------+ +------+         dk, dv  stay in the second cache
    k' [D, 64] -> s, p     dp  <- v' [Dv, 64]
                   |        |
                   v        v
                   ds = p (dp - D)    dq += ds k    dk += ds' q    dv += p' dout

A part of the work is a head of a row and some of its queries. For every tile of
keys it makes the weights p = 2^(s - lse) again (arXiv 2205.14135, algorithm 4;
scores and lse in units of log 2), six queries at a time as the forward kernel
does. What its queries give to the gradients of keys and values is written apart
and added up at the end, over the parts and over the heads that share a key: no
two parts write to one place, and what is added in which order does not depend
on which thread takes which part.

    D = sum_d dout out - dlse
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll
from pallas_kernels.attention import llvm_cpu_tiles as tiles

_QUERIES = 24  # whose weights are kept, a multiple of six
_KEYS = 4  # whose gradients are sums in registers
# The queries of a head are cut where there are too few heads for all threads,
# but not into so short or so many shares that writing takes what they save.
_PARTS = 4  # for each of other work, so that threads end together
_LEAST, _MOST = 192, 8  # queries of a share, and shares


class _Static(NamedTuple):
  """The static part of the work."""

  z: tiles.Sizes
  batch: int
  shares: int  # of the queries of a head
  size: int  # queries of a share

  @property
  def lines(self) -> int:
    """Heads of all rows."""
    return self.batch * self.z.heads


def backward(rule, q, k, v, limits, out, lse, d_out, d_lse):
  """Gradients of q, k and v; `lse` and `d_lse` are [B, H, Sq].

  The order of sums depends on the number of cores. Memory beside the results
  is that of 1 to 8 gradients of keys and values for each head of queries.
  """
  z, batch = tiles.sizes(rule, limits, q, v), q.shape[0]
  # A query that sees nothing has weights of 2^-inf.
  lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse / math.log(2))
  blocks = -(-z.q_size // _QUERIES)
  wanted = -(-_PARTS * llvm_cpu.parts() // (batch * z.heads))
  shares = max(1, min(wanted, _MOST, z.q_size // _LEAST))
  size = -(-blocks // shares) * _QUERIES
  shares = -(-z.q_size // size)
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  of_keys = shares, batch, z.heads, z.kv_size
  static = _Static(z, batch, shares, size)
  bounds = tiles.bounds(rule, limits, z, batch)
  k, v = tiles.without_hidden(rule, limits, z.q_size, k, v)
  _, dq, dk, dv = llvm_cpu.call(
    _emit,
    static,
    (
      *(q, k, v, *(x for x in bounds if x is not None)),
      *(out, lse, d_out, d_lse),
    ),
    (
      shape(*lse.shape),
      shape(*q.shape),
      shape(*of_keys, z.width),
      shape(*of_keys, z.v_width),
    ),
    parts=batch * z.heads * shares,
  )
  return dq, *(
    llvm_cpu.call(
      _emit_sum,
      (static, x.shape[-1]),
      [x],
      shape(batch, z.kv_size, z.kv_heads, x.shape[-1]),
      parts=batch * z.kv_heads * -(-z.kv_size // tiles.KEYS),
    )
    for x in (dk, dv)
  )


class _Room(NamedTuple):
  """What is on the stack, of the queries or the keys at hand."""

  q: Any  # [24, D]
  d_out: Any  # [24, Dv]
  weights: Any  # [24, KEYS]
  d_scores: Any  # [24, KEYS]
  dq: Any  # [24, D], of one tile
  k: Any  # [D, KEYS], turned
  v: Any  # [Dv, KEYS], turned
  dk: Any  # [KEYS, D]
  dv: Any  # [KEYS, Dv]


class _Where(NamedTuple):
  """Addresses of a head of a row: its query 0, its key 0."""

  q: Any
  k: Any
  v: Any
  out: Any
  lse: Any
  d_out: Any
  d_lse: Any
  delta: Any  # D, which each part works out for its own queries
  dq: Any


def _emit(builder, static: _Static, pointers, part) -> None:
  """Some queries of one head of one row."""
  z = static.z
  q, k, v, *limits, out, lse, d_out, d_lse, delta, dq, dk, dv = pointers
  mine = tiles.head_of(builder, z, builder.srem(part, ll.number(static.lines)))
  # Of a causal mask the last ones see most keys; they come first, so that no
  # thread ends late.
  share = builder.sdiv(part, ll.number(static.lines))
  share = builder.sub(ll.number(static.shares - 1), share)
  begin = builder.mul(share, ll.number(static.size))
  end = ll.least(
    builder, builder.add(begin, ll.number(static.size)), ll.number(z.q_size)
  )
  at_queries = lambda base, width: tiles.queries(builder, z, mine, base, width)
  line = builder.mul(mine.line, ll.number(z.q_size))
  where = _Where(
    at_queries(q, z.width),
    tiles.keys(builder, z, mine, k, z.width),
    tiles.keys(builder, z, mine, v, z.v_width),
    at_queries(out, z.v_width),
    ll.place(builder, lse, line),
    at_queries(d_out, z.v_width),
    ll.place(builder, d_lse, line),
    ll.place(builder, delta, line),
    at_queries(dq, z.width),
  )
  room = _Room(
    *(ll.room(builder, _QUERIES * width) for width in (z.width, z.v_width)),
    *(ll.room(builder, _QUERIES * tiles.KEYS) for _ in range(2)),
    ll.room(builder, _QUERIES * z.width),
    *(ll.room(builder, tiles.KEYS * n) for n in (z.width, z.v_width) * 2),
  )
  scale = ll.constant(z.scale * math.log(2))
  limits = tiles.limits_of(builder, z, mine, limits)
  with ll.count(builder, begin, end, 1) as i:
    _begin(builder, z, where, i)
  queries = begin, end
  seen = tiles.seen_by(builder, z, limits, queries)
  line = ll.index(builder, share, static.lines, mine.line)
  line = builder.mul(line, ll.number(z.kv_size))
  with ll.count(builder, 0, z.kv_size, tiles.KEYS) as tile:
    span = tile, builder.add(tile, ll.number(tiles.KEYS))
    _copy(builder, None, room.dk, tiles.KEYS * z.width)
    _copy(builder, None, room.dv, tiles.KEYS * z.v_width)
    used = tiles.within_tile(builder, z, limits, queries, seen, span)
    with builder.if_then(builder.icmp_signed('<', *used)):
      tiles.turn(builder, z, where.k, z.width, tile, room.k)
      tiles.turn(builder, z, where.v, z.v_width, tile, room.v)
      with ll.count(builder, begin, end, _QUERIES) as some:
        after = ll.least(builder, builder.add(some, ll.number(_QUERIES)), end)
        block = some, after
        used = tiles.seen_by(builder, z, limits, block)
        used = tiles.within_tile(builder, z, limits, block, used, span)
        with builder.if_then(builder.icmp_signed('<', *used)):
          _tile(builder, z, where, room, block, span, used, limits)
    rows = builder.sub(ll.number(z.kv_size), tile)
    rows = ll.least(builder, rows, ll.number(tiles.KEYS))
    first = builder.add(line, tile)
    for of_room, of_all, width, times in (
      (room.dk, dk, z.width, scale),
      (room.dv, dv, z.v_width, None),
    ):
      of_all = _line(builder, of_all, first, width)
      size = builder.mul(rows, ll.number(width))
      _copy(builder, of_room, of_all, size, times)
  with ll.count(builder, begin, end, 1) as i:
    line = _line(builder, where.dq, i, z.heads * z.width)
    _copy(builder, line, line, z.width, scale)


def _begin(builder, z, where: _Where, i) -> None:
  """The D of a query, and zeros for its gradient."""
  line = _line(builder, where.dq, i, z.heads * z.width)
  _copy(builder, None, line, z.width)
  lines = [
    _line(builder, base, i, z.heads * z.v_width)
    for base in (where.out, where.d_out)
  ]
  steps = ll.carry(builder, 0, z.v_width, ll.lanes(), [ll.zeros()])
  with steps as (d, (total,), keep):
    a, b = (ll.load_vector(builder, ll.place(builder, x, d)) for x in lines)
    keep([ll.apply(builder, 'fma', a, b, total)])
  d_lse = ll.load(builder, ll.place(builder, where.d_lse, i))
  delta = builder.fsub(ll.total(builder, total), d_lse)
  ll.store(builder, delta, ll.place(builder, where.delta, i))


def _tile(builder, z, where, room, block, tile, seen, limits) -> None:
  """Adds what 24 queries and a tile of keys give to all three gradients."""
  some, after = block
  with ll.count(builder, 0, _QUERIES, 1) as n:
    i = builder.add(some, n)
    for base, to, width in (
      (where.q, room.q, z.width),
      (where.d_out, room.d_out, z.v_width),
    ):
      to = _line(builder, to, n, width)
      _copy(builder, None, to, width)
      with builder.if_then(builder.icmp_signed('<', i, after)):
        line = _line(builder, base, i, z.heads * width)
        _copy(builder, line, to, width)
  with ll.count(builder, 0, _QUERIES, tiles.ROWS) as six:
    _weigh(builder, z, where, room, (some, after, six), tile, limits)
  with ll.count(builder, 0, _QUERIES, tiles.ROWS) as six:
    _score(builder, z, where, room, (some, after, six))
  with ll.count(builder, 0, _QUERIES, tiles.ROWS) as six:
    weights = _line(builder, room.d_scores, six, tiles.KEYS)
    to = _line(builder, room.dq, six, z.width)
    for part in ll.groups(z.width // ll.lanes(), tiles.columns()):
      zeros = [ll.zeros()] * (len(part) * tiles.ROWS)
      sums = tiles.weighted(
        *(builder, z, where.k, z.width, part, seen, tile[0], weights, zeros)
      )
      for place, value in zip(
        _places(builder, to, z.width, tiles.ROWS, part), sums, strict=True
      ):
        ll.store(builder, value, place)
  with ll.count(builder, some, after, 1) as i:
    from_room = _line(builder, room.dq, builder.sub(i, some), z.width)
    to = _line(builder, where.dq, i, z.heads * z.width)
    with ll.count(builder, 0, z.width, ll.lanes()) as d:
      at = ll.place(builder, to, d)
      value = ll.load_vector(builder, ll.place(builder, from_room, d))
      value = builder.fadd(ll.load_vector(builder, at), value)
      ll.store(builder, value, at)
  _add(builder, room.d_scores, room.q, room.dk, z.width)
  _add(builder, room.weights, room.d_out, room.dv, z.v_width)


def _weigh(builder, z, where, room, block, tile, limits) -> None:
  """Writes the weights of six queries of a block."""
  some, after, six = block
  rows = tiles.product(
    builder, _line(builder, room.q, six, z.width), z.width, room.k
  )
  scale = ll.spread(builder, ll.constant(z.scale))
  seen = []
  for n, i in enumerate(_six(builder, some, six)):
    inside = builder.icmp_signed('<', i, after)
    i = ll.least(builder, i, builder.sub(after, ll.number(1)))
    low, high = tiles.span_of(builder, limits, i)
    # What fills up the block sees nothing.
    seen.append((i, (low, builder.select(inside, high, ll.number(0)))))
    lse = ll.spread(builder, ll.load(builder, ll.place(builder, where.lse, i)))
    lse = builder.fneg(lse)
    rows[n] = [
      ll.exp2(builder, ll.apply(builder, 'fma', value, scale, lse))
      for value in rows[n]
    ]
  rows = tiles.masked(builder, z, limits, rows, seen, tile, 0.0)
  _write(builder, rows, _line(builder, room.weights, six, tiles.KEYS))


def _score(builder, z, where, room, block) -> None:
  """Writes the gradients of the scores of six queries of a block."""
  some, after, six = block
  rows = tiles.product(
    builder, _line(builder, room.d_out, six, z.v_width), z.v_width, room.v
  )
  for n, i in enumerate(_six(builder, some, six)):
    i = ll.least(builder, i, builder.sub(after, ll.number(1)))
    delta = ll.load(builder, ll.place(builder, where.delta, i))
    delta = ll.spread(builder, delta)
    weights = _line(
      builder, room.weights, builder.add(six, ll.number(n)), tiles.KEYS
    )
    weights = tiles.vectors(builder, weights, range(len(rows[n])))
    for m, (weight, value) in enumerate(zip(weights, rows[n], strict=True)):
      value = builder.fmul(weight, builder.fsub(value, delta))
      # What hidden values hold, NaN included, does not matter.
      nothing = builder.fcmp_ordered('==', weight, ll.zeros())
      rows[n][m] = builder.select(nothing, ll.zeros(), value)
  _write(builder, rows, _line(builder, room.d_scores, six, tiles.KEYS))


def _add(builder, weights, lines, sums, width: int) -> None:
  """Adds weights' [24, KEYS] times lines [24, width] to sums [KEYS, width]."""
  with ll.count(builder, 0, tiles.KEYS, _KEYS) as key:
    for part in ll.groups(width // ll.lanes(), tiles.columns()):
      at = _line(builder, sums, key, width)
      places = _places(builder, at, width, _KEYS, part)
      old = [ll.load_vector(builder, place) for place in places]
      with ll.carry(builder, 0, _QUERIES, 1, old) as (i, totals, keep):
        first = ll.index(builder, i, tiles.KEYS, key)
        numbers = [
          ll.place(builder, weights, builder.add(first, ll.number(n)))
          for n in range(_KEYS)
        ]
        line = tiles.vectors(builder, _line(builder, lines, i, width), part)
        keep(tiles.added(builder, numbers, line, totals))
      for place, value in zip(places, totals, strict=True):
        ll.store(builder, value, place)


def _six(builder, some, six) -> list:
  first = builder.add(some, six)
  return [builder.add(first, ll.number(n)) for n in range(tiles.ROWS)]


def _line(builder, base, i, width: int):
  """The address of line i of `width` numbers."""
  return ll.place(builder, base, builder.mul(i, ll.number(width)))


def _places(builder, base, width: int, rows: int, part: range) -> list:
  """Addresses of some vectors of the first rows."""
  return [
    ll.place(builder, base, n * width + i * ll.lanes())
    for n in range(rows)
    for i in part
  ]


def _write(builder, rows: list[list], base) -> None:
  """Writes six rows of scores, one after another."""
  for n, row in enumerate(rows):
    for i, value in enumerate(row):
      place = ll.place(builder, base, n * tiles.KEYS + i * ll.lanes())
      ll.store(builder, value, place)


def _copy(builder, source, to, size, times=None) -> None:
  """Whole vectors of numbers, times a number; zeros if there is no source."""
  with ll.count(builder, 0, size, ll.lanes()) as i:
    value = ll.zeros()
    if source is not None:
      value = ll.load_vector(builder, ll.place(builder, source, i))
    if times is not None:
      value = builder.fmul(value, ll.spread(builder, times))
    ll.store(builder, value, ll.place(builder, to, i))


def _emit_sum(builder, static: tuple[_Static, int], pointers, part) -> None:
  """The gradients of some keys: [shares, B, H, Sk, D] -> [B, Sk, K, D].

  What the shares and the heads of a group gave is added in that order.
  """
  (z, batch, shares, _), width = static
  given, out = pointers
  count = ll.number(-(-z.kv_size // tiles.KEYS))
  groups = z.heads // z.kv_heads
  line = builder.sdiv(part, count)
  row = builder.sdiv(line, ll.number(z.kv_heads))
  kv_head = builder.srem(line, ll.number(z.kv_heads))
  begin = builder.mul(builder.srem(part, count), ll.number(tiles.KEYS))
  end = ll.least(
    builder, builder.add(begin, ll.number(tiles.KEYS)), ll.number(z.kv_size)
  )
  first = ll.index(
    builder, builder.mul(line, ll.number(groups)), z.kv_size, begin
  )
  given = _line(builder, given, first, width)
  first = ll.index(builder, row, z.kv_size, begin)
  first = ll.index(builder, first, z.kv_heads, kv_head)
  out = _line(builder, out, first, width)
  with ll.count(builder, 0, builder.sub(end, begin), 1) as key:
    given_key = _line(builder, given, key, width)
    to = _line(builder, out, key, z.kv_heads * width)
    with ll.count(builder, 0, width, ll.lanes()) as d:
      total = None
      for share in range(shares):
        for group in range(groups):
          apart = (share * batch * z.heads + group) * z.kv_size * width
          place = ll.place(builder, given_key, builder.add(d, ll.number(apart)))
          value = ll.load_vector(builder, place)
          total = value if total is None else builder.fadd(total, value)
      ll.store(builder, total, ll.place(builder, to, d))
