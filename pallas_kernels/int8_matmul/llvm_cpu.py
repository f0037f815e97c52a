"""The int8 product of a few rows on a CPU with VNNI, one read of the weights.

VPDPBUSD multiplies four unsigned bytes with four signed ones and adds all to an
int32, sixteen times. For it the bytes of four rows of w are interleaved in
registers and made unsigned, w + 128; what that adds, 128 sum_k q, is taken off
the sums before they begin. int32 wraps around, so this is exact. Of a byte of
two values of 4 bits each half is made unsigned, w + 8, and meets its own x.

A tile of a group is multiplied in registers, scaled, and added to sums of
float32. These lie as the interleaved weights do, and are put in order when the
last group is done. A single group is cut into blocks, and the sums are int32.

The registers hold the sums of six rows; where there are more, the first ones
leave the tile of weights on the stack as it was interleaved, and a loop goes
over the others, as many at a time. More than 32 rows, or than 2^18 numbers,
take turns, of which the last one ends with the last row: it may do some again.
Threads share the turns, and the columns where there are fewer turns than work
for all.

Rows of floats are quantized by every part for itself: that is less work than to
wait for one another.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.int8_matmul import llvm_cpu_rows

_MOST_ROWS = 32  # of a turn
# What a thread has on its stack: quantized rows, and a tile of weights.
_MOST_VALUES = 2**18
_MOST_BLOCK = 2**13
_ROWS = 6  # at a time: 24 registers of sums
_COLUMNS = 64  # of a tile
_DEPTH = 4  # numbers that one instruction multiplies
# Rows of w of a tile, where they need not be those of a group. A few rows of x
# wait for memory, which is slower when many lines are read at once; with more
# rows the loading and storing of sums, once a block, costs more.
_BLOCK_OF_FEW, _BLOCK = 16, 32


class _Product(NamedTuple):
  """What is static about a kernel; the dtypes are names."""

  all_rows: int
  rows: int  # of a turn
  inner: int
  columns: int
  groups: int
  packed: bool
  scales: str
  offsets: str | None
  shares: int  # of the columns

  @property
  def group(self) -> int:
    """Rows of w in a group."""
    return self.inner // self.groups

  @property
  def block(self) -> int:
    """Rows of w that are multiplied at a time: a group, or part of the one."""
    if self.groups > 1:
      return self.group
    # Rows of bytes with two values are interleaved over 32 rows of w.
    few = self.rows <= _ROWS and not self.packed
    return math.gcd(self.inner, _BLOCK_OF_FEW if few else _BLOCK)

  @property
  def depth(self) -> int:
    """Rows of bytes in a block."""
    return self.block // self.halves

  @property
  def halves(self) -> int:
    """Values in a byte."""
    return 2 if self.packed else 1

  @property
  def bias(self) -> int:
    """What makes values unsigned."""
    return 8 if self.packed else 128


def int8_matmul(
  x: jax.Array,  # [M, K] float, or int8
  w: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  w_scales: jax.Array,  # [N] or [K / G, N]
  x_scales: jax.Array | None = None,  # [M] float32, of int8 x
  w_offsets: jax.Array | None = None,  # like w_scales
  *,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  """(q @ w) s_x, [M, N]; see `api`.

  Raises:
    NotImplementedError: As `check` does.
  """
  check(x, w, w_scales)
  (rows, inner), columns = x.shape, w.shape[1]
  groups = len(jnp.atleast_2d(w_scales))
  # float16 stays as narrow as it is stored.
  stored = lambda of: of if of.dtype == jnp.float16 else of.astype(jnp.float32)
  weight = [w, *(stored(of) for of in (w_scales, w_offsets) if of is not None)]
  if x_scales is None:
    args = [x.astype(jnp.float32), *weight]
  else:
    sums = x.astype(jnp.int32).reshape(rows, groups, -1).sum(-1)
    args = [x, *weight, x_scales, sums]
  turns = -(-rows // min(_MOST_ROWS, _MOST_VALUES // inner))
  product = _Product(
    all_rows=rows,
    rows=-(-rows // turns),
    inner=inner,
    columns=columns,
    groups=groups,
    packed=w.dtype == jnp.uint8,
    scales=str(weight[1].dtype),
    offsets=None if w_offsets is None else str(weight[2].dtype),
    shares=-(-llvm_cpu.parts() // turns),
  )
  out = llvm_cpu.call(
    _emit,
    product,
    args,
    jax.ShapeDtypeStruct((rows, columns), jnp.float32),
    parts=turns * product.shares,
  )
  return out.astype(out_dtype)


def check(x, w, w_scales) -> None:
  """Finds out whether the kernel takes arrays, by their shapes and dtypes.

  Raises:
    NotImplementedError: For no rows or rows longer than 2^18, for more than
      six rows where groups are longer than 8,192, for sizes that do not fill
      tiles, and where there is no VNNI or nothing can be compiled.
  """
  (rows, inner), columns = x.shape, w.shape[1]
  groups = len(w_scales) if w_scales.ndim == 2 else 1
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if not ll.has('avx512vnni'):
    raise NotImplementedError('this processor has no AVX-512 VNNI')
  if not rows or inner > _MOST_VALUES:
    raise NotImplementedError(
      f'{rows} rows of {inner} are none, or longer than {_MOST_VALUES}'
    )
  if rows > _ROWS and groups > 1 and inner // groups > _MOST_BLOCK:
    raise NotImplementedError(
      f'more than {_ROWS} rows share groups of {inner // groups}, which are'
      f' longer than {_MOST_BLOCK}'
    )
  if not inner or (inner // groups) % ll.lanes() or columns % _COLUMNS:
    raise NotImplementedError(
      f'[{inner}, {columns}] in {groups} groups is not of multiples of'
      f' {ll.lanes()} and {_COLUMNS}'
    )


class _Memory(NamedTuple):
  """Where everything lies."""

  x: ll.Value  # [M, K] int8
  x_scales: ll.Value  # [M]
  x_sums: ll.Value  # [M, K / G] int32
  w: ll.Value
  w_scales: ll.Value
  w_offsets: ll.Value | None
  out: ll.Value
  kept: ll.Value | None  # on the stack: a tile of a block as it was interleaved


def _emit(builder, p: _Product, pointers, part) -> None:
  """Tiles of 64 columns."""
  x, w, w_scales, *others, out = pointers
  w_offsets = others.pop(0) if p.offsets else None
  shares = ll.number(p.shares)
  mine = builder.srem(part, shares)
  mine = ll.share(builder, mine, p.shares, p.columns // _COLUMNS)
  if p.rows < p.all_rows:
    begin = builder.mul(builder.sdiv(part, shares), ll.number(p.rows))
    begin = ll.least(builder, begin, ll.number(p.all_rows - p.rows))
    row = lambda base, size, kind=ll.f32: ll.place(
      builder, base, builder.mul(begin, ll.number(size)), kind
    )
    x = row(x, p.inner, ll.i8 if others else ll.f32)
    if others:
      others = row(others[0], 1), row(others[1], p.groups, ll.i32)
    out = row(out, p.columns)
  if not others:
    x, *others = llvm_cpu_rows.quantized(builder, x, p.rows, p.inner, p.groups)
  x_scales, x_sums = others
  kept = None
  if p.rows > _ROWS:
    kept = ll.room(builder, p.block * _COLUMNS, ll.i8)
  add = _add_group if p.groups > 1 else _add_integers
  at = _Memory(x, x_scales, x_sums, w, w_scales, w_offsets, out, kept)
  ll.tiles_by_groups(
    builder,
    mine,
    p.inner // p.block,
    p.rows * _COLUMNS,
    add=lambda *where: add(builder, p, at, *where),
    write=lambda *where: _write(builder, p, at, *where),
  )


def _add_group(builder, p: _Product, at: _Memory, g, tile, sums, later) -> None:
  """Adds s sum_k q w, and o sum_k q, of a group to the sums of a tile."""
  for rows, soon in _in_turns(builder, p, later):
    start = [
      vector for m in rows for vector in [_start(builder, p, at, m, g)] * 4
    ]
    products = _products(builder, p, at, (g, tile), rows, start, soon)
    for m, terms in _terms(builder, p, at, g, tile, rows, products):
      places = _four(builder, sums, ll.index(builder, m, _COLUMNS))
      for place, term in zip(places, terms, strict=True):
        total = builder.fadd(ll.load_vector(builder, place), term)
        ll.store(builder, total, place)


def _add_integers(
  builder, p: _Product, at: _Memory, block, tile, sums, later
) -> None:
  """Adds sum_k q w of a block of the only group to sums of int32."""
  for rows, soon in _in_turns(builder, p, later):
    places = [
      place
      for m in rows
      for place in _four(builder, sums, ll.index(builder, m, _COLUMNS))
    ]
    start = [ll.load_vector(builder, place, ll.i32) for place in places]
    products = _products(builder, p, at, (block, tile), rows, start, soon)
    for place, vector in zip(places, sum(products, []), strict=True):
      ll.store(builder, vector, place)


def _in_turns(builder, p: _Product, later):
  """Emits what follows for some rows, and for the others in a loop.

  Yields rows, and for the first ones what to ask for later, else None. It is a
  generator, so that what follows is emitted inside of the loop.
  """
  turns = -(-p.rows // _ROWS)
  size = -(-p.rows // turns)
  first = p.rows - (turns - 1) * size
  yield [ll.number(m) for m in range(first)], later
  if turns > 1:
    with ll.count(builder, first, p.rows, size) as begin:
      rows = [builder.add(begin, ll.number(m)) for m in range(size)]
      yield rows, None


def _write(builder, p: _Product, at: _Memory, tile, sums) -> None:
  """Puts the sums of a tile in order and scales them by their rows."""
  kind = ll.f32 if p.groups > 1 else ll.i32
  with ll.count(builder, 0, p.rows, 1) as m:
    places = _four(builder, sums, ll.index(builder, m, _COLUMNS))
    vectors = [ll.load_vector(builder, place, kind) for place in places]
    if p.groups == 1:
      start = _start(builder, p, at, m, ll.number(0))
      products = [[builder.add(vector, start) for vector in vectors]]
      (_, vectors), *more = _terms(
        builder, p, at, ll.number(0), tile, [m], products
      )
      for _, terms in more:
        vectors = [builder.fadd(*two) for two in zip(vectors, terms)]
    scale = ll.load(builder, ll.place(builder, at.x_scales, m), ll.f32)
    scale = ll.spread(builder, scale)
    column = builder.mul(tile, ll.number(_COLUMNS))
    places = _four(builder, at.out, ll.index(builder, m, p.columns, column))
    for place, vector in zip(places, _turned(builder, vectors), strict=True):
      ll.store(builder, builder.fmul(vector, scale), place)


def _terms(builder, p: _Product, at: _Memory, g, tile, rows, products):
  """What a group adds to rows, in order: rows and four vectors of float32.

  Products with scales come first, then sums of x with offsets.
  """
  line = builder.add(
    builder.mul(g, ll.number(p.columns)), builder.mul(tile, ll.number(_COLUMNS))
  )
  factors = _factors(builder, at.w_scales, line, p.scales)
  for m, vectors in zip(rows, products, strict=True):
    yield (
      m,
      [
        builder.fmul(builder.sitofp(vector, factor.type), factor)
        for vector, factor in zip(vectors, factors, strict=True)
      ],
    )
  if p.offsets:
    factors = _factors(builder, at.w_offsets, line, p.offsets)
    for m in rows:
      total = ll.spread(builder, _x_sum(builder, p, at, m, g))
      total = builder.sitofp(total, factors[0].type)
      yield m, [builder.fmul(total, factor) for factor in factors]


def _factors(builder, base, index, dtype: str):
  """Scales of 64 columns from an index on, in the order of `_interleaved`."""
  vectors = [
    ll.load_float32(builder, base, builder.add(index, ll.number(16 * i)), dtype)
    for i in range(4)
  ]
  return _turned(builder, vectors)


def _four(builder, base, index):
  """Addresses of four consecutive vectors of float32."""
  return [
    ll.place(builder, base, builder.add(index, ll.number(16 * i)))
    for i in range(4)
  ]


def _x_sum(builder, p: _Product, at: _Memory, m, g):
  """sum_k q of a group of row m."""
  index = ll.index(builder, m, p.groups, g)
  return ll.load(builder, ll.place(builder, at.x_sums, index, ll.i32), ll.i32)


def _start(builder, p: _Product, at: _Memory, m, g):
  """A vector of what makes up for the bias of weights in sums of a row."""
  total = _x_sum(builder, p, at, m, g)
  total = builder.mul(total, ll.constant(-p.bias, ll.i32))
  return ll.spread(builder, total)


def _products(builder, p: _Product, at: _Memory, now, rows, start, later):
  """Adds sum_k q w of a block and some rows to four vectors of int32 for each.

  `now` and `later` are blocks and tiles: what to multiply, and what to ask for;
  without `later` the weights are those that the rows before have left.
  """
  steps = ll.carry(builder, 0, p.depth, _DEPTH, start)
  with steps as (row, carried, keep):
    if later:
      codes = _four_rows(builder, p, at, *now, row)
      halves = _weights(builder, p, at, row, codes)
      for place in _four_rows(builder, p, at, *later, row):
        ll.prefetch(builder, place)
    else:
      halves = _kept_weights(builder, p, at, row)
    k = row
    if p.packed:
      # Row i of 16 rows of bytes holds rows i and 16 + i of 32.
      place = builder.and_(row, ll.number(formats.HALF - 1))
      k = builder.sub(builder.add(row, row), place)
    k = builder.add(builder.mul(now[0], ll.number(p.block)), k)
    new = []
    for n, m in enumerate(rows):
      four = carried[4 * n : 4 * n + 4]
      for half, weights in enumerate(halves):
        column = builder.add(k, ll.number(half * formats.HALF))
        column = ll.index(builder, m, p.inner, column)
        place = ll.place(builder, at.x, column, ll.i8)
        values = ll.spread(builder, ll.load(builder, place, ll.i32))
        four = [
          ll.dot4(builder, total, weight, values)
          for total, weight in zip(four, weights, strict=True)
        ]
      new += four
    keep(new)
  return [carried[4 * n : 4 * n + 4] for n in range(len(rows))]


def _four_rows(builder, p: _Product, at: _Memory, block, tile, row):
  """Addresses of four rows of bytes of a block and a tile, from `row` on."""
  line = builder.add(builder.mul(block, ll.number(p.depth)), row)
  column = builder.mul(tile, ll.number(_COLUMNS))
  index = builder.add(builder.mul(line, ll.number(p.columns)), column)
  return [
    ll.place(builder, at.w, builder.add(index, ll.number(d * p.columns)), ll.i8)
    for d in range(_DEPTH)
  ]


def _places(builder, p: _Product, at: _Memory, row):
  """Where weights of four rows of bytes of a block are kept."""
  begin = builder.mul(row, ll.number(p.halves * _COLUMNS))
  return [
    ll.place(builder, at.kept, builder.add(begin, ll.number(64 * i)), ll.i8)
    for i in range(p.halves * _DEPTH)
  ]


def _kept_weights(builder, p: _Product, at: _Memory, row):
  """What `_weights` has kept of the same rows."""
  places = _places(builder, p, at, row)
  weights = [ll.load_bytes(builder, place) for place in places]
  return [weights[i : i + 4] for i in range(0, len(weights), 4)]


def _weights(builder, p: _Product, at: _Memory, row, codes):
  """Unsigned weights of four rows of bytes of a tile, for each of their halves.

  `row` counts the rows of bytes of the block, and `codes` are their addresses.
  They are kept, if there is a place for them.
  """
  codes = _interleaved(builder, [ll.load_bytes(builder, a) for a in codes])
  every = lambda value: ll.constant([value] * 64, codes[0].type)
  if p.packed:
    # In two's complement x ^ 8 is x + 8.
    codes = [builder.xor(vector, every(0x88)) for vector in codes]
    halves = [
      [builder.and_(vector, every(15)) for vector in codes],
      [builder.lshr(vector, every(4)) for vector in codes],
    ]
  else:
    halves = [[builder.xor(vector, every(0x80)) for vector in codes]]
  if at.kept:
    places = _places(builder, p, at, row)
    for weight, place in zip(sum(halves, []), places, strict=True):
      ll.store(builder, weight, place)
  return halves


def _interleaved(builder, rows):
  """Four rows of 64 bytes as four vectors of groups of four.

  Group r of 128-bit lane l in vector i belongs to column 16 l + 4 i + r.
  """
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


def _turned(builder, vectors):
  """Four vectors of four 128-bit lanes, transposed; its own inverse."""
  lanes = lambda *numbers: [4 * n + i for n in numbers for i in range(4)]
  a, b, c, d = vectors
  halves = [
    [ll.shuffle(builder, x, y, lanes(*numbers)) for x, y in ((a, b), (c, d))]
    for numbers in ((0, 1, 4, 5), (2, 3, 6, 7))
  ]
  return [
    ll.shuffle(builder, ab, cd, lanes(*numbers))
    for ab, cd in halves
    for numbers in ((0, 2, 4, 6), (1, 3, 5, 7))
  ]
