"""A few rows and quantized weights on a Hopper GPU, without its tensor cores.

One row of x is a sum for each column of w, and what limits it is how fast
weights become numbers. So each thread owns four columns and goes down a part
of their rows, while copies fill a ring of tiles ahead of it:

    HBM                shared memory, a ring        registers of thread t
    w [32, 512]  ----> w slot 0 | slot 1 | ...  --> bytes of columns t, t + 128,
    x [32]       ----> x slot 0 | slot 1 | ...        t + 256, t + 384
    scales [512] ----> scales of the slots      --> sums and totals of them

    sum_n   = sum_k x_k q_kn        within a group of rows
    total_n = sum_g s_gn sum_gn     which XLA adds up over parts of K (split-K)

Integers become floats without a conversion, of which a multiprocessor does few:
a float32 of 2^23 and more has whole numbers in its last bits, so

    bits of 2^23 + 8 + q  =  bits of 2^23 | (q in two's complement ^ 8)

and a subtraction leaves q. A high half stays where it is in its byte, 16 times
as large, and x is divided by 16 for it. A byte of two codes is looked up at
once: a table in shared memory holds both values of each of its 256, in float16,
and that 32 times, for every thread of a warp in a bank of its own.

What to expect of one row on an H200, and what came. At 4.3 TB/s a
multiprocessor gets 18.6 bytes a cycle (at 1.755 GHz), in which it issues 128
instructions, counting each thread, 64 of them on integers, and reads 128 bytes
of shared memory. A weight of 4 bits with its share of a scale of 64 is 0.56
bytes, so memory brings 33 of them a cycle, or 18.6 of int8.

             instructions   at most, of the memory's rate   measured
    int8         4.1                 1.0                       0.89
    int4         3.6                 1.0                       0.57
    NF4          3.6                 0.95                      0.62

What is missing at 4 bits is not known: instructions wait for each other too.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith
from jax.extend.mlir.dialects import memref
from jax.extend.mlir.dialects import vector
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels import shards
from pallas_kernels.dequant_matmul import formats

MOST_ROWS = 4  # of x; each has sums of its own in registers
DEPTH = 32  # stored rows of a tile
COPIES = 2  # that bring a tile
_MULTIPROCESSORS = 132  # of an H100 or H200
_LANES = 128  # threads of a warpgroup
_COPIED = 256  # columns that one copy brings, the most there are
_UNIT = 16  # bytes that a row in memory is a multiple of
_BANKS = 32  # of shared memory
_WHOLE = 0x4B000000  # the bits of 2^23


class Ring(NamedTuple):
  """What was fastest on an H200, of those that were tried (RESULTS.md)."""

  steps: int  # slots
  blocks: int  # of threads, for each multiprocessor
  unrolled: int  # rows of a tile


INTEGERS, CODES = Ring(2, 4, 8), Ring(2, 3, 16)


def dequant_matmul(
  x: jax.Array,  # [M, K] of a float dtype
  values: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  scales: jax.Array,  # [K / G, N] float32 or float16
  codebook: jax.Array | None = None,  # [16] float32
  *,
  out_dtype: jax.typing.DTypeLike,
  splits: int | None = None,
  interpret: Any = False,
) -> jax.Array:
  """x @ w [M, N] of up to `MOST_ROWS` rows; see `api`.

  Takes what `mosaic_gpu` takes, which checks it. Weights are not rounded to
  the dtype of x; values of a codebook are to float16, over their largest.
  """
  halves = 2 if values.dtype == jnp.uint8 else 1  # values of a byte
  stored, n = values.shape
  group = stored // len(scales)
  m = len(x)
  ring, largest = INTEGERS, None
  if codebook is not None:
    ring = CODES
    largest = jnp.abs(codebook).max()
    codebook = codebook / formats.usable(largest)
    # The interpreter knows no gathering from shared memory.
    codebook = codebook if interpret else _pairs(codebook)
  count = pl.cdiv(stored, DEPTH)
  width = COPIES * _COPIED
  columns = pl.cdiv(n, width)
  if splits is None:
    splits = max(1, min(ring.blocks * _MULTIPROCESSORS // columns, count))
  # Either a tile has several rows of scales, or a row serves several tiles.
  scale_rows = max(1, DEPTH // group)
  serves = pl.cdiv(group, DEPTH)
  more = pl.cdiv(count, serves) * scale_rows - len(scales)
  scales = scales.astype(jnp.float32)
  scales = jnp.pad(scales, ((0, more), (0, -n % _UNIT)))
  values = lax.bitcast_convert_type(values, jnp.uint8)
  values = jnp.pad(values, ((0, 0), (0, -n % _UNIT)))
  x = _arranged(x, halves, count * DEPTH, codebook is None)
  steps = ring.steps
  scratch = {
    'x_smem': plgpu.SMEM((steps, halves * m, DEPTH), jnp.float32),
    'values_smem': plgpu.SMEM((steps, COPIES, DEPTH, _COPIED), jnp.uint8),
    'scales_smem': plgpu.SMEM(
      (steps, COPIES, scale_rows, _COPIED), jnp.float32
    ),
    'out_smem': plgpu.SMEM((COPIES, m, _COPIED), jnp.float32),
    'loaded': plgpu.Barrier(num_arrivals=2 * COPIES + 1, num_barriers=steps),
  }
  if codebook is not None and not interpret:
    scratch['table_smem'] = plgpu.SMEM(codebook.shape, codebook.dtype)
    scratch['table_loaded'] = plgpu.Barrier()
  out = plgpu.kernel(
    functools.partial(
      _kernel,
      group=group,
      serves=serves,
      splits=splits,
      unrolled=min(ring.unrolled, group),
    ),
    out_type=shards.out_shape((splits, m, columns * width), jnp.float32, x),
    scratch_types=scratch,
    grid=(columns, splits),
    grid_names=('column', 'part'),
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
  )(x, values, scales, *([] if codebook is None else [codebook]))
  out = out.sum(0)[:, :n]
  return (out if largest is None else out * largest).astype(out_dtype)


def _arranged(x, halves: int, size: int, integers: bool) -> jax.Array:
  """x [M, K] as float32 [halves M, size]; what meets low halves comes first."""
  x = x.astype(jnp.float32)
  if halves == 2:
    low, high = formats.columns_of_halves(x)
    x = jnp.concatenate([low, high * (1 / 16) if integers else high])
  return jnp.pad(x, ((0, 0), (0, size - x.shape[1])))


def _pairs(codebook) -> jax.Array:
  """[256, 32] uint32: both values of each byte in float16, low half first."""
  bits = lax.bitcast_convert_type(codebook.astype(jnp.float16), jnp.uint16)
  byte = jnp.arange(256)
  low, high = (bits[half].astype(jnp.uint32) for half in (byte & 15, byte >> 4))
  return jnp.broadcast_to((low | high << 16)[:, None], (256, _BANKS))


def _kernel(
  x_ref,
  values_ref,
  scales_ref,
  *refs,
  x_smem,
  values_smem,
  scales_smem,
  out_smem,
  loaded,
  table_smem=None,
  table_loaded=None,
  group: int,
  serves: int,
  splits: int,
  unrolled: int,
):
  """Some columns of a result over one part of K; `refs`: codebook and out."""
  *codebook, out_ref = refs
  part = lax.axis_index('part')
  steps, rows, depth = x_smem.shape
  copies, m, copied = out_smem.shape
  height = scales_smem.shape[2]
  first = lax.axis_index('column') * (copies * copied)
  count = pl.cdiv(values_ref.shape[0], depth)
  share = lambda n: lax.div(count * n, jnp.int32(splits))
  low, high = share(part), share(part + 1)
  slot_of = lambda n: lax.rem(n - low, jnp.int32(steps))
  layout = plgpu.Layout.WG_STRIDED((_LANES,), vec_size=1)
  owned = [(i, pl.ds(j, _LANES)) for i in range(copies) for j in (0, _LANES)]

  def load(n):
    slot = slot_of(n)
    copy = lambda source, target: plgpu.copy_gmem_to_smem(
      source, target, loaded.at[slot]
    )
    tile = pl.ds(n * depth, depth)
    scale = pl.ds(lax.div(n, jnp.int32(serves)) * height, height)
    for i in range(copies):
      own = pl.ds(first + i * copied, copied)
      copy(values_ref.at[tile, own], values_smem.at[slot, i])
      copy(scales_ref.at[scale, own], scales_smem.at[slot, i])
    copy(x_ref.at[:, tile], x_smem.at[slot])

  for n in range(steps):
    pl.when(low + n < high)(functools.partial(load, low + n))
  if table_smem is not None:
    plgpu.copy_gmem_to_smem(codebook[0], table_smem, table_loaded)
    plgpu.barrier_wait(table_loaded)
    numbers = functools.partial(_pair_of, table_smem, layout)
  elif codebook:
    numbers = functools.partial(_codes_of, [codebook[0][i] for i in range(16)])
  else:
    masks = [(0xFF, 0x80)] if rows == m else [(0x0F, 0x08), (0xF0, 0x80)]
    numbers = functools.partial(_integers_of, masks)

  def zeros():
    zero = jnp.zeros((_LANES,), jnp.float32)
    zero = plgpu.layout_cast(zero, layout)
    return [[zero] * len(owned) for _ in range(m)]

  def step(n, totals):
    slot = slot_of(n)
    plgpu.barrier_wait(loaded.at[slot])
    size = min(group, depth)

    def add(begin, sums):
      for k in range(unrolled):
        k += begin * unrolled
        each = [x_smem[slot, i, k] for i in range(rows)]
        for c, (i, lanes) in enumerate(owned):
          byte = compat.load(values_smem.at[slot, i, k, lanes], layout)
          for half, number in enumerate(numbers(byte.astype(jnp.uint32))):
            for row in range(m):
              sums[row][c] += number * each[half * m + row]
      return sums

    for g in range(depth // size):
      begin, end = g * size // unrolled, (g + 1) * size // unrolled
      sums = lax.fori_loop(begin, end, add, zeros())
      for c, (i, lanes) in enumerate(owned):
        scale = compat.load(scales_smem.at[slot, i, g, lanes], layout)
        for row in range(m):
          totals[row][c] += sums[row][c] * scale
    # All threads have read the slot, and it may be filled again.
    plgpu.commit_smem()
    pl.when(n + steps < high)(lambda: load(n + steps))
    return totals

  totals = lax.fori_loop(low, high, step, zeros())
  for row in range(m):
    for c, (i, lanes) in enumerate(owned):
      out_smem[i, row, lanes] = totals[row][c]
  plgpu.commit_smem()
  for i in range(copies):
    own = pl.ds(first + i * copied, copied)
    plgpu.copy_smem_to_gmem(out_smem.at[i], out_ref.at[part, :, own])
  plgpu.wait_smem_to_gmem(0)


def _integers_of(masks, byte):
  """The integers of bytes, a high half 16 times as large."""
  return [
    lax.bitcast_convert_type(
      byte & jnp.uint32(mask) ^ jnp.uint32(_WHOLE | sign), jnp.float32
    )
    - jnp.float32(2**23 + sign)
    for mask, sign in masks
  ]


def _codes_of(values, byte):
  """The values of both codes of bytes, selected one by one."""
  return [formats.look_up(codes, values) for codes in (byte & 15, byte >> 4)]


def _pair_of(table_smem, layout, byte):
  """The values of both codes of bytes, from the table."""

  @plgpu.inline_mgpu(
    arg_types=(layout, layout, plgpu.RefType()),
    return_type=plgpu.ShapeDtypeStruct(byte.shape, jnp.uint32, layout=layout),
  )
  def gather(_, byte, bank, table):
    def one(*place):
      index = ir.IndexType.get()
      place = [
        arith.index_castui(index, vector.extract(number, [], [0]))
        for number in place
      ]
      return vector.broadcast(
        byte.registers.flat[0].type, memref.load(table, place)
      )

    return byte._pointwise(one, bank, output_is_signed=False)

  lane = plgpu.broadcasted_iota(jnp.uint32, byte.shape, 0, layout=layout)
  pair = gather(byte, lane & jnp.uint32(_BANKS - 1), table_smem)
  return [
    lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16).astype(
      jnp.float32
    )
    for half in (pair, pair >> 16)
  ]
