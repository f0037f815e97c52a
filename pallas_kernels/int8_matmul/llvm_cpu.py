"""The int8 product of a few rows on a CPU with VNNI, one read of the weights.

VPDPBUSD multiplies four unsigned bytes with four signed ones and adds all to an
int32, sixteen times. For it the bytes of four rows of w are interleaved in
registers and made unsigned, w + 128; what that adds, 128 sum_k q, is taken off
the sums before they begin. int32 wraps around, so this is exact. The registers
hold the sums of six rows; where there are more, the first six leave the tile of
weights on the stack as it was interleaved: a tile is 64 bytes out of every row
of w, which a cache may not hold together.

Rows of floats are quantized by every part for itself: that is less work than to
wait for one another.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll
from pallas_kernels.int8_matmul import reference

MOST_ROWS = 16
# What a thread has on its stack: quantized rows, and a tile of weights.
_MOST_VALUES = 2**18
_MOST_INNER = 2**13
_ROWS = 6  # at a time: 24 registers of sums
_COLUMNS = 64  # of a tile
_DEPTH = 4  # numbers that one instruction multiplies


def int8_matmul(
  x: jax.Array,  # [M, K] float, or int8
  w: jax.Array,  # [K, N] int8
  w_scales: jax.Array,  # [N] float32
  x_scales: jax.Array | None = None,  # [M] float32, of int8 x
  *,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """(q @ w) s_x s_w, [M, N]; see `api`.

  Raises:
    NotImplementedError: For more than 16 rows, for sizes that do not fill
      tiles, and where there is no VNNI or nothing can be compiled.
  """
  rows, inner = x.shape
  columns = w.shape[1]
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if not ll.has('avx512vnni'):
    raise NotImplementedError('this processor has no AVX-512 VNNI')
  if not 1 <= rows <= MOST_ROWS or rows * inner > _MOST_VALUES:
    raise NotImplementedError(
      f'{rows} rows of {inner} are not 1 to {MOST_ROWS} rows of'
      f' {_MOST_VALUES} numbers together'
    )
  if rows > _ROWS and inner > _MOST_INNER:
    raise NotImplementedError(
      f'more than {_ROWS} rows of {inner} are longer than {_MOST_INNER}'
    )
  if not inner or inner % ll.lanes() or columns % _COLUMNS:
    raise NotImplementedError(
      f'[{inner}, {columns}] is not of multiples of {ll.lanes()} and {_COLUMNS}'
    )
  args = [x, w, w_scales.astype(jnp.float32)]
  if x_scales is None:
    args[0] = x.astype(jnp.float32)
  else:
    args += [x_scales, -128 * x.astype(jnp.int32).sum(-1)]
  parts = llvm_cpu.parts()
  return llvm_cpu.call(
    _emit,
    (rows, inner, columns, parts),
    args,
    jax.ShapeDtypeStruct((rows, columns), jnp.float32),
    parts=parts,
  ).astype(out_dtype)


def _emit(builder, static, pointers, part) -> None:
  """Tiles of 64 columns."""
  rows, inner, columns, parts = static
  *args, out = pointers
  x, w, w_scales, *given = args
  if given:
    x_scales, start = given
  else:
    x, x_scales, start = _quantized(builder, x, rows, inner)
  groups = ll.groups(rows, _ROWS)
  # Of a tile of w, in the order of `_interleaved`, for the groups to come.
  kept = ll.room(builder, inner * _COLUMNS, ll.i8) if groups[1:] else None
  first, last = ll.share(builder, part, parts, columns // _COLUMNS)
  with ll.count(builder, first, last, 1) as tile:
    column = builder.mul(tile, ll.number(_COLUMNS))
    for group in groups:
      sums = [
        _splat(builder, start, m, ll.i32) for m in group for _ in range(4)
      ]
      steps = ll.carry(builder, 0, inner, _DEPTH, sums)
      with steps as (k, carried, keep):
        again = group is not groups[0]
        weights = _weights(builder, w, kept, k, column, columns, again)
        new = []
        for n, m in enumerate(group):
          index = builder.add(k, ll.number(m * inner))
          place = ll.place(builder, x, index, ll.i8)
          values = ll.spread(builder, ll.load(builder, place, ll.i32))
          new += [
            ll.dot4(builder, carried[4 * n + i], weights[i], values)
            for i in range(4)
          ]
        keep(new)
      for n, m in enumerate(group):
        scale = _splat(builder, x_scales, m, ll.f32)
        for lane in range(4):
          vector = _lane_of_each(builder, carried[4 * n : 4 * n + 4], lane)
          here = builder.add(column, ll.number(16 * lane))
          other = ll.place(builder, w_scales, here)
          value = builder.fmul(builder.sitofp(vector, scale.type), scale)
          value = builder.fmul(value, ll.load_vector(builder, other))
          index = builder.add(here, ll.number(m * columns))
          ll.store(builder, value, ll.place(builder, out, index))


def _splat(builder, base, index: int, kind):
  """A vector of `base[index]`."""
  place = ll.place(builder, base, index, kind)
  return ll.spread(builder, ll.load(builder, place, kind))


def _quantized(builder, x, rows: int, inner: int):
  """int8 rows, their scales, and -128 times their sums; as `reference` does."""
  values = ll.room(builder, rows * inner, ll.i8)
  scales = ll.room(builder, rows)
  start = ll.room(builder, rows, ll.i32)
  lanes = ll.lanes()
  with ll.count(builder, 0, rows, 1) as m:
    line = builder.mul(m, ll.number(inner))
    largest = [ll.zeros()]
    steps = ll.carry(builder, 0, inner, lanes, largest)
    with steps as (k, largest, keep):
      place = ll.place(builder, x, builder.add(line, k))
      vector = ll.load_vector(builder, place)
      size = ll.apply(builder, 'fabs', vector)
      keep([ll.apply(builder, 'maximum', largest[0], size)])
    largest = ll.apply(builder, 'vector.reduce.fmaximum', largest[0])
    scale = builder.fmul(largest, ll.constant(1 / reference.LARGEST))
    tiny = builder.fcmp_ordered('<', scale, ll.constant(reference.SMALLEST))
    scale = builder.select(tiny, ll.constant(1.0), scale)
    ll.store(builder, scale, ll.place(builder, scales, m))
    inverse = builder.fdiv(ll.constant(1.0), scale)
    inverse = ll.spread(builder, inverse)
    steps = ll.carry(builder, 0, inner, lanes, [ll.zeros(ll.i32)])
    with steps as (k, sums, keep):
      index = builder.add(line, k)
      vector = ll.load_vector(builder, ll.place(builder, x, index))
      ratio = builder.fmul(vector, inverse)
      ratio = ll.apply(builder, 'roundeven', ratio)
      for name, bound in (('minnum', 127.0), ('maxnum', -127.0)):
        bound = ll.spread(builder, ll.constant(bound))
        ratio = ll.apply(builder, name, ratio, bound)
      whole = builder.fptosi(ratio, ll.vector_of(ll.i32))
      narrow = builder.trunc(whole, ll.vector_of(ll.i8))
      place = ll.place(builder, values, index, ll.i8)
      ll.store(builder, narrow, place)
      keep([builder.add(sums[0], whole)])
    total = ll.apply(builder, 'vector.reduce.add', sums[0])
    total = builder.mul(total, ll.constant(-128, ll.i32))
    ll.store(builder, total, ll.place(builder, start, m, ll.i32))
  return values, scales, start


def _weights(builder, w, kept, k, column, columns: int, again: bool):
  """Rows k .. k + 3 of a tile as `_interleaved`, read `again` where kept."""
  begin = kept and builder.mul(k, ll.number(_COLUMNS))
  places = kept and [
    ll.place(builder, kept, builder.add(begin, ll.number(64 * i)), ll.i8)
    for i in range(_DEPTH)
  ]
  if again:
    return [ll.load_bytes(builder, place) for place in places]
  line = builder.add(builder.mul(k, ll.number(columns)), column)
  weights = _interleaved(builder, w, line, columns)
  for weight, place in zip(weights, places or ()):
    ll.store(builder, weight, place)
  return weights


def _interleaved(builder, w, line, columns: int):
  """Four rows of 64 bytes as four vectors of unsigned groups of four.

  Group r of 128-bit lane l in vector i belongs to column 16 l + 4 i + r.
  """
  rows = [
    ll.load_bytes(
      builder,
      ll.place(builder, w, builder.add(line, ll.number(d * columns)), ll.i8),
    )
    for d in range(_DEPTH)
  ]
  tops = ll.constant([0x80] * 64, rows[0].type)
  rows = [builder.xor(row, tops) for row in rows]
  pairs = [
    ll.shuffle(builder, a, b, _unpack(1, half))
    for a, b in (rows[:2], rows[2:])
    for half in (0, 1)
  ]
  low_ab, high_ab, low_cd, high_cd = pairs
  return [
    ll.shuffle(builder, ab, cd, _unpack(2, half))
    for ab, cd in ((low_ab, low_cd), (high_ab, high_cd))
    for half in (0, 1)
  ]


def _unpack(size: int, half: int) -> list[int]:
  """Bytes of two vectors in turn, `size` at a time, from half of each lane."""
  order = []
  for lane in range(4):
    for item in range(8 // size):
      first = 16 * lane + 8 * half + size * item
      order += range(first, first + size)
      order += range(64 + first, 64 + first + size)
  return order


def _lane_of_each(builder, vectors, lane: int):
  """The same 128 bits of four vectors of int32, one after another."""
  four = [*range(4 * lane, 4 * lane + 4)]
  both = four + [16 + n for n in four]
  low, high = (
    ll.shuffle(builder, a, b, both) for a, b in (vectors[:2], vectors[2:])
  )
  return ll.shuffle(builder, low, high, list(range(16)))
