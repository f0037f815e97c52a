"""The product of a few rows and a matrix on a CPU, one read of the matrix.

At two to sixteen rows the work is reading the weights. A vector of weights is
read once and multiplied with all rows (in two groups, if they are more than
eight) while it is in a register; all sums are in registers too.

    w [K, N]: a tile of out is M x 3 vectors of columns; k by k, a vector of
              weights is multiplied with x[m, k].
    w [N, K]: a tile of out is M x 3 numbers; vectors of x and w are multiplied
              along k, and each sum is taken together at the end.

The parts are ranges of columns, so a sum is always taken in the same order.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll

MOST_ROWS = 16
_ROWS = 8  # at a time


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
  if not along or along % ll.lanes() or not rows:
    raise NotImplementedError(
      f'[{rows}, {inner}] times [{inner}, {columns}] does not fill vectors'
    )
  parts = llvm_cpu.parts()
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

  def tile(column, vectors, group):
    sums = [(m, v) for m in group for v in range(vectors)]
    start = [ll.zeros() for _ in sums]
    with ll.carry(builder, 0, inner, 1, start) as (k, carried, keep):
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
    for (m, v), value in zip(sums, carried, strict=True):
      place = _at(builder, out, column, m * columns + v * lanes)
      ll.store(builder, value, place)

  _tiles(builder, part, parts, rows, columns, lanes, tile)


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
