"""Decode attention on a CPU: each query reads its slots once, nothing is moved.

    head h of row b   slots 0..63    64..127   128..191
                    +-------------+----------+----------+
      query 0       | s -> p, out |    ...   |  ...     |   unread
      query 1       | s -> p, out |    ...   |  ...  :  |
                    +-------------+----------+-------^--+
                                                     its last slot

A part of the work is one head of one row, or in a large batch the heads of a
row that share their keys. It goes over the slots in blocks that stay in the
first cache of a core, and in a block over its queries: sixteen scores become
one vector, the running maximum m and sum l grow with the block,

    p = 2^(s - m'),  l' = l 2^(m - m') + sum p,  out' = out 2^(m - m') + p v

with scores in units of log 2, and out is divided by l at the end. Blocks begin
at the same slots for every query and what a query does not see is skipped or
weighs 0, so **the bits of its result do not depend on how many other queries
there are**: text that is verified several tokens at a time meets the roundings
of text that is decoded one by one.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll
from pallas_kernels import masks

BLOCK = 64  # slots: 16 KB of keys and 16 KB of values in float32, width 64


class _Sizes(NamedTuple):
  """The static part of the work."""

  time: int
  heads: int
  kv_heads: int
  together: int  # heads of a part
  slots: int
  width: int
  v_width: int
  int8: bool
  tree: bool
  scale: float
  block: int


def attention(
  rule: masks.Rule,
  splits: int | None,
  q: jax.Array,  # [B, T, H, D]
  k: jax.Array,  # [B, K, S, D]
  v: jax.Array,  # [B, K, S, Dv]
  limits: masks.Limits,
  k_scales: jax.Array | None,  # [B, K, S] float32
  v_scales: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, H, Dv] and log-sum-exp [B, H, T]; see `api`.

  Raises:
    NotImplementedError: As `check` does.
  """
  check(rule, splits, q, k, v)
  batch, time, heads, width = q.shape
  kv_heads, slots, v_width = v.shape[1:]
  # Heads of the same keys read them once, if enough parts are left.
  group = heads // kv_heads
  together = group if batch * kv_heads >= 2 * llvm_cpu.parts() else 1
  sizes = _Sizes(
    *(time, heads, kv_heads, together, slots, width, v_width),
    int8=k_scales is not None,
    tree=limits.ancestors is not None,
    scale=rule.scale / math.log(2),
    block=BLOCK,
  )
  numbers = (limits.offset, *_bounds(rule, limits, time, slots))
  args = [q, k, v, *(x.astype(jnp.int32) for x in numbers)]
  if sizes.tree:
    args.append(_seen(rule, limits.ancestors))
  if sizes.int8:
    args += [x.astype(jnp.float32) for x in (k_scales, v_scales)]
  shape = jax.ShapeDtypeStruct
  statistic = shape((batch, heads, time), jnp.float32)
  out, largest, total = llvm_cpu.call(
    _emit,
    sizes,
    args,
    (shape((batch, time, heads, v_width), jnp.float32), statistic, statistic),
    parts=batch * heads // together,
  )
  lse = math.log(2) * (largest + jnp.log2(total))
  return out, jnp.where(total == 0, -jnp.inf, lse)


def check(rule: masks.Rule, splits: int | None, q, k, v) -> None:
  """Finds out whether the kernel takes arrays, by their shapes and dtypes.

  Raises:
    NotImplementedError: For queries that are not float32, soft-capped scores,
      several parts, sizes that do not fill vectors, and where nothing can be
      compiled.
  """
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  batch, time, _, width = q.shape
  slots, v_width = v.shape[2:]
  if (
    q.dtype != jnp.float32
    or k.dtype not in (jnp.float32, jnp.int8)
    or v.dtype != k.dtype
  ):
    raise NotImplementedError(
      f'queries are {q.dtype}, keys {k.dtype} and values {v.dtype}, not'
      ' float32, nor keys and values int8'
    )
  if rule.softcap is not None or splits not in (None, 1):
    raise NotImplementedError('scores are not soft-capped nor parts merged')
  if not (batch and time) or any(
    n % ll.lanes() or not n for n in (width, v_width, slots)
  ):
    raise NotImplementedError(
      f'{batch} times {time} queries of width {width} and {v_width} over'
      f' {slots} slots do not fill vectors'
    )


