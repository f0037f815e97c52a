"""The product of a few rows and a quantized matrix on a CPU with AVX-512.

A code of 4 bits is the number of a float32 in a register: VPERMPS looks up
sixteen at once, by the low four bits of sixteen int32. So integers cost what a
codebook does. Bytes of sixteen columns are widened to int32 and looked up, and
once more shifted by four; every vector of weights is multiplied with all rows
while it is in a register.

Weights are not scaled but the sums of a group are. That is one rounding less a
weight, and also those of bfloat16 x are summed with float32 weights.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll
from pallas_kernels.dequant_matmul import formats

MOST_ROWS = 16
_ROWS = 6  # at a time: 24 registers of sums
_COLUMNS = 64  # of a tile
_VECTORS = _COLUMNS // 16
_DEEPEST = 128  # numbers of a column that are summed before they are scaled
_INTEGERS = [*range(8), *range(-8, 0)]  # 4 bits in two's complement


class _Product(NamedTuple):
  """What is static about a kernel."""

  rows: int
  inner: int
  columns: int
  groups: int
  block: int  # rows of w that are summed before they are scaled
  packed: bool
  scales: str  # their dtype
  parts: int


def dequant_matmul(
  x: jax.Array,  # [M, K]
  values: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  scales: jax.Array,  # [K / G, N] float32 or float16
  codebook: jax.Array | None = None,  # [16] float32
  *,
  transposed: bool,
  out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
  """x @ w [M, N]; see `api`.

  Raises:
    NotImplementedError: For the transposed product, more than 16 rows, sizes
      that do not fill tiles, and where there is no AVX-512 or nothing can be
      compiled.
  """
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if not ll.has('avx512f'):
    raise NotImplementedError('this processor has no AVX-512')
  if transposed:
    raise NotImplementedError('it multiplies with w and not with its transpose')
  (rows, inner), columns = x.shape, values.shape[1]
  group = inner // len(scales)
  block = math.gcd(group, _DEEPEST)
  if not 1 <= rows <= MOST_ROWS:
    raise NotImplementedError(f'{rows} rows are not 1 to {MOST_ROWS}')
  if block % formats.HALF or columns % _COLUMNS:
    raise NotImplementedError(
      f'[{inner}, {columns}] in groups of {group} is not of multiples of'
      f' {formats.HALF} and {_COLUMNS}'
    )
  weight = (values, scales) if codebook is None else (values, scales, codebook)
  product = _Product(
    rows=rows,
    inner=inner,
    columns=columns,
    groups=len(scales),
    block=block,
    packed=values.dtype == jnp.uint8,
    scales=str(scales.dtype),
    parts=llvm_cpu.parts(),
  )
  return llvm_cpu.call(
    _emit,
    product,
    (x.astype(jnp.float32), *weight),
    jax.ShapeDtypeStruct((rows, columns), jnp.float32),
    parts=product.parts,
  ).astype(out_dtype)


class _Memory(NamedTuple):
  """Where everything lies, and the values of codes in a register."""

  x: ll.Value
  values: ll.Value
  scales: ll.Value
  table: ll.Value | None
  out: ll.Value


def _emit(builder, p: _Product, pointers, part) -> None:
  """Tiles of 64 columns."""
  x, values, scales, *codebook, out = pointers
  table = None
  if codebook:
    table = ll.load_vector(builder, codebook[0])
  elif p.packed:
    table = ll.constant(_INTEGERS, ll.vector_of())
  at = _Memory(x, values, scales, table, out)
  ll.tiles_by_groups(
    builder,
    ll.share(builder, part, p.parts, p.columns // _COLUMNS),
    p.inner // p.block,
    p.rows * _COLUMNS,
    add=lambda *where: _add_block(builder, p, at, *where),
    write=lambda *where: _write(builder, p, at, *where),
  )


def _add_block(
  builder, p: _Product, at: _Memory, block, tile, sums, later
) -> None:
  """Adds s sum_k x w of a block of k to the sums of a tile."""
  column = builder.mul(tile, ll.number(_COLUMNS))
  blocks = p.inner // p.groups // p.block  # of a group
  group = builder.sdiv(block, ll.number(blocks))
  line = builder.add(builder.mul(group, ll.number(p.columns)), column)
  for rows in ll.groups(p.rows, _ROWS):
    products = _products(builder, p, at, (block, tile), rows, later)
    factors = [
      ll.load_float32(builder, at.scales, index, p.scales)
      for index in _vectors(builder, line)
    ]
    for m, vectors in zip(rows, products, strict=True):
      indices = _vectors(builder, ll.number(m * _COLUMNS))
      for i, factor, vector in zip(indices, factors, vectors, strict=True):
        place = ll.place(builder, sums, i)
        total = ll.load_vector(builder, place)
        ll.store(
          builder, ll.apply(builder, 'fma', vector, factor, total), place
        )


def _write(builder, p: _Product, at: _Memory, tile, sums) -> None:
  """Copies the sums of a tile to the result."""
  column = builder.mul(tile, ll.number(_COLUMNS))
  for m in range(p.rows):
    indices = _vectors(builder, ll.number(m * _COLUMNS))
    line = builder.add(column, ll.number(m * p.columns))
    for i, to in zip(indices, _vectors(builder, line), strict=True):
      vector = ll.load_vector(builder, ll.place(builder, sums, i))
      ll.store(builder, vector, ll.place(builder, at.out, to))


def _products(builder, p: _Product, at: _Memory, now, rows: range, later):
  """sum_k x w of a block and some rows: four vectors of float32 for each."""
  halves = 2 if p.packed else 1
  depth = p.block // halves  # rows of bytes
  start = [ll.zeros() for _ in range(len(rows) * _VECTORS)]
  with ll.carry(builder, 0, depth, 1, start) as (row, carried, keep):
    line, line_later = (
      _line(builder, p, depth, *where, row) for where in (now, later)
    )
    if not rows.start:
      ll.prefetch(builder, ll.place(builder, at.values, line_later, ll.i8))
    k = row
    if p.packed:
      # Row i of 16 rows of bytes holds rows i and 16 + i of 32.
      place = builder.and_(row, ll.number(formats.HALF - 1))
      k = builder.sub(builder.add(row, row), place)
    k = builder.add(builder.mul(now[0], ll.number(p.block)), k)
    new = list(carried)
    for v, index in enumerate(_vectors(builder, line)):
      weights = _weights(builder, p, at, index)
      for n, m in enumerate(rows):
        for half, weight in enumerate(weights):
          offset = ll.number(m * p.inner + half * formats.HALF)
          place = ll.place(builder, at.x, builder.add(k, offset))
          value = ll.spread(builder, ll.load(builder, place))
          i = n * _VECTORS + v
          new[i] = ll.apply(builder, 'fma', weight, value, new[i])
    keep(new)
  return [carried[n * _VECTORS : (n + 1) * _VECTORS] for n in range(len(rows))]


def _line(builder, p: _Product, depth: int, block, tile, row):
  """Where the bytes of a row of a block and a tile begin."""
  line = builder.add(builder.mul(block, ll.number(depth)), row)
  column = builder.mul(tile, ll.number(_COLUMNS))
  return builder.add(builder.mul(line, ll.number(p.columns)), column)


def _weights(builder, p: _Product, at: _Memory, index):
  """Weights of sixteen bytes in float32, for each of their halves."""
  place = ll.place(builder, at.values, index, ll.i8)
  codes = ll.load_vector(builder, place, ll.i8)
  if not p.packed:
    codes = builder.sext(codes, ll.vector_of(ll.i32))
    return [builder.sitofp(codes, ll.vector_of())]
  low = builder.zext(codes, ll.vector_of(ll.i32))
  high = builder.lshr(low, ll.constant([4] * ll.lanes(), low.type))
  return [ll.look_up(builder, at.table, codes) for codes in (low, high)]


def _vectors(builder, index):
  """Indices at which the vectors of 64 columns begin."""
  return [
    builder.add(index, ll.number(v * ll.lanes())) for v in range(_VECTORS)
  ]
