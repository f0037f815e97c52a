"""Flash attention on a CPU: tiles that stay in the first caches of a core.

    64 keys, turned              values of 64 keys
    +-------------+              +-----------+
    | k' [D, 64]  |              | v [64, Dv]|
    +-------------+              +-----------+
    q  [6, D] -> s [6, 64] -> p [6, 64] -> out [6, Dv]

A part of the work is a head of a row and 96 of its queries. For each tile of
keys, which it turns once so that a vector holds one number of sixteen keys, it
takes six queries at a time: their 6 x 64 scores are sums in 24 registers, and
so are 6 x 64 numbers of their outputs. What is kept from tile to tile are the
largest score m, the sum l and the output o of every query (arXiv 2205.14135,
algorithm 1):

    m' = max(m, max_j s_j)          p_j = exp(s_j - m')
    l' = l exp(m - m') + sum_j p_j
    o' = o exp(m - m') + sum_j p_j v_j

Queries that see nothing of a tile skip it, and values that none of the six sees
are not read. The backward pass is that of `blockwise`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll
from pallas_kernels import masks
from pallas_kernels.attention import blockwise

QUERIES, KEYS = 96, 64  # of a part, and of a tile
_ROWS = 6  # queries at a time
_WIDEST = 512


class _Sizes(NamedTuple):
  """The static part of the work."""

  q_size: int
  kv_size: int
  heads: int
  kv_heads: int
  width: int
  v_width: int
  scale: float

  @property
  def tiles(self) -> int:
    """Parts of a head of a row."""
    return -(-self.q_size // QUERIES)


def forward(
  rule: masks.Rule,
  q: jax.Array,  # [B, Sq, H, D]
  k: jax.Array,  # [B, Sk, K, D]
  v: jax.Array,  # [B, Sk, K, Dv]
  limits: masks.Limits,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, Sq, H, Dv] and log-sum-exp [B, H, Sq]; see `api`.

  Raises:
    NotImplementedError: As `check` does.
  """
  check(rule, q, k, v, limits)
  batch, q_size, heads, width = q.shape
  kv_size, kv_heads, v_width = v.shape[1:]
  sizes = _Sizes(
    *(q_size, kv_size, heads, kv_heads, width, v_width), scale=rule.scale
  )
  each = jnp.arange(q_size, dtype=jnp.int32)
  row = lambda x: x.astype(jnp.int32)[:, None]
  bounds = masks.keys_of(
    rule, row(limits.offset), row(limits.kv_length), each, each, kv_size
  )
  bounds = (jnp.broadcast_to(x, (batch, q_size)) for x in bounds)
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  out, largest, total = llvm_cpu.call(
    _emit,
    sizes,
    (q, k, v, *bounds),
    (
      shape(batch, q_size, heads, v_width),
      shape(batch, heads, q_size),
      shape(batch, heads, q_size),
    ),
    parts=batch * heads * sizes.tiles,
  )
  return out, jnp.where(total == 0, -jnp.inf, largest + jnp.log(total))


attention = blockwise.differentiable(forward)


def check(rule: masks.Rule, q, k, v, limits: masks.Limits) -> None:
  """Finds out whether the kernel takes arrays, by their shapes and dtypes.

  Raises:
    NotImplementedError: For numbers that are not float32, segments, lists of
      tiles, soft-capped scores, widths that do not fill vectors, and where
      nothing can be compiled.
  """
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if {q.dtype, k.dtype, v.dtype} != {jnp.dtype(jnp.float32)}:
    raise NotImplementedError(
      f'queries are {q.dtype}, keys {k.dtype} and values {v.dtype}, not float32'
    )
  if rule.softcap is not None or rule.tiles is not None:
    raise NotImplementedError('scores are not soft-capped, nor tiles listed')
  if limits.q_segments is not None:
    raise NotImplementedError('segments are not told apart')
  widths = q.shape[3], v.shape[3]
  if 0 in (*q.shape, *v.shape) or any(
    n % ll.lanes() or n > _WIDEST for n in widths
  ):
    raise NotImplementedError(
      f'queries {q.shape} and values {v.shape} are empty, or their widths no'
      f' multiples of {ll.lanes()} up to {_WIDEST}'
    )


