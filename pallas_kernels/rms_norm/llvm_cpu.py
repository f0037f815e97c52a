"""RMS norms on a CPU: a row after the other, each in the same order.

    x_0 .. x_15   x_16 .. x_31   ...      up to four vectors of sums of squares
                                          run along a row in turns, and are
                                          added as a tree at its end

The parts are ranges of rows, one for each sixteen of them: a row takes less
time than to wake a thread.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll

_ROWS = 16  # of a part


def rms_norm(x: jax.Array, scale: jax.Array, *, epsilon: float) -> jax.Array:
  """See `api`.

  Raises:
    NotImplementedError: As `check` does.
  """
  check(x)
  rows, width = x.shape
  parts = -(-rows // _ROWS)
  return llvm_cpu.call(
    _emit,
    (rows, width, epsilon, parts),
    (x, scale),
    jax.ShapeDtypeStruct(x.shape, jnp.float32),
    parts=parts,
  )


def check(x) -> None:
  """Finds out whether the kernel takes an array, by its shape and dtype.

  Raises:
    NotImplementedError: For other dtypes than float32, for rows that do not
      fill vectors, and where nothing can be compiled.
  """
  rows, width = x.shape
  if reason := llvm_cpu.missing():
    raise NotImplementedError(reason)
  if x.dtype != jnp.float32:
    raise NotImplementedError(f'the dtype is {x.dtype}, not float32')
  if not rows or not width or width % ll.lanes():
    raise NotImplementedError(
      f'{rows} rows of {width} numbers do not fill vectors'
    )


def _emit(builder, static, pointers, part) -> None:
  """The rows of a part."""
  rows, width, epsilon, parts = static
  x, scale, out = pointers
  first, last = ll.share(builder, part, parts, rows)
  vectors = math.gcd(width // ll.lanes(), 4)  # an fma waits for the last one
  starts = range(0, vectors * ll.lanes(), ll.lanes())
  step = vectors * ll.lanes()
  with ll.count(builder, first, last, 1) as row:
    line = builder.mul(row, ll.number(width))
    at = lambda base, i: ll.place(builder, base, builder.add(line, i))
    zeros = [ll.zeros() for _ in starts]
    with ll.carry(builder, 0, width, step, zeros) as (i, squares, keep):
      values = [
        ll.load_vector(builder, at(x, builder.add(i, ll.number(start))))
        for start in starts
      ]
      keep(
        ll.apply(builder, 'fma', value, value, square)
        for value, square in zip(values, squares, strict=True)
      )
    total = ll.total(builder, functools.reduce(builder.fadd, squares))
    mean = builder.fdiv(total, ll.constant(float(width)))
    mean = builder.fadd(mean, ll.constant(epsilon))
    root = ll.apply(builder, 'sqrt', mean)
    factor = ll.spread(builder, builder.fdiv(ll.constant(1.0), root))
    with ll.count(builder, 0, width, ll.lanes()) as i:
      value = builder.fmul(ll.load_vector(builder, at(x, i)), factor)
      weight = ll.load_vector(builder, ll.place(builder, scale, i))
      ll.store(builder, builder.fmul(value, weight), at(out, i))
