"""The product of a few rows and a matrix on a CPU, one read of the matrix.

At one to sixteen rows the work is reading the weights. A vector of weights is
read once and multiplied with all rows (in two groups, if they are more than
eight) while it is in a register; so are the sums of a range of k.

    w [K, N]: a tile of out is M x 3 vectors of columns; k by k, a vector of
              weights is multiplied with x[m, k].
    w [N, K]: a tile of out is M x 3 numbers; vectors of x and w are multiplied
              along k, and each sum is taken together at the end.

The parts are ranges of columns. Up to four rows are bound by memory alone, and
strips of columns are not how memory is read fastest: there the parts are eight
ranges of k, and eight lines of w are read side by side, a vector of each at a
time,

    w [K, N], few rows: out_p += x[:, k .. k+7] w[k .. k+7],   out = sum_p out_p

More rows sum up the same ranges of k and add these sums in their order, so that
the bits of a row do not depend on how many there are.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll

MOST_ROWS = 16
_ROWS = 8  # at a time
_RANGES = 8  # of k, on every machine: the order of a sum follows them
# Up to so many rows w is read in runs: lines of it at a time, and how many
# numbers ahead are asked for.
_FEW, _DEPTH, _AHEAD = 4, 8, 512


def narrow_matmul(x: jax.Array, w: jax.Array, *, transposed: bool) -> jax.Array:
  """See `api`.

  Raises:
    NotImplementedError: For other dtypes than float32, for more than 16 rows,
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
  call = lambda emit, parts, *shape: llvm_cpu.call(
    emit,
    (rows, inner, columns, parts),
    (x, w),
    jax.ShapeDtypeStruct(shape, jnp.float32),
    parts=parts,
  )
  if not transposed and rows <= _FEW:
    sums = call(_emit_in_runs, _RANGES, _RANGES, rows, columns)
    return functools.reduce(jnp.add, sums)
  emit = _emit_table if transposed else _emit
  return call(emit, llvm_cpu.parts(), rows, columns)


def _emit(builder, static, pointers, part) -> None:
  """One part of out for w [K, N]."""
  rows, inner, columns, parts = static
  x, w, out = pointers
  lanes = ll.lanes()
  depth = _divisor(inner, _DEPTH)

  def tile(column, vectors, group):
    sums = [(m, v) for m in group for v in range(vectors)]
    places = [
      _at(builder, out, column, m * columns + v * lanes) for m, v in sums
    ]
    start = [ll.zeros() for _ in sums]
    for place, value in zip(places, start, strict=True):
      ll.store(builder, value, place)
    with ll.count(builder, 0, _RANGES, 1) as some:
      first, last = (
        builder.mul(block, ll.number(depth))
        for block in ll.share(builder, some, _RANGES, inner // depth)
      )
      with ll.carry(builder, first, last, 1, start) as (k, carried, keep):
        line = builder.mul(k, ll.number(columns))
        line = builder.add(line, column)
        weights = [
          ll.load_vector(builder, _at(builder, w, line, v * lanes))
          for v in range(vectors)
        ]
        values = {
          m: ll.spread(builder, ll.load(builder, _at(builder, x, k, m * inner)))
          for m in group
        }
        keep(
          ll.apply(builder, 'fma', values[m], weights[v], carried[i])
          for i, (m, v) in enumerate(sums)
        )
      for place, value in zip(places, carried, strict=True):
        value = builder.fadd(ll.load_vector(builder, place), value)
        ll.store(builder, value, place)

  _tiles(builder, part, parts, rows, columns, lanes, tile)


def _emit_in_runs(builder, static, pointers, part) -> None:
  """The sums over one part of the rows of w [K, N], for very few rows of x."""
  rows, inner, columns, parts = static
  x, w, out = pointers
  lanes = ll.lanes()
  depth = _divisor(inner, _DEPTH)
  out = _at(builder, out, builder.mul(part, ll.number(rows * columns)), 0)
  with ll.count(builder, 0, rows * columns, lanes) as i:
    ll.store(builder, ll.zeros(), ll.place(builder, out, i))
  first, last = ll.share(builder, part, parts, inner // depth)
  with ll.count(builder, first, last, 1) as block:
    k = builder.mul(block, ll.number(depth))
    line = builder.mul(k, ll.number(columns))
    with ll.count(builder, 0, columns, lanes) as column:
      begin = builder.add(line, column)
      places = [_at(builder, out, column, m * columns) for m in range(rows)]
      sums = [ll.load_vector(builder, place) for place in places]
      for d in range(depth):
        place = _at(builder, w, begin, d * columns)
        weights = ll.load_vector(builder, place)
        ll.prefetch(builder, ll.place(builder, place, _AHEAD))
        values = [
          ll.load(builder, _at(builder, x, k, m * inner + d))
          for m in range(rows)
        ]
        sums = [
          ll.apply(builder, 'fma', ll.spread(builder, value), weights, total)
          for value, total in zip(values, sums, strict=True)
        ]
      for place, total in zip(places, sums, strict=True):
        ll.store(builder, total, place)


def _divisor(of: int, most: int) -> int:
  """The largest divisor that is at most `most`."""
  return next(n for n in range(min(of, most), 0, -1) if of % n == 0)


def _emit_table(builder, static, pointers, part) -> None:
  """One part of out for w [N, K]."""
  rows, inner, columns, parts = static
  x, w, out = pointers

  def tile(column, width, group):
    sums = [(m, n) for m in group for n in range(width)]
    start = [ll.zeros() for _ in sums]
    line = builder.mul(column, ll.number(inner))
    steps = ll.carry(builder, 0, inner, ll.lanes(), start)
    with steps as (k, carried, keep):
      along = builder.add(line, k)
      weights = [
        ll.load_vector(builder, _at(builder, w, along, n * inner))
        for n in range(width)
      ]
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

  _tiles(builder, part, parts, rows, columns, 1, tile)


def _tiles(builder, part, parts, rows, columns, unit, tile) -> None:
  """Goes over the tiles of a part, `tile(first column, units, rows)`.

  A tile is as many units of columns as fit the registers, at the end of a part
  one unit.
  """
  rows_of = ll.groups(rows, _ROWS)
  # A quarter of the registers is for weights and x.
  most = ll.registers() * 3 // 4 // max(map(len, rows_of))
  first, last = ll.share(builder, part, parts, columns // unit)
  rest = builder.srem(builder.sub(last, first), ll.number(most))
  middle = builder.sub(last, rest)
  for begin, end, width in ((first, middle, most), (middle, last, 1)):
    with ll.count(builder, begin, end, width) as i:
      column = builder.mul(i, ll.number(unit))
      for group in rows_of:
        tile(column, width, group)


def _at(builder, base, index, offset: int):
  """The address of `base[index + offset]`."""
  index = builder.add(index, ll.number(offset))
  return ll.place(builder, base, index)