def _bounds(rule, limits, time: int, slots: int) -> tuple[jax.Array, jax.Array]:
  """Slots `low .. high - 1` hold all that query t sees, [B, T] int32 each."""
  place = limits.offset[:, None] + jnp.arange(time, dtype=jnp.int32)
  high = limits.kv_length[:, None]
  if limits.ancestors is None:
    high = jnp.minimum(high, place + 1)
  else:
    place = limits.offset[:, None] + _depth(limits.ancestors)
  high = jnp.broadcast_to(jnp.clip(high, 0, slots), place.shape)
  low = jnp.zeros_like(place)
  if rule.window is not None:
    low = jnp.maximum(low, place - rule.window + 1)
  return low, high


def _seen(rule, ancestors: jax.Array) -> jax.Array:
  """Which of the new tokens query t sees, [B, T, T] int8."""
  if rule.window is not None:
    depth = _depth(ancestors)
    ancestors &= depth[:, None, :] > depth[:, :, None] - rule.window
  return ancestors.astype(jnp.int8)


def _depth(ancestors: jax.Array) -> jax.Array:
  return ancestors.sum(-1, dtype=jnp.int32) - 1


class _Head(NamedTuple):
  """Addresses of a head of a row, at its slot 0."""

  k: Any
  v: Any
  k_scales: Any  # None for floats
  v_scales: Any


class _Query(NamedTuple):
  """Addresses of a query of a head."""

  q: Any  # [D]
  seen: Any  # [T] int8, None for a chain
  out: Any  # [Dv]
  largest: Any  # []
  total: Any  # []
  parts: Any  # [lanes], what is summed up to the total at the end