class _State(NamedTuple):
  """What is kept of the queries of a part, on the stack."""

  largest: Any  # [QUERIES]
  total: Any  # [QUERIES, lanes], to be summed up at the end
  out: Any  # [QUERIES, Dv]


class _Part(NamedTuple):
  """A head of a row: which one, and addresses of its query, key and value 0."""

  row: Any
  line: Any  # the head, counted over all rows
  q: Any
  k: Any
  v: Any


def _emit(builder, z: _Sizes, pointers, part) -> None:
  """Some queries of one head of one row."""
  q, k, v, low, high, out, largest, total = pointers
  line = builder.sdiv(part, ll.number(z.tiles))
  row = builder.sdiv(line, ll.number(z.heads))
  head = builder.srem(line, ll.number(z.heads))
  kv_head = builder.sdiv(head, ll.number(z.heads // z.kv_heads))

  def first(base, size, heads, head, width):
    index = ll.index(builder, builder.mul(row, ll.number(size)), heads, head)
    return ll.place(builder, base, builder.mul(index, ll.number(width)))

  mine = _Part(
    row,
    line,
    first(q, z.q_size, z.heads, head, z.width),
    first(k, z.kv_size, z.kv_heads, kv_head, z.width),
    first(v, z.kv_size, z.kv_heads, kv_head, z.v_width),
  )
  begin = builder.mul(
    builder.srem(part, ll.number(z.tiles)), ll.number(QUERIES)
  )
  end = ll.least(
    builder, builder.add(begin, ll.number(QUERIES)), ll.number(z.q_size)
  )
  state = _State(
    ll.room(builder, QUERIES),
    ll.room(builder, QUERIES * ll.lanes()),
    ll.room(builder, QUERIES * z.v_width),
  )
  turned = ll.room(builder, z.width * KEYS)
  weights = ll.room(builder, _ROWS * KEYS)
  _begin(builder, z, state)

  def bounds(i):
    index = ll.index(builder, row, z.q_size, i)
    return tuple(ll.load_index(builder, base, index) for base in (low, high))

  nowhere = ll.number(z.kv_size), ll.number(0)
  with ll.carry(builder, begin, end, 1, nowhere) as (i, span, keep):
    keep(_joined(builder, span, bounds(i)))
  least, most = span
  least = builder.sub(least, builder.srem(least, ll.number(KEYS)))
  with ll.count(builder, least, most, KEYS) as tile:
    _turn(builder, z, mine, tile, turned)
    with ll.count(builder, begin, end, _ROWS) as some:
      last = builder.sub(end, ll.number(1))
      # What fills up the last six is not written down.
      queries = [
        ll.least(builder, builder.add(some, ll.number(n)), last)
        for n in range(_ROWS)
      ]
      spans = [bounds(i) for i in queries]
      span = tile, builder.add(tile, ll.number(KEYS))
      seen = spans[0]
      for one in spans[1:]:
        seen = _joined(builder, seen, one)
      seen = (
        ll.most(builder, seen[0], span[0]),
        ll.least(builder, seen[1], span[1]),
      )
      own = _of(builder, z, state, builder.sub(some, begin))
      with builder.if_then(builder.icmp_signed('<', *seen)):
        scores = _scores(builder, z, mine, queries, spans, tile, turned)
        shrinks = _weigh(builder, scores, own, weights)
        _add_values(builder, z, mine, seen, tile, own, weights, shrinks)
  with ll.count(builder, begin, end, 1) as i:
    own = _of(builder, z, state, builder.sub(i, begin))
    index = ll.index(builder, line, z.q_size, i)
    at = [ll.place(builder, base, index) for base in (largest, total)]
    index = ll.index(
      builder, ll.index(builder, row, z.q_size, i), z.heads, head
    )
    index = builder.mul(index, ll.number(z.v_width))
    _finish(builder, z, own, *at, ll.place(builder, out, index))


def _begin(builder, z, state: _State) -> None:
  with ll.count(builder, 0, QUERIES, 1) as i:
    own = _of(builder, z, state, i)
    ll.store(builder, ll.constant(-math.inf), own.largest)
    ll.store(builder, ll.zeros(), own.total)
    for n in range(0, z.v_width, ll.lanes()):
      ll.store(builder, ll.zeros(), ll.place(builder, own.out, n))


def _finish(builder, z, own: _State, largest, total, out) -> None:
  """Divides the output by the sum of the weights, and writes all down."""
  ll.store(builder, ll.load(builder, own.largest), largest)
  weight = ll.total(builder, ll.load_vector(builder, own.total))
  ll.store(builder, weight, total)
  nothing = builder.fcmp_ordered('==', weight, ll.constant(0.0))
  weight = builder.select(nothing, ll.constant(1.0), weight)
  weight = ll.spread(builder, weight)
  for n in range(0, z.v_width, ll.lanes()):
    value = ll.load_vector(builder, ll.place(builder, own.out, n))
    value = builder.fdiv(value, weight)
    ll.store(builder, value, ll.place(builder, out, n))


def _turn(builder, z, mine: _Part, tile, turned) -> None:
  """The keys of a tile, [D, KEYS]; those beyond the end are the last one."""
  lanes = ll.lanes()
  with ll.count(builder, 0, KEYS, lanes) as j:
    lines = []
    for n in range(lanes):
      key = builder.add(builder.add(tile, j), ll.number(n))
      key = ll.least(builder, key, ll.number(z.kv_size - 1))
      lines.append(builder.mul(key, ll.number(z.kv_heads * z.width)))
    with ll.count(builder, 0, z.width, lanes) as d:
      block = [
        ll.load_vector(builder, ll.place(builder, mine.k, builder.add(line, d)))
        for line in lines
      ]
      for n, vector in enumerate(ll.transposed(builder, block)):
        index = builder.mul(builder.add(d, ll.number(n)), ll.number(KEYS))
        ll.store(
          builder, vector, ll.place(builder, turned, builder.add(index, j))
        )


def _scores(builder, z, mine: _Part, queries, spans, tile, turned):
  """Scores of six queries and a tile of keys, -inf outside of their spans."""
  lines = [
    ll.place(builder, mine.q, builder.mul(i, ll.number(z.heads * z.width)))
    for i in queries
  ]
  rows = [[] for _ in queries]
  for part in ll.groups(KEYS // ll.lanes(), _columns()):
    zeros = [ll.zeros()] * (len(part) * len(queries))
    with ll.carry(builder, 0, z.width, 1, zeros) as (d, sums, keep):
      index = builder.mul(d, ll.number(KEYS))
      keys = _vectors(builder, ll.place(builder, turned, index), part)
      keep(
        _added(builder, [ll.place(builder, x, d) for x in lines], keys, sums)
      )
    for row in rows:
      row += sums[: len(part)]
      sums = sums[len(part) :]
  scale = ll.spread(builder, ll.constant(z.scale))
  hidden = ll.spread(builder, ll.constant(-math.inf))
  places = [
    ll.ramp(builder, builder.add(tile, ll.number(n)))
    for n in range(0, KEYS, ll.lanes())
  ]
  edge = lambda x: ll.spread(builder, builder.trunc(x, ll.i32))
  for row, (low, high) in zip(rows, spans, strict=True):
    low, high = edge(low), edge(high)
    for n, place in enumerate(places):
      seen = builder.and_(
        builder.icmp_signed('>=', place, low),
        builder.icmp_signed('<', place, high),
      )
      score = builder.fmul(row[n], scale)
      row[n] = builder.select(seen, score, hidden)
  return rows


def _weigh(builder, scores, own: _State, weights) -> list:
  """Writes weights of the scores, and counts them; what the old ones shrink by.

  `own` is of the first of the queries.
  """
  shrinks = []
  for n, row in enumerate(scores):
    at = ll.place(builder, own.largest, n)
    old = ll.load(builder, at)
    largest = row[0]
    for vector in row[1:]:
      largest = ll.apply(builder, 'maxnum', largest, vector)
    largest = ll.apply(builder, 'vector.reduce.fmax', largest)
    largest = ll.apply(builder, 'maxnum', old, largest)
    ll.store(builder, largest, at)
    # A query that has seen nothing yet has -inf: its weights must be 0.
    nothing = builder.fcmp_ordered('==', largest, ll.constant(-math.inf))
    largest = builder.select(nothing, ll.constant(0.0), largest)
    largest = ll.spread(builder, largest)
    shrink = builder.fsub(ll.spread(builder, old), largest)
    shrinks.append(ll.exp(builder, shrink))
    at = ll.place(builder, own.total, n * ll.lanes())
    total = builder.fmul(ll.load_vector(builder, at), shrinks[-1])
    for i, vector in enumerate(row):
      weight = ll.exp(builder, builder.fsub(vector, largest))
      total = builder.fadd(total, weight)
      place = ll.place(builder, weights, n * KEYS + i * ll.lanes())
      ll.store(builder, weight, place)
    ll.store(builder, total, at)
  return shrinks


def _add_values(
  builder, z, mine: _Part, seen, tile, own: _State, weights, shrinks
) -> None:
  """Adds the weighted values of the keys that any of the queries sees."""
  for part in ll.groups(z.v_width // ll.lanes(), _columns()):
    places = [
      ll.place(builder, own.out, n * z.v_width + i * ll.lanes())
      for n in range(_ROWS)
      for i in part
    ]
    old = [ll.load_vector(builder, place) for place in places]
    old = [builder.fmul(x, shrinks[n // len(part)]) for n, x in enumerate(old)]
    with ll.carry(builder, *seen, 1, old) as (j, sums, keep):
      line = builder.mul(j, ll.number(z.kv_heads * z.v_width))
      values = _vectors(builder, ll.place(builder, mine.v, line), part)
      near = builder.sub(j, tile)
      lines = [
        ll.place(builder, weights, builder.add(near, ll.number(n * KEYS)))
        for n in range(_ROWS)
      ]
      keep(_added(builder, lines, values, sums))
    for place, vector in zip(places, sums, strict=True):
      ll.store(builder, vector, place)


def _columns() -> int:
  """Vectors at a time, so that six rows of them are sums in registers."""
  return 4 if ll.registers() == 32 else 2


def _vectors(builder, base, part: range) -> list:
  return [
    ll.load_vector(builder, ll.place(builder, base, i * ll.lanes()))
    for i in part
  ]


def _added(builder, places, vectors, sums) -> list:
  """The sums of rows, to which numbers times vectors are added."""
  new = []
  for n, place in enumerate(places):
    value = ll.spread(builder, ll.load(builder, place))
    for i, vector in enumerate(vectors):
      total = sums[n * len(vectors) + i]
      new.append(ll.apply(builder, 'fma', value, vector, total))
  return new


def _joined(builder, a, b) -> tuple:
  """The span from the first of two spans' beginnings to the last of ends."""
  return ll.least(builder, a[0], b[0]), ll.most(builder, a[1], b[1])


def _of(builder, z, state: _State, i) -> _State:
  """The state from query i of the part on."""
  at = lambda base, size: ll.place(
    builder, base, builder.mul(i, ll.number(size))
  )
  return _State(
    at(state.largest, 1), at(state.total, ll.lanes()), at(state.out, z.v_width)
  )
