"""The product of a few rows and a matrix on a CPU, one read of the matrix.

With few rows the work is reading the weights. A vector of weights is read once
and multiplied with all rows (for a table in groups of eight) while it is in a
register. A part of the work is a range of columns.

    w [K, N]: eight lines of w are read side by side, a vector of each at a
              time; a vector of sums of every row, which stay in a cache, gets
              its products with x[m, k .. k+7].
    w [N, K]: a tile of out is M x n numbers; vectors of x and w are multiplied
              along k, and each sum is taken together at the end.

Both ask for what they will read soon: the next eight lines or the next tile, at
the same place. A processor foresees a line, but not where the next one begins.
The order of a sum does not depend on how many rows there are, nor do its bits.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll

MOST_ROWS = 32
_ROWS = 8  # of a group that scores a table
_DEPTH = 8  # lines of w
_SUMS = 8192  # of a part: a cache holds them


def narrow_matmul(x: jax.Array, w: jax.Array, *, transposed: bool) -> jax.Array:
  """See `api`.

  Raises:
    NotImplementedError: For other dtypes than float32, for more than 32 rows,
      for sizes that do not fill vectors, and where nothing can be compiled.
  """
  rows, inner = x.shape
  columns = w.shape[0 if transposed else 1]
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if x.dtype != jnp.float32 or w.dtype != jnp.float32:
    raise NotImplementedError(
      f'dtypes are {x.dtype} and {w.dtype}, not float32'
    )
  if rows > MOST_ROWS:
    raise NotImplementedError(f'{rows} rows are more than {MOST_ROWS}')
  along = inner if transposed else columns
  if not (along and inner and rows) or along % ll.lanes():
    raise NotImplementedError(
      f'[{rows}, {inner}] times [{inner}, {columns}] does not fill vectors'
    )
  parts = min(llvm_cpu.parts(), -(-columns // ll.lanes()))
  if not transposed:
    parts = max(parts, -(-rows * columns // _SUMS))
  return llvm_cpu.call(
    _emit_table if transposed else _emit,
    (rows, inner, columns, parts),
    (x, w),
    jax.ShapeDtypeStruct((rows, columns), jnp.float32),
    parts=parts,
  )


def _emit(builder, static, pointers, part) -> None:
  """One part of out for w [K, N]."""
  rows, inner, columns, parts = static
  x, w, out = pointers
  lanes = ll.lanes()
  depth = _divisor(inner, _DEPTH)
  most = -(-columns // lanes // parts)
  # An odd number of vectors: rows of a power of two share few lines of a cache.
  width = lanes * (most | 1)
  sums, values = ll.room(builder, rows * width), ll.room(builder, rows * lanes)
  with ll.count(builder, 0, rows * width, lanes) as i:
    ll.store(builder, ll.zeros(), ll.place(builder, sums, i))
  first, last = (
    builder.mul(i, ll.number(lanes))
    for i in ll.share(builder, part, parts, columns // lanes)
  )
  with ll.count(builder, 0, inner, depth) as k:
    for m in range(rows):
      some = ll.load_first(builder, _at(builder, x, k, m * inner), depth)
      ll.store(builder, some, ll.place(builder, values, m * lanes))
    with ll.count(builder, first, last, lanes) as column:
      line = ll.index(builder, k, columns, column)
      places = [_at(builder, w, line, d * columns) for d in range(depth)]
      weights = [ll.load_vector(builder, place) for place in places]
      for place in places:
        ll.prefetch(builder, ll.place(builder, place, depth * columns))
      # Numbers in memory are an operand of the product; LLVM would spread all
      # of them before the loop, to the stack.
      numbers = ll.unknown(builder, values)
      for m in range(rows):
        place = _at(builder, sums, builder.sub(column, first), m * width)
        total = ll.load_vector(builder, place)
        for d, vector in enumerate(weights):
          value = ll.load(builder, ll.place(builder, numbers, m * lanes + d))
          value = ll.spread(builder, value)
          total = ll.apply(builder, 'fma', value, vector, total)
        ll.store(builder, total, place)
  with ll.count(builder, first, last, lanes) as column:
    for m in range(rows):
      place = _at(builder, sums, builder.sub(column, first), m * width)
      total = ll.load_vector(builder, place)
      ll.store(builder, total, _at(builder, out, column, m * columns))


def _divisor(of: int, most: int) -> int:
  """The largest divisor that is at most `most`."""
  return next(n for n in range(min(of, most), 0, -1) if of % n == 0)


def _emit_table(builder, static, pointers, part) -> None:
  """One part of out for w [N, K]."""
  rows, inner, columns, parts = static
  groups = ll.groups(rows, _ROWS)
  # A quarter of the registers is for weights and x.
  most = ll.registers() * 3 // 4 // max(map(len, groups))
  first, last = ll.share(builder, part, parts, columns)
  rest = builder.srem(builder.sub(last, first), ll.number(most))
  middle = builder.sub(last, rest)
  for begin, end, width in ((first, middle, most), (middle, last, 1)):
    with ll.count(builder, begin, end, width) as column:
      for group in groups:
        _tile_of_table(builder, static, pointers, column, width, group)


def _tile_of_table(builder, static, pointers, column, width, group) -> None:
  """The scores of some rows of w for a group of rows of x."""
  _, inner, columns, _ = static
  x, w, out = pointers
  sums = [(m, n) for m in group for n in range(width)]
  start = [ll.zeros() for _ in sums]
  line = builder.mul(column, ll.number(inner))
  with ll.carry(builder, 0, inner, ll.lanes(), start) as (k, carried, keep):
    along = builder.add(line, k)
    places = [_at(builder, w, along, n * inner) for n in range(width)]
    for place in places:
      ll.prefetch(builder, ll.place(builder, place, width * inner))
    weights = [ll.load_vector(builder, place) for place in places]
    values = {
      m: ll.load_vector(builder, _at(builder, x, k, m * inner)) for m in group
    }
    keep(
      ll.apply(builder, 'fma', values[m], weights[n], carried[i])
      for i, (m, n) in enumerate(sums)
    )
  for (m, n), value in zip(sums, carried, strict=True):
    place = _at(builder, out, column, m * columns + n)
    ll.store(builder, ll.total(builder, value), place)


def _at(builder, base, index, offset: int):
  """The address of `base[index + offset]`."""
  index = builder.add(index, ll.number(offset))
  return ll.place(builder, base, index)
