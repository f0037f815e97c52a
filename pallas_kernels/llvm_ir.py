"""Words that kernels for the CPU are written with: loops, vectors, intrinsics.

Each emits instructions at the place where an llvmlite `IRBuilder` stands, and
returns the value they make. See `llvm_cpu`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
from typing import Any

try:
  from llvmlite import binding
  from llvmlite import ir
except ImportError:  # the extra `cpu`
  binding = ir = None

if ir:
  i1, i8, i32, i64 = map(ir.IntType, (1, 8, 32, 64))
  f16, f32 = ir.HalfType(), ir.FloatType()
else:
  i1 = i8 = i32 = i64 = f16 = f32 = None

Value = Any  # an ir.Value
Type = Any  # an ir.Type

_RUN = 8192  # sums of a run of tiles: a cache holds them


# The processor that runs this.


def has(feature: str) -> bool:
  """Whether it has a feature, by LLVM's name for it."""
  return bool(binding.get_host_cpu_features().get(feature))


def lanes() -> int:
  """float32 numbers in a vector register."""
  return 16 if has('avx512f') else 8


def registers() -> int:
  """Vector registers."""
  return 32 if lanes() == 16 else 16


# Shares and loops.


def groups(rows: int, most: int) -> list[range]:
  """Rows in groups of nearly equal size, `most` at most."""
  count = -(-rows // most)
  return [
    range(i * rows // count, (i + 1) * rows // count) for i in range(count)
  ]


def share(builder, part: Value, parts: int, units: int) -> tuple[Value, Value]:
  """The first unit of a part, and the one after its last."""
  first, after = (
    builder.sdiv(builder.mul(i, number(units)), number(parts))
    for i in (part, builder.add(part, number(1)))
  )
  return first, after


@contextlib.contextmanager
def carry(
  builder, start, stop, step, values: Sequence[Value]
) -> Iterator[tuple[Value, list[Value], Callable[[Iterable[Value]], None]]]:
  """A loop that carries values from round to round.

  Yields i, the carried values, and a function that is told what they are in the
  next round. After the loop they are what they were at its end.
  """
  start, stop, step = map(number, (start, stop, step))
  before = builder.block
  head, body, after = (
    builder.append_basic_block(name) for name in ('head', 'body', 'after')
  )
  builder.branch(head)
  builder.position_at_end(head)
  i = builder.phi(i64)
  i.add_incoming(start, before)
  carried = [builder.phi(value.type) for value in values]
  for phi, value in zip(carried, values, strict=True):
    phi.add_incoming(value, before)
  builder.cbranch(builder.icmp_signed('<', i, stop), body, after)
  builder.position_at_end(body)
  following = []
  yield i, carried, following.extend
  i.add_incoming(builder.add(i, step), builder.block)
  for phi, value in zip(carried, following, strict=True):
    phi.add_incoming(value, builder.block)
  builder.branch(head)
  builder.position_at_end(after)


def either(
  builder, holds: Value, values: Sequence[Value], others: Callable[[], Iterable]
) -> list[Value]:
  """`values` where an i1 holds, else those that `others` emits and gives."""
  before = builder.block
  with builder.if_then(builder.not_(holds)):
    changed, inside = list(others()), builder.block
  joined = [builder.phi(value.type) for value in values]
  for phi, value, other in zip(joined, values, changed, strict=True):
    phi.add_incoming(value, before)
    phi.add_incoming(other, inside)
  return joined


@contextlib.contextmanager
def count(builder, start, stop, step) -> Iterator[Value]:
  """The body of `for i in range(start, stop, step)`; yields i."""
  with carry(builder, start, stop, step, ()) as (i, _, _):
    yield i


def tiles_by_groups(
  builder,
  share: tuple[Value, Value],
  groups: int,
  size: int,
  *,
  add: Callable[[Value, Value, Value, tuple[Value, Value]], None],
  write: Callable[[Value, Value], None],
) -> None:
  """Tiles of sums that grow by one group of an inner axis after another.

      group 0   tile 0   tile 1   ...   tile n
      group 1   tile 0   ...                      then the next run of tiles

  So a matrix is read along some of its lines, and the sums stay in a cache. A
  processor foresees a line, but not where the next one begins: `add` is told.

  Args:
    builder: Of the instructions.
    share: The first tile, and the one after the last.
    groups: How many there are.
    size: float32 numbers of a tile.
    add: Emits `add(group, tile, sums, later)`; the sums of a tile are on the
      stack and begin as zeros, and `later` are the group and the tile that come
      a run later, whose bytes may be asked for now.
    write: Emits `write(tile, sums)` when all groups have been added.
  """
  first, last = share
  tiles = max(1, _RUN // size)
  sums = room(builder, tiles * size)
  with count(builder, first, last, tiles) as begin:
    end = least(builder, builder.add(begin, number(tiles)), last)

    def own(tile):
      index = builder.mul(builder.sub(tile, begin), number(size))
      return place(builder, sums, index)

    with count(builder, 0, tiles * size, lanes()) as i:
      store(builder, zeros(), place(builder, sums, i))
    with count(builder, 0, groups, 1) as g:
      after = builder.add(g, number(1))
      more = builder.icmp_signed('<', after, number(groups))
      with count(builder, begin, end, 1) as tile:
        following = least(
          builder,
          builder.add(tile, number(tiles)),
          builder.sub(last, number(1)),
        )
        later = (
          builder.select(more, after, number(0)),
          builder.select(more, tile, following),
        )
        add(g, tile, own(tile), later)
    with count(builder, begin, end, 1) as tile:
      write(tile, own(tile))


# Numbers and vectors. A vector has as many numbers as a register has of
# float32, whatever its type.


def number(value: int | Value) -> Value:
  """An i64."""
  return ir.Constant(i64, value) if isinstance(value, int) else value


def constant(value: float, kind: Type = f32) -> Value:
  """A number of a type."""
  return ir.Constant(kind, value)


def index(builder, outer: Value, size: int, inner: int | Value = 0) -> Value:
  """outer size + inner: a place among `outer` times `size`."""
  return builder.add(builder.mul(outer, number(size)), number(inner))


def least(builder, a: Value, b: Value) -> Value:
  """The smaller one of two integers."""
  return builder.select(builder.icmp_signed('<', a, b), a, b)


def most(builder, a: Value, b: Value) -> Value:
  """The larger one of two integers."""
  return builder.select(builder.icmp_signed('<', a, b), b, a)


def vector_of(kind: Type = f32) -> Type:
  """The type of a vector."""
  return ir.VectorType(kind, lanes())


def zeros(kind: Type = f32) -> Value:
  """A vector of zeros."""
  return ir.Constant(vector_of(kind), None)


def spread(builder, value: Value) -> Value:
  """A vector of one number."""
  some = ir.Constant(vector_of(value.type), ir.Undefined)
  first = builder.insert_element(some, value, ir.Constant(i32, 0))
  return shuffle(builder, first, some, [0] * lanes())


def ramp(builder, start: Value) -> Value:
  """A vector of i32 that counts from `start`, an i64, on."""
  steps = ir.Constant(vector_of(i32), list(range(lanes())))
  start = spread(builder, builder.trunc(start, i32))
  return builder.add(start, steps)


def first(size: int) -> Value:
  """A vector of i1 that is true for the first numbers of a vector."""
  return ir.Constant(vector_of(i1), [i < size for i in range(lanes())])


def shuffle(builder, a: Value, b: Value, order: Sequence[int]) -> Value:
  """Elements of two vectors by their number, those of `b` counted on."""
  mask = ir.VectorType(i32, len(order))
  return builder.shuffle_vector(a, b, ir.Constant(mask, list(order)))


def transposed(builder, vectors: Sequence[Value]) -> list[Value]:
  """As many vectors as one has lanes: vector i gets element i of each."""
  vectors, apart = list(vectors), 1
  while apart < lanes():
    # One bit of the place in a vector and of the vector's number change sides.
    for i in range(lanes()):
      if not i & apart:
        a, b = vectors[i], vectors[i | apart]
        for low in (True, False):
          order = [
            (n & ~apart if low else n | apart) + lanes() * bool(n & apart)
            for n in range(lanes())
          ]
          vectors[i if low else i | apart] = shuffle(builder, a, b, order)
    apart *= 2
  return vectors


# Memory.


def place(builder, base: Value, index: int | Value, kind: Type = f32) -> Value:
  """The address of `base[index]`."""
  return builder.gep(base, [number(index)], source_etype=kind)


def room(builder, size: int, kind: Type = f32) -> Value:
  """The address of `size` numbers on the stack; not inside of a loop.

  It begins a line of the cache, so that no aligned vector lies across two.
  """
  address = builder.alloca(kind, size)
  address.align = 64
  address.type = ir.PointerType()  # llvmlite remembers what it points to
  return address


def unknown(builder, address: Value) -> Value:
  """The address again, of which LLVM knows nothing, so that it is read anew."""
  kind = ir.FunctionType(ir.PointerType(), [ir.PointerType()])
  return builder.asm(kind, '', '=r,0', [address], side_effect=True)


def load(builder, address: Value, kind: Type = f32) -> Value:
  """The number at an address."""
  return builder.load(address, typ=kind, align=1)


def load_index(builder, base: Value, at: Value) -> Value:
  """`base[at]` of int32, as an i64."""
  return builder.sext(load(builder, place(builder, base, at, i32), i32), i64)


def load_vector(builder, address: Value, kind: Type = f32) -> Value:
  """The vector that begins at an address."""
  return builder.load(address, typ=vector_of(kind), align=1)


def load_float32(builder, base: Value, index: Value, dtype: str) -> Value:
  """The vector of float32 or float16 from `base[index]` on, as float32."""
  if dtype == 'float32':
    return load_vector(builder, place(builder, base, index))
  narrow = load_vector(builder, place(builder, base, index, f16), f16)
  return builder.fpext(narrow, vector_of())


def load_bytes(builder, address: Value) -> Value:
  """64 bytes."""
  return builder.load(address, typ=ir.VectorType(i8, 64), align=1)


def load_first(builder, address: Value, size: int, kind: Type = f32) -> Value:
  """The first numbers of a vector, then zeros; nothing beyond them is read."""
  args = address, constant(1, i32), first(size), zeros(kind)
  name = f'masked.load.{_suffix(vector_of(kind))}.p0'
  return _call(builder, name, vector_of(kind), args)


def store_where(builder, value: Value, address: Value, mask: Value) -> None:
  """Writes those numbers of a vector for which a vector of i1 is true."""
  name = f'masked.store.{_suffix(value.type)}.p0'
  args = value, address, constant(1, i32), mask
  _call(builder, name, ir.VoidType(), args)


def store(builder, value: Value, address: Value) -> None:
  """Writes a number or a vector."""
  builder.store(value, address, align=1)


def prefetch(builder, address: Value, *, soon: bool = True) -> None:
  """Asks for the line of a cache at an address, which may be any.

  What is not needed soon comes no nearer than to the second cache.
  """
  to_read, to_stay, data = 0, 3 if soon else 2, 1
  how = (constant(i, i32) for i in (to_read, to_stay, data))
  _call(builder, 'prefetch.p0', ir.VoidType(), (address, *how))


# Arithmetic that LLVM has no instruction for, but an intrinsic.


def apply(builder, name: str, *args: Value) -> Value:
  """`llvm.NAME` of arguments of one type; a reduction gives a number."""
  kind = args[0].type
  result = kind.element if name.startswith('vector.reduce') else kind
  return _call(builder, f'{name}.{_suffix(kind)}', result, args)


def total(builder, vector: Value) -> Value:
  """The sum of a vector of float32, in the order of a tree."""
  name = f'vector.reduce.fadd.{_suffix(vector.type)}'
  return _call(
    builder, name, f32, (constant(0.0), vector), fastmath=('reassoc',)
  )


def totals(builder, vectors: Sequence[Value]) -> Value:
  """The sums of vectors, a power of two of them, as a vector in their order.

  Fewer than a vector has lanes are repeated. Neighbours are added in each step,
  so that two vectors become one:

      a0 a1 a2 a3   b0 b1 b2 b3   ->   a0+a1 a2+a3 b0+b1 b2+b3
  """
  add = builder.fadd if vectors[0].type.element == f32 else builder.add
  return _reduced(builder, vectors, add)


def maxima(builder, vectors: Sequence[Value]) -> Value:
  """The largest numbers of vectors of float32, as `totals` has the sums."""
  return _reduced(builder, vectors, lambda a, b: larger(builder, a, b))


def _reduced(builder, vectors, operation) -> Value:
  for _ in range(lanes().bit_length() - 1):
    firsts, seconds = vectors[::2], vectors[1::2] or vectors
    vectors = [
      operation(*_neighbours(builder, a, b))
      for a, b in zip(firsts, seconds, strict=True)
    ]
  return vectors[0]


def _neighbours(builder, a: Value, b: Value) -> Iterator[Value]:
  """The first of each two neighbours in two vectors, and the second of each."""
  for i in (0, 1):
    yield shuffle(builder, a, b, range(i, 2 * lanes(), 2))


def larger(builder, a: Value, b: Value) -> Value:
  """The larger ones of two vectors' numbers; those of b where a is NaN."""
  return builder.select(builder.fcmp_ordered('>', a, b), a, b)


# 2^x = 2^n 2^r, |r| <= 1/2: of the polynomials of r of degree 6 that are 1 at
# 0, the one with the least largest relative error (2e-9; 1.6e-8 with the
# coefficients in float32).
_EXP2 = (
  1.5353361959569156e-4,
  1.3398875016719103e-3,
  9.61843691766262e-3,
  5.5503323674201965e-2,
  2.4022647738456726e-1,
  6.931471824645996e-1,
  1.0,
)
_EXP2_LEAST = -126.0  # below, float32 would have less than its digits


def exp2(builder, x: Value) -> Value:
  """2^x of a vector of numbers that are below 127.5, within one unit.

  It is 0 below -126, as for -inf, and NaN for NaN.
  """
  every = lambda value: spread(builder, constant(value))
  n = apply(builder, 'rint', x)
  r = builder.fsub(x, n)
  first, *others = map(every, _EXP2)
  y = first
  for coefficient in others:
    y = apply(builder, 'fma', y, r, coefficient)
  # Neither smaller nor unordered.
  kept = builder.fcmp_unordered('>=', x, every(_EXP2_LEAST))
  if lanes() == 16:
    return _scaled(builder, y, n, kept)
  # The bits of 2^n; NaN is no integer.
  n = builder.select(builder.fcmp_ordered('>=', n, every(-126.0)), n, zeros())
  exponent = builder.fptosi(n, vector_of(i32))
  exponent = builder.add(exponent, spread(builder, constant(127, i32)))
  exponent = builder.shl(exponent, spread(builder, constant(23, i32)))
  y = builder.fmul(y, builder.bitcast(exponent, vector_of()))
  return builder.select(kept, y, zeros())


def _scaled(builder, y: Value, n: Value, kept: Value) -> Value:
  """y 2^n where `kept`, else 0; VSCALEFPS of AVX-512."""
  current_rounding = constant(4, i32)
  kept = builder.bitcast(kept, ir.IntType(16))
  args = y, n, zeros(), kept, current_rounding
  name = 'x86.avx512.mask.scalef.ps.512'
  return _call(builder, name, vector_of(), args)


def dot4(builder, sums: Value, unsigned: Value, signed: Value) -> Value:
  """Sixteen int32 sums, to each of which four products of bytes are added.

  VPDPBUSD of AVX-512 VNNI; sums wrap around.
  """
  octets = ir.VectorType(i8, 64)
  args = (sums, *(builder.bitcast(v, octets) for v in (unsigned, signed)))
  return _call(builder, 'x86.avx512.vpdpbusd.512', sums.type, args)


def look_up(builder, table: Value, codes: Value) -> Value:
  """Numbers of a table of sixteen, by the low four bits of sixteen int32.

  VPERMPS of AVX-512.
  """
  name = 'x86.avx512.permvar.sf.512'
  return _call(builder, name, table.type, (table, codes))


def _suffix(kind: Type) -> str:
  if isinstance(kind, ir.VectorType):
    return f'v{kind.count}{_suffix(kind.element)}'
  return 'f32' if kind == f32 else f'i{kind.width}'


def _call(builder, name: str, result: Type, args, **options) -> Value:
  name = f'llvm.{name}'
  kind = ir.FunctionType(result, [value.type for value in args])
  declared = builder.module.globals.get(name)
  function = declared or ir.Function(builder.module, kind, name)
  return builder.call(function, args, **options)
