"""The product with a matrix in panels on a CPU.

A tile of out is a group of rows and the 32 columns of a panel, whose sums stay
in registers while the panel is read along k, one line of it at a time:

             panel [K, 32]
              k: w w ... w        a line: two vectors of AVX-512
    x [M, K]     |       |
      x x x - k -+-------+---     one number of each row, in all lanes
      x x x - k -+-------+---     sums [rows of a group, 32]
      x x x - k -+-------+---

All groups of rows use a panel while the second cache holds it. Lines to come
are asked for, since a processor foresees no further than to the end of a page
of memory; and each group asks for its share of the next panel, or memory would
rest while all but the first read this one again.

A part of the work is a range of panels, and of groups where there are so many
that a cache would not hold their rows. The order of a sum does not depend on
how many rows there are, nor do its bits.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll
from pallas_kernels.panel_matmul import reference

_ROWS_BYTES = 512 * 1024  # of the rows of a part: a cache holds them
_AHEAD = 32  # lines that are asked for before they are read
_LINE_BYTES = 4 * reference.WIDTH


def panel_matmul(x: jax.Array, panels: jax.Array) -> jax.Array:
  """See `api`.

  Raises:
    NotImplementedError: For other dtypes than float32, for empty operands, and
      where nothing can be compiled.
  """
  rows, inner = x.shape
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if x.dtype != jnp.float32 or panels.dtype != jnp.float32:
    raise NotImplementedError(
      f'dtypes are {x.dtype} and {panels.dtype}, not float32'
    )
  if not x.size or not panels.size:
    raise NotImplementedError(f'{x.shape} or {panels.shape} is empty')
  most = ll.registers() * 3 // 4 * ll.lanes() // reference.WIDTH
  groups = -(-rows // most)
  blocks = min(groups, -(-4 * rows * inner // _ROWS_BYTES))
  parts = min(len(panels), llvm_cpu.parts())
  return llvm_cpu.call(
    _emit,
    (rows, inner, len(panels), groups, blocks, parts),
    (x, panels),
    jax.ShapeDtypeStruct((rows, len(panels) * reference.WIDTH), jnp.float32),
    parts=blocks * parts,
  )


def _emit(builder, static, pointers, part) -> None:
  """One part of out: some panels of some groups of rows."""
  rows, inner, panels, groups, blocks, parts = static
  x, w, out = pointers
  columns = panels * reference.WIDTH
  block = builder.sdiv(part, ll.number(parts))
  first, last = ll.share(
    builder, builder.srem(part, ll.number(parts)), parts, panels
  )
  begin, end = ll.share(builder, block, blocks, groups)
  # The first `more` groups have a row more than the others.
  size, more = divmod(rows, groups)
  middle = ll.most(builder, begin, ll.least(builder, end, ll.number(more)))
  with ll.count(builder, first, last, 1) as panel:
    lines = builder.mul(panel, ll.number(inner * reference.WIDTH))
    lines = ll.place(builder, w, lines)
    for low, high, count in ((begin, middle, size + 1), (middle, end, size)):
      with ll.count(builder, low, high, 1) as group:
        extra = ll.least(builder, group, ll.number(more))
        row = ll.index(builder, group, size, extra)
        corner = ll.index(
          builder, row, columns, builder.mul(panel, ll.number(reference.WIDTH))
        )
        _tile(
          builder,
          (count, inner, columns),
          ll.place(builder, x, builder.mul(row, ll.number(inner))),
          lines,
          ll.place(builder, out, corner),
          (group, groups),
        )


def _tile(builder, static, x, lines, out, which) -> None:
  """The product of a group of rows, one of several, and a panel."""
  group, groups = which
  rows, inner, columns = static
  vectors = range(0, reference.WIDTH, ll.lanes())
  sums = [(m, n) for m in range(rows) for n in vectors]
  start = [ll.zeros() for _ in sums]
  with ll.carry(builder, 0, inner, 1, start) as (k, carried, keep):
    line = ll.place(builder, lines, builder.mul(k, ll.number(reference.WIDTH)))
    places = {n: ll.place(builder, line, n) for n in vectors}
    weights = {n: ll.load_vector(builder, at) for n, at in places.items()}
    for at in places.values():
      ll.prefetch(builder, ll.place(builder, at, _AHEAD * reference.WIDTH))
    if groups > 1:
      following = ll.place(builder, lines, inner * reference.WIDTH)
      step = ll.number(max(1, _LINE_BYTES // groups))
      step = builder.mul(ll.index(builder, group, inner, k), step)
      ll.prefetch(
        builder, ll.place(builder, following, step, ll.i8), soon=False
      )
    values = [
      ll.spread(builder, ll.load(builder, _at(builder, x, m * inner, k)))
      for m in range(rows)
    ]
    keep(
      ll.apply(builder, 'fma', values[m], weights[n], carried[i])
      for i, (m, n) in enumerate(sums)
    )
  for (m, n), value in zip(sums, carried, strict=True):
    ll.store(builder, value, _at(builder, out, m * columns + n))


def _at(builder, base, offset: int, index=0):
  """The address of `base[offset + index]`."""
  return ll.place(
    builder, base, builder.add(ll.number(offset), ll.number(index))
  )
