"""Rows of floats as int8 on a CPU, in a kernel that multiplies them."""

from pallas_kernels import llvm_ir as ll
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.int8_matmul import reference


def quantized(builder, x: ll.Value, rows: int, inner: int, groups: int):
  """Emits int8 rows, their scales and sums of groups; where they lie.

  As `reference.quantize_rows` does: x is [rows, inner] float32, and the results
  are on the stack, [rows, inner] int8, [rows] float32 and [rows, groups] int32.
  """
  values = ll.room(builder, rows * inner, ll.i8)
  scales = ll.room(builder, rows)
  totals = ll.room(builder, rows * groups, ll.i32)
  lanes = ll.lanes()
  with ll.count(builder, 0, rows, 1) as m:
    line = builder.mul(m, ll.number(inner))
    steps = ll.carry(builder, 0, inner, lanes, [ll.zeros(ll.i32)])
    with steps as (k, largest, keep):
      place = ll.place(builder, x, builder.add(line, k))
      size = ll.apply(builder, 'fabs', ll.load_vector(builder, place))
      # The bits of numbers that are not negative are ordered as they are, with
      # NaN above all, and integers are compared in one step.
      bits = builder.bitcast(size, ll.vector_of(ll.i32))
      keep([ll.apply(builder, 'umax', largest[0], bits)])
    largest = ll.apply(builder, 'vector.reduce.umax', largest[0])
    largest = builder.bitcast(largest, ll.f32)
    scale = builder.fmul(largest, ll.constant(1 / reference.LARGEST))
    tiny = builder.fcmp_ordered('<', scale, ll.constant(formats.SMALLEST))
    scale = builder.select(tiny, ll.constant(1.0), scale)
    ll.store(builder, scale, ll.place(builder, scales, m))
    inverse = builder.fdiv(ll.constant(1.0), scale)
    inverse = ll.spread(builder, inverse)
    with ll.count(builder, 0, groups, 1) as g:
      begin = builder.add(line, builder.mul(g, ll.number(inner // groups)))
      steps = ll.carry(builder, 0, inner // groups, lanes, [ll.zeros(ll.i32)])
      with steps as (k, sums, keep):
        index = builder.add(begin, k)
        vector = ll.load_vector(builder, ll.place(builder, x, index))
        whole = _rounded(builder, builder.fmul(vector, inverse))
        narrow = builder.trunc(whole, ll.vector_of(ll.i8))
        ll.store(builder, narrow, ll.place(builder, values, index, ll.i8))
        keep([builder.add(sums[0], whole)])
      total = ll.apply(builder, 'vector.reduce.add', sums[0])
      index = builder.add(builder.mul(m, ll.number(groups)), g)
      ll.store(builder, total, ll.place(builder, totals, index, ll.i32))
  return values, scales, totals


def _rounded(builder, ratio):
  """A vector of float32 to the nearest int32 in -127 .. 127."""
  ratio = ll.apply(builder, 'roundeven', ratio)
  for name, bound in (('minnum', 127.0), ('maxnum', -127.0)):
    bound = ll.spread(builder, ll.constant(bound))
    ratio = ll.apply(builder, name, ratio, bound)
  return builder.fptosi(ratio, ll.vector_of(ll.i32))
