"""Products of signs on a CPU that counts the bits of a vector (AVX-512).

                        16 rows of b, a lane each
               +------------------------------------------+
    a row of a | counts += popcount(a_w xor b_0w .. b_15w) |  w = 0 .. 15,
               +------------------------------------------+

then the next row of a, and then the next sixteen words. VPOPCNTD counts the
bits of sixteen words at once, those of a lane for one row of b, so that no sum
goes across a vector. In memory the words of a row lie side by side: a block of
16 x 16 words is turned, stays in registers, and serves all rows of a unit of
work, whose counts stay in the first cache of a core.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll

_WORD = 32  # signs
_ROWS = 128  # of a, of a unit of work


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
  """Some units: 16 rows of b and up to 128 rows of a."""
  size, rows, columns, words, parts = static
  a, b, out = pointers
  lanes = ll.lanes()
  chunks = -(-rows // _ROWS)
  most = -(-rows // chunks)
  units = -(-columns // lanes) * chunks
  last_block = (words - 1) // lanes * lanes
  counts = ll.room(builder, most * lanes, ll.i32)

  first, last = ll.share(builder, part, parts, units)
  with ll.count(builder, first, last, 1) as unit:
    tile = builder.mul(builder.sdiv(unit, ll.number(chunks)), ll.number(lanes))
    begin = builder.mul(builder.srem(unit, ll.number(chunks)), ll.number(most))
    end = builder.add(begin, ll.number(most))
    end = ll.least(builder, end, ll.number(rows))
    # A last tile counts the last row again, and does not write what it counts.
    lines = [
      ll.least(builder, builder.add(tile, ll.number(n)), ll.number(columns - 1))
      for n in range(lanes)
    ]
    inside = builder.icmp_signed(
      '<',
      ll.ramp(builder, tile),
      ll.spread(builder, ll.constant(columns, ll.i32)),
    )

    def own(row):
      index = builder.mul(builder.sub(row, begin), ll.number(lanes))
      return ll.place(builder, counts, index, ll.i32)

    def block(w, signs, write):
      """Counts words from `w` on, the lowest bits of each, by `signs`."""
      at = lambda base, row: ll.place(
        builder, base, ll.index(builder, row, words, w), ll.i32
      )
      read = [
        ll.load_first(builder, at(b, row), len(signs), ll.i32) for row in lines
      ]
      turned = ll.transposed(builder, read)
      with ll.count(builder, begin, end, 1) as row:
        count = ll.load_vector(builder, own(row), ll.i32)
        write(row, _counted(builder, count, at(a, row), turned, signs))

    with ll.count(builder, begin, end, 1) as row:
      ll.store(builder, ll.zeros(ll.i32), own(row))
    with ll.count(builder, 0, last_block, lanes) as w:
      keep = lambda row, count: ll.store(builder, count, own(row))
      block(w, [_WORD] * lanes, keep)

    def finish(row, count):
      every = ll.spread(builder, ll.constant(size, ll.i32))
      product = builder.sub(every, builder.add(count, count))
      at = ll.index(builder, row, columns, tile)
      address = ll.place(builder, out, at, ll.i32)
      ll.store_where(builder, product, address, inside)

    signs = [min(_WORD, size - _WORD * w) for w in range(last_block, words)]
    block(ll.number(last_block), signs, finish)


def _counted(builder, count, address, block, signs) -> ll.Value:
  """Adds the bits in which spread words from an address on differ from a block.

  `signs` says of each word how many of its lowest bits are signs.
  """
  for n, used in enumerate(signs):
    word = ll.load(builder, ll.place(builder, address, n, ll.i32), ll.i32)
    differing = builder.xor(ll.spread(builder, word), block[n])
    if used < _WORD:
      mask = ll.constant(2**used - 1, ll.i32)
      differing = builder.and_(differing, ll.spread(builder, mask))
    count = builder.add(count, ll.apply(builder, 'ctpop', differing))
  return count