def _emit(builder, z: _Sizes, pointers, part) -> None:
  """Some heads of one row, `z.together` that read the same keys."""
  q, k, v, offset, low, high, *rest, out, largest, total = pointers
  seen = rest.pop(0) if z.tree else None
  scales = rest if z.int8 else (None, None)
  first = builder.mul(part, ll.number(z.together))  # head of the batch
  row = builder.sdiv(first, ll.number(z.heads))
  first = builder.srem(first, ll.number(z.heads))
  kv_head = builder.sdiv(first, ll.number(z.heads // z.kv_heads))
  kv_head = ll.index(builder, row, z.kv_heads, kv_head)
  start = ll.load_index(builder, offset, row)
  scores = ll.room(builder, z.block)
  queries = z.time * z.together
  sums = ll.room(builder, queries * ll.lanes())

  kind = ll.i8 if z.int8 else ll.f32
  at = lambda base, index, size, kind=ll.f32: ll.place(
    builder, base, builder.mul(index, ll.number(size)), kind
  )
  keys = _Head(
    at(k, kv_head, z.slots * z.width, kind),
    at(v, kv_head, z.slots * z.v_width, kind),
    *(base and at(base, kv_head, z.slots) for base in scales),
  )

  def query(i) -> _Query:
    t = builder.sdiv(i, ll.number(z.together))
    head = builder.add(first, builder.srem(i, ll.number(z.together)))
    among_all = ll.index(builder, row, z.time, t)
    line = ll.index(builder, among_all, z.heads, head)
    statistic = ll.index(builder, row, z.heads, head)
    statistic = ll.index(builder, statistic, z.time, t)
    return _Query(
      at(q, line, z.width),
      seen and at(seen, among_all, z.time, ll.i8),
      at(out, line, z.v_width),
      at(largest, statistic, 1),
      at(total, statistic, 1),
      at(sums, i, ll.lanes()),
    )

  def bounds(i):
    t = builder.sdiv(i, ll.number(z.together))
    among_all = ll.index(builder, row, z.time, t)
    return tuple(
      ll.load_index(builder, base, among_all) for base in (low, high)
    )

  nowhere = ll.number(z.slots), ll.number(0)
  with ll.carry(builder, 0, queries, 1, nowhere) as (i, (begin, end), keep):
    _begin(builder, z, query(i))
    least, most = bounds(i)
    keep((ll.least(builder, begin, least), ll.most(builder, end, most)))
  begin = builder.sub(begin, builder.srem(begin, ll.number(z.block)))
  with (
    ll.count(builder, begin, end, z.block) as block,
    ll.count(builder, 0, queries, 1) as i,
  ):
    least, most = bounds(i)
    least = ll.most(builder, least, block)
    after = builder.add(block, ll.number(z.block))
    most = ll.least(builder, most, after)
    with builder.if_then(builder.icmp_signed('<', least, most)):
      _read(builder, z, keys, query(i), (start, block, least, most), scores)
  with ll.count(builder, 0, queries, 1) as i:
    _finish(builder, z, query(i))


def _begin(builder, z, query) -> None:
  ll.store(builder, ll.constant(-math.inf), query.largest)
  ll.store(builder, ll.zeros(), query.parts)
  with ll.count(builder, 0, z.v_width, ll.lanes()) as i:
    ll.store(builder, ll.zeros(), ll.place(builder, query.out, i))


def _finish(builder, z, query) -> None:
  """Divides out by the sum of the weights, which it writes down too."""
  weight = ll.total(builder, ll.load_vector(builder, query.parts))
  ll.store(builder, weight, query.total)
  nothing = builder.fcmp_ordered('==', weight, ll.constant(0.0))
  weight = builder.select(nothing, ll.constant(1.0), weight)
  weight = ll.spread(builder, weight)
  with ll.count(builder, 0, z.v_width, ll.lanes()) as i:
    place = ll.place(builder, query.out, i)
    value = builder.fdiv(ll.load_vector(builder, place), weight)
    ll.store(builder, value, place)


def _read(builder, z, keys, query, where, scores) -> None:
  """What a query sees of a block of slots, added to its sums."""
  start, block, least, most = where
  # Whole vectors of slots, of which the ends may be unseen.
  first = builder.sub(least, builder.srem(least, ll.number(ll.lanes())))
  near = lambda slot: ll.place(builder, scores, builder.sub(slot, block))
  with ll.count(builder, first, most, ll.lanes()) as slot:
    found = _scores(builder, z, keys, query, (least, most), slot)
    ll.store(builder, found, near(slot))
  if z.tree:
    _hide(builder, z, query, start, (first, most), near)
  old, new = _maximum(builder, query, (first, most), near)
  shrink = ll.exp2(builder, builder.fsub(old, new))
  _weigh(builder, z, keys, query, (first, most), near, new, shrink)
  _add_values(builder, z, keys, query, (least, most), near, shrink)


def _hide(builder, z, query, start, span, near) -> None:
  """Scores of -inf for the new tokens that are no ancestors of the query."""
  first, most = span
  with ll.count(builder, 0, z.time, 1) as node:
    slot = builder.add(start, node)
    seen = ll.load(builder, ll.place(builder, query.seen, node, ll.i8), ll.i8)
    hidden = builder.icmp_signed('==', seen, ll.constant(0, ll.i8))
    inside = builder.and_(
      builder.icmp_signed('>=', slot, first),
      builder.icmp_signed('<', slot, most),
    )
    with builder.if_then(builder.and_(hidden, inside)):
      ll.store(builder, ll.constant(-math.inf), near(slot))


def _maximum(builder, query, span, near):
  """The largest score before and with this block, as vectors."""
  old = ll.load(builder, query.largest)
  begin = [ll.spread(builder, old)]
  steps = ll.carry(builder, *span, ll.lanes(), begin)
  with steps as (slot, (new,), keep):
    score = ll.load_vector(builder, near(slot))
    keep([ll.apply(builder, 'maxnum', new, score)])
  new = ll.apply(builder, 'vector.reduce.fmax', new)
  ll.store(builder, new, query.largest)
  # A query that has seen nothing yet has -inf: its weights must be 0.
  nothing = builder.fcmp_ordered('==', new, ll.constant(-math.inf))
  new = builder.select(nothing, ll.constant(0.0), new)
  return ll.spread(builder, old), ll.spread(builder, new)


def _weigh(builder, z, keys, query, span, near, largest, shrink) -> None:
  """Weights in place of the scores, and their sum."""
  total = builder.fmul(ll.load_vector(builder, query.parts), shrink)
  steps = ll.carry(builder, *span, ll.lanes(), [total])
  with steps as (slot, (total,), keep):
    score = ll.load_vector(builder, near(slot))
    weight = ll.exp2(builder, builder.fsub(score, largest))
    keep([builder.fadd(total, weight)])
    if z.int8:
      scale = ll.load_vector(builder, ll.place(builder, keys.v_scales, slot))
      weight = builder.fmul(weight, scale)
    ll.store(builder, weight, near(slot))
  ll.store(builder, total, query.parts)


def _add_values(builder, z, keys, query, span, near, shrink) -> None:
  """Adds the weighted values of the slots that are seen, and of no others."""
  places = [
    ll.place(builder, query.out, i) for i in range(0, z.v_width, ll.lanes())
  ]
  sums = [builder.fmul(ll.load_vector(builder, at), shrink) for at in places]
  # Two sums take turns, so that a product need not wait for the one before.
  others = [ll.zeros() for _ in sums]
  with ll.carry(builder, *span, 1, sums + others) as (slot, both, keep):
    sums, others = both[: len(places)], both[len(places) :]
    weight = ll.spread(builder, ll.load(builder, near(slot)))
    line = _line(builder, keys.v, slot, z.v_width, z.int8)
    keep(others)
    keep(
      ll.apply(builder, 'fma', weight, value, total)
      for value, total in zip(line, sums, strict=True)
    )
  for at, total, other in zip(places, sums, others, strict=True):
    ll.store(builder, builder.fadd(total, other), at)


def _scores(builder, z, keys, query, span, slot):
  """Scores of as many slots as a vector has lanes, -inf outside of the span."""
  least, most = span
  q = [
    ll.load_vector(builder, ll.place(builder, query.q, i))
    for i in range(0, z.width, ll.lanes())
  ]
  products = []
  for lane in range(ll.lanes()):
    index = builder.add(slot, ll.number(lane))
    product = ll.zeros()
    line = _line(builder, keys.k, index, z.width, z.int8)
    for mine, its in zip(q, line, strict=True):
      product = ll.apply(builder, 'fma', mine, its, product)
    products.append(product)
  score = ll.totals(builder, products)
  if z.int8:
    scale = ll.load_vector(builder, ll.place(builder, keys.k_scales, slot))
    score = builder.fmul(score, scale)
  score = builder.fmul(score, ll.spread(builder, ll.constant(z.scale)))
  slots = ll.ramp(builder, slot)
  edge = lambda x: ll.spread(builder, builder.trunc(x, ll.i32))
  seen = builder.and_(
    builder.icmp_signed('>=', slots, edge(least)),
    builder.icmp_signed('<', slots, edge(most)),
  )
  hidden = ll.spread(builder, ll.constant(-math.inf))
  return builder.select(seen, score, hidden)


def _line(builder, base, slot, width: int, int8: bool) -> list:
  """The vectors of a slot, as float32."""
  start = builder.mul(slot, ll.number(width))
  indices = [
    builder.add(start, ll.number(i)) for i in range(0, width, ll.lanes())
  ]
  if not int8:
    return [
      ll.load_vector(builder, ll.place(builder, base, i)) for i in indices
    ]
  read = lambda i: ll.load_vector(
    builder, ll.place(builder, base, i, ll.i8), ll.i8
  )
  return [builder.sitofp(read(i), ll.vector_of()) for i in indices]
