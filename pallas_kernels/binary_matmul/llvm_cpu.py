"""Products of signs on a CPU that counts the bits of a vector (AVX-512).

                  16 rows of b, which stay in the first cache of a core
                +-------------------------------------------------------+
    a row of a  | counts_n += popcount(a_w .. a_w+15 xor b_nw .. b_nw+15) |
                +-------------------------------------------------------+

VPOPCNTD counts the bits of sixteen words at once. Sixteen vectors of counts
stay in registers while a row of a goes by, and become one vector of sums at its
end. The words beyond the last whole vector are read with a mask.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll

_WORD = 32  # signs
_ROWS = 64  # of a, of a unit of work


def binary_matmul(
  size: int,
  a: jax.Array,  # [M, W] uint32
  b: jax.Array,  # [N, W] uint32
) -> jax.Array:
  """K - 2 popcount(a xor b) over `size` bits, [M, N] int32; see `api`.

  Raises:
    NotImplementedError: Where there is no VPOPCNTDQ or nothing can be compiled.
  """
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if not ll.has('avx512vpopcntdq'):
    raise NotImplementedError('this processor has no AVX-512 VPOPCNTDQ')
  (rows, words), columns = a.shape, len(b)
  parts = llvm_cpu.parts()
  return llvm_cpu.call(
    _emit,
    (size, rows, columns, words, parts),
    (a, b),
    jax.ShapeDtypeStruct((rows, columns), jnp.int32),
    parts=parts,
  )


def _emit(builder, static, pointers, part) -> None:
  """Some units: 16 rows of b and up to 64 rows of a."""
  size, rows, columns, words, parts = static
  a, b, out = pointers
  lanes = ll.lanes()
  chunks = -(-rows // _ROWS)
  units = -(-columns // lanes) * chunks
  last_column = ll.number(columns - 1)
  whole = size // (_WORD * lanes) * lanes  # words of vectors without a rest
  rest = [max(0, min(_WORD, size - _WORD * (whole + i))) for i in range(lanes)]
  used = ll.constant([2**bits - 1 for bits in rest], ll.vector_of(ll.i32))

  def line(base, index):
    return ll.place(builder, base, builder.mul(index, ll.number(words)), ll.i32)

  first, last = ll.share(builder, part, parts, units)
  with ll.count(builder, first, last, 1) as unit:
    tile = builder.mul(builder.sdiv(unit, ll.number(chunks)), ll.number(lanes))
    begin = builder.mul(builder.srem(unit, ll.number(chunks)), ll.number(_ROWS))
    end = builder.add(begin, ll.number(_ROWS))
    end = ll.least(builder, end, ll.number(rows))
    # A last tile counts the last row again, and does not write what it counts.
    lines = [
      line(b, ll.least(builder, builder.add(tile, ll.number(n)), last_column))
      for n in range(lanes)
    ]
    inside = builder.icmp_signed(
      '<',
      ll.ramp(builder, tile),
      ll.spread(builder, ll.constant(columns, ll.i32)),
    )
    with ll.count(builder, begin, end, 1) as row:
      own = line(a, row)
      none = [ll.zeros(ll.i32) for _ in lines]
      with ll.carry(builder, 0, whole, lanes, none) as (w, counts, keep):
        read = lambda base: ll.load_vector(
          builder, ll.place(builder, base, w, ll.i32), ll.i32
        )
        keep(_counted(builder, read, own, lines, counts))
      if size > _WORD * whole:
        read = lambda base: ll.load_first(
          builder,
          ll.place(builder, base, whole, ll.i32),
          words - whole,
          ll.i32,
        )
        counts = _counted(builder, read, own, lines, counts, used)
      differing = ll.totals(builder, counts)
      every = lambda value: ll.spread(builder, ll.constant(value, ll.i32))
      twice = builder.add(differing, differing)
      at = builder.add(builder.mul(row, ll.number(columns)), tile)
      ll.store_where(
        builder,
        builder.sub(every(size), twice),
        ll.place(builder, out, at, ll.i32),
        inside,
      )


def _counted(builder, read, own, lines, counts, used=None) -> list:
  """Adds the bits in which a vector of words differs from that of each line.

  Those alone that are `used`, a vector of masks, where it is given.
  """
  words, counted = read(own), []
  for line, count in zip(lines, counts, strict=True):
    differing = builder.xor(words, read(line))
    if used is not None:
      differing = builder.and_(differing, used)
    counted.append(builder.add(count, ll.apply(builder, 'ctpop', differing)))
  return counted
