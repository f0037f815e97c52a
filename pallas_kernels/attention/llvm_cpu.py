"""Flash attention on a CPU: tiles that stay in the first caches of a core.

    64 keys, turned              values of 64 keys
    +-------------+              +-----------+
    | k' [D, 64]  |              | v [64, Dv]|
    +-------------+              +-----------+
    q  [6, D] -> s [6, 64] -> p [6, 64] -> out [6, Dv]

A part of the work is a head of a row and 192 of its queries. For each tile of
keys, which it turns once so that a vector holds one number of sixteen keys, it
takes six queries at a time: their 6 x 64 scores are sums in 24 registers, and
so are 6 x 64 numbers of their outputs. What is kept from tile to tile are the
largest score m, the sum l and the output o of every query (arXiv 2205.14135,
algorithm 1), with scores in units of log 2:

    m' = max(m, max_j s_j)          p_j = 2^(s_j - m')
    l' = l 2^(m - m') + sum_j p_j
    o' = o 2^(m - m') + sum_j p_j v_j

Queries that see nothing of a tile skip it, values that none of the six sees are
not read, and only tiles at an edge are masked. The backward pass is beside it.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll
from pallas_kernels import masks
from pallas_kernels.attention import blockwise
from pallas_kernels.attention import llvm_cpu_backward
from pallas_kernels.attention import llvm_cpu_tiles as tiles

QUERIES = 192  # of a part
_WIDEST = 512


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
  check(rule, q, k, v)
  batch, q_size, heads, _ = q.shape
  sizes = tiles.sizes(rule, limits, q, v)
  bounds = tiles.bounds(rule, limits, sizes, batch)
  # A hidden key has the score -inf, whatever its product is.
  (v,) = tiles.without_hidden(rule, limits, q_size, v)
  shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  out, largest, total = llvm_cpu.call(
    _emit,
    sizes,
    (q, k, v, *(x for x in bounds if x is not None)),
    (
      shape(batch, q_size, heads, v.shape[3]),
      shape(batch, heads, q_size),
      shape(batch, heads, q_size),
    ),
    parts=batch * heads * _count(sizes),
  )
  lse = math.log(2) * (largest + jnp.log2(total))
  return out, jnp.where(total == 0, -jnp.inf, lse)


attention = blockwise.differentiable(forward, llvm_cpu_backward.backward)


def check(rule: masks.Rule, q, k, v) -> None:
  """Finds out whether the kernel takes arrays, by their shapes and dtypes.

  Raises:
    NotImplementedError: For numbers that are not float32, lists of tiles,
      soft-capped scores, widths that do not fill vectors, and where nothing can
      be compiled.
  """
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if {q.dtype, k.dtype, v.dtype} != {jnp.dtype(jnp.float32)}:
    raise NotImplementedError(
      f'queries are {q.dtype}, keys {k.dtype} and values {v.dtype}, not float32'
    )
  if rule.softcap is not None or rule.tiles is not None:
    raise NotImplementedError('scores are not soft-capped, nor tiles listed')
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

  q: Any  # [QUERIES, D], scaled
  largest: Any  # [QUERIES + lanes]: a vector begins at each
  total: Any  # [QUERIES, lanes], to be summed up at the end
  out: Any  # [QUERIES, Dv]


def _count(z: tiles.Sizes) -> int:
  """Parts of a head of a row."""
  return -(-z.q_size // QUERIES)


def _emit(builder, z: tiles.Sizes, pointers, part) -> None:
  """Some queries of one head of one row."""
  q, k, v, *limits, out, largest, total = pointers
  count = ll.number(_count(z))
  mine = tiles.head_of(builder, z, builder.sdiv(part, count))
  begin = builder.mul(builder.srem(part, count), ll.number(QUERIES))
  end = ll.least(
    builder, builder.add(begin, ll.number(QUERIES)), ll.number(z.q_size)
  )
  state = _State(
    ll.room(builder, QUERIES * z.width),
    ll.room(builder, QUERIES + ll.lanes()),
    ll.room(builder, QUERIES * ll.lanes()),
    ll.room(builder, QUERIES * z.v_width),
  )
  turned = ll.room(builder, z.width * tiles.KEYS)
  weights = ll.room(builder, tiles.ROWS * tiles.KEYS)
  numbers = ll.room(builder, 2 * ll.lanes())
  q = tiles.queries(builder, z, mine, q, z.width)
  k = tiles.keys(builder, z, mine, k, z.width)
  v = tiles.keys(builder, z, mine, v, z.v_width)
  out = tiles.queries(builder, z, mine, out, z.v_width)
  limits = tiles.limits_of(builder, z, mine, limits)
  _begin(builder, z, q, state, (begin, end))
  least, most = tiles.seen_by(builder, z, limits, (begin, end))
  least = builder.sub(least, builder.srem(least, ll.number(tiles.KEYS)))
  with ll.count(builder, least, most, tiles.KEYS) as tile:
    span = tile, builder.add(tile, ll.number(tiles.KEYS))
    tiles.turn(builder, z, k, z.width, tile, turned)
    with ll.count(builder, begin, end, tiles.ROWS) as some:
      # What fills up the last six is not written down.
      last = builder.sub(end, ll.number(1))
      six = [builder.add(some, ll.number(n)) for n in range(tiles.ROWS)]
      six = [ll.least(builder, i, last) for i in six]
      spans = [tiles.span_of(builder, limits, i) for i in six]
      few = some, builder.add(six[-1], ll.number(1))
      seen = tiles.within_tile(
        builder, z, limits, few, tiles.joined(builder, spans), span
      )
      own = _of(builder, z, state, builder.sub(some, begin))
      with builder.if_then(builder.icmp_signed('<', *seen)):
        scores = tiles.product(builder, own.q, z.width, turned)
        each = list(zip(six, spans, strict=True))
        scores = tiles.masked(builder, z, limits, scores, each, span, -math.inf)
        shrinks = _weigh(builder, scores, own, weights, numbers)
        _add_values(builder, z, v, seen, tile, own, weights, shrinks)
  with ll.count(builder, begin, end, 1) as i:
    own = _of(builder, z, state, builder.sub(i, begin))
    index = ll.index(builder, mine.line, z.q_size, i)
    at = [ll.place(builder, base, index) for base in (largest, total)]
    index = builder.mul(i, ll.number(z.heads * z.v_width))
    _finish(builder, z, own, *at, ll.place(builder, out, index))


def _begin(builder, z, q, state: _State, span) -> None:
  """The queries of a span, scaled, and the state before any key."""
  begin, end = span
  last = builder.sub(end, ll.number(1))
  scale = ll.spread(builder, ll.constant(z.scale))
  # What fills up the last six is not written down.
  size = builder.add(builder.sub(end, begin), ll.number(tiles.ROWS - 1))
  size = builder.sub(size, builder.srem(size, ll.number(tiles.ROWS)))
  with ll.count(builder, 0, size, 1) as i:
    own = _of(builder, z, state, i)
    line = ll.least(builder, builder.add(begin, i), last)
    line = builder.mul(line, ll.number(z.heads * z.width))
    with ll.count(builder, 0, z.width, ll.lanes()) as d:
      place = ll.place(builder, q, builder.add(line, d))
      value = builder.fmul(ll.load_vector(builder, place), scale)
      ll.store(builder, value, ll.place(builder, own.q, d))
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


def _weigh(builder, scores, own: _State, weights, numbers) -> list:
  """Writes weights of the scores, and counts them; what the old ones shrink by.

  `own` is of the first of the queries, and `numbers` is room for two vectors.
  """
  old = ll.load_vector(builder, own.largest)
  rows = []
  for row in scores:
    largest, *others = row
    for vector in others:
      largest = ll.larger(builder, vector, largest)
    rows.append(largest)
  rows += rows[-1:] * (8 - len(rows))
  largest = ll.larger(builder, ll.maxima(builder, rows), old)
  ll.store_where(builder, largest, own.largest, ll.first(tiles.ROWS))
  # A query that has seen nothing yet has -inf: its weights must be 0.
  hidden = ll.spread(builder, ll.constant(-math.inf))
  nothing = builder.fcmp_ordered('==', largest, hidden)
  largest = builder.select(nothing, ll.zeros(), largest)
  shrink = ll.exp2(builder, builder.fsub(old, largest))
  apart = ll.place(builder, numbers, ll.lanes())
  ll.store(builder, largest, numbers)
  ll.store(builder, shrink, apart)
  shrinks = []
  for n, row in enumerate(scores):
    largest, shrink = (
      ll.spread(builder, ll.load(builder, ll.place(builder, base, n)))
      for base in (numbers, apart)
    )
    at = ll.place(builder, own.total, n * ll.lanes())
    total = builder.fmul(ll.load_vector(builder, at), shrink)
    for i, vector in enumerate(row):
      weight = ll.exp2(builder, builder.fsub(vector, largest))
      total = builder.fadd(total, weight)
      place = ll.place(builder, weights, n * tiles.KEYS + i * ll.lanes())
      ll.store(builder, weight, place)
    ll.store(builder, total, at)
    shrinks.append(shrink)
  return shrinks


def _add_values(
  builder, z, v, seen, tile, own: _State, weights, shrinks
) -> None:
  """Adds the weighted values of the keys that any of the queries sees."""
  for part in ll.groups(z.v_width // ll.lanes(), tiles.columns()):
    places = [
      ll.place(builder, own.out, n * z.v_width + i * ll.lanes())
      for n in range(tiles.ROWS)
      for i in part
    ]
    old = [ll.load_vector(builder, place) for place in places]
    old = [builder.fmul(x, shrinks[n // len(part)]) for n, x in enumerate(old)]
    sums = tiles.weighted(
      builder, z, v, z.v_width, part, seen, tile, weights, old
    )
    for place, vector in zip(places, sums, strict=True):
      ll.store(builder, vector, place)


def _of(builder, z, state: _State, i) -> _State:
  """The state from query i of the part on."""
  at = lambda base, size: ll.place(
    builder, base, builder.mul(i, ll.number(size))
  )
  return _State(
    at(state.q, z.width),
    at(state.largest, 1),
    at(state.total, ll.lanes()),
    at(state.out, z.v_width),
  )
