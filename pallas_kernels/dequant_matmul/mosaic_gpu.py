"""Products with quantized weights on a Hopper GPU, in Pallas (Mosaic GPU).

A block of threads computes 256 columns of the result for up to 64 rows of x,
turned around, so that one row of x fills a product of 8 and not of 64:

    out' = w' x'

Three warpgroups share it:

    HBM               shared memory, a ring      shared memory     registers
    x [m, k] -------> x slot 0 | slot 1 | ... ------------------+
    scales [1, 256] > scales of the slots --+                   |
    w [64, 256] ----> w slot 0 | slot 1 |  -+-> w [k, 128] -----+-> acc [128, m]
                                            +-> w [k, 128] -----+-> acc [128, m]
      copied by warpgroup 2                   dequantized and multiplied by
                                              warpgroup 0 and by warpgroup 1

A tile of w is 64 rows as they are stored. Packed, the low and the high halves
of its bytes are two tiles of 64 rows of w, each multiplied with its own columns
of x, which are put in that order before: nothing is woven together.

    bytes [64, 128]     w, two of [64, 128]
      +--------+   low  +--------+
      | 16 rows| -----> |  0..15 |   times x[:, 0..15, 32..47, 64..79, 96..111]
      | 16 rows|  high  +--------+
      | ...    | -----> | 16..31 |   times x[:, 16..31, 48..63, ...]
      +--------+        +--------+

Few columns are few blocks: parts of K are worked on apart (split-K), and XLA
adds them up. Tiles of w may hang over the edge, where copies fill in zeros.
These may be codes of something, but x is zero there, and so are the scales. So
nothing pads w unless its columns are not whole 64s or its rows not whole 8s.

Up to four rows are left to `mosaic_gpu_rows`: one row would wait in every tile
for shared memory and for a product of which it needs an eighth. Here eight rows
take the time of one, and every 64 of them unpack w again: few bits save memory,
and time only where rows are few.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels import shards
from pallas_kernels.attention import mosaic_gpu_tiles as tiles
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.dequant_matmul import mosaic_gpu_rows

COLUMNS = 128  # of a computing warpgroup
DEPTH = 64  # stored rows of a tile
ROWS = (8, 16, 32, 64)  # of x, in a block; with more registers spill
MOST_STEPS = 6  # slots of the ring
_COMPUTING = 2  # warpgroups
_UNIT = 64  # bytes of a row that are copied together
_FEWEST_ROWS = 16  # stored rows that share a scale
_MEMORY = 200 * 1024  # of the 227 KiB that a block may share
_MULTIPROCESSORS = 132  # of an H100 or H200; each holds one block


def dequant_matmul(
  x: jax.Array,  # [M, K]
  values: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  scales: jax.Array,  # [K / G, N] float32 or float16
  codebook: jax.Array | None = None,  # [16] float32
  *,
  transposed: bool,
  out_dtype: jax.typing.DTypeLike,
  splits: int | None = None,
  interpret: Any = False,
) -> jax.Array:
  """x @ w [M, N]; see `api`.

  `splits` parts of K are worked on apart; None is as many as fill the device.
  `interpret` runs it without a GPU, as `plgpu.kernel` does.

  Raises:
    NotImplementedError: The product is with w', a dtype is another one, or
      groups are neither whole tiles nor 16 or more rows that divide one.
  """
  halves = 2 if values.dtype == jnp.uint8 else 1  # values of a byte
  out_dtype = jnp.dtype(out_dtype)
  stored, n = values.shape
  group = stored // len(scales)
  _check(x, out_dtype, transposed, group, stored, halves)
  m = len(x)
  if m <= mosaic_gpu_rows.MOST_ROWS:
    return mosaic_gpu_rows.dequant_matmul(
      x,
      values,
      scales,
      codebook,
      out_dtype=out_dtype,
      splits=splits,
      interpret=interpret,
    )
  rows = min([r for r in ROWS if r >= m], default=ROWS[-1])
  count = pl.cdiv(stored, DEPTH)
  width = _COMPUTING * COLUMNS
  grid = pl.cdiv(n, width), pl.cdiv(m, rows)
  if splits is None:
    splits = max(1, min(_MULTIPROCESSORS // (grid[0] * grid[1]), count))
  # Either a tile has several rows of scales, or a row serves several tiles.
  scale_rows = max(1, DEPTH // group)
  serves = pl.cdiv(group, DEPTH)
  more = pl.cdiv(count, serves) * scale_rows - len(scales)
  scales = scales.astype(jnp.float32)
  scales = jnp.pad(scales, ((0, more), (0, grid[0] * width - n)))
  # Copies may end beyond the edge, but not inside of 8 rows or 64 bytes.
  values = jnp.pad(values, ((0, -stored % 8), (0, -n % _UNIT)))
  x = _arranged(x, halves, count * DEPTH * halves, grid[1] * rows)
  # The least that is copied together of a row are 32 bytes.
  whole = splits == 1 and rows * out_dtype.itemsize >= 32
  partial_dtype = out_dtype if whole else jnp.dtype(jnp.float32)
  part = min(rows, 128 // partial_dtype.itemsize)
  wide = _COMPUTING * halves * DEPTH * COLUMNS * x.dtype.itemsize
  sent = _COMPUTING * COLUMNS * part * partial_dtype.itemsize
  slot = DEPTH * width + halves * DEPTH * rows * x.dtype.itemsize
  slot += scale_rows * width * 4
  steps = min(MOST_STEPS, (_MEMORY - wide - sent) // slot)
  out = plgpu.kernel(
    functools.partial(_kernel, group=group, serves=serves, splits=splits),
    out_type=shards.out_shape(
      (splits, grid[0] * width, len(x)), partial_dtype, x
    ),
    scratch_types={
      'x_smem': tiles.tiled((steps, halves, rows, DEPTH), x.dtype),
      'values_smem': tiles.tiled(
        (steps, _COMPUTING, DEPTH, COLUMNS), values.dtype, swizzle=_UNIT
      ),
      'scales_smem': plgpu.SMEM((steps, scale_rows, width), jnp.float32),
      'wide_smem': tiles.tiled((_COMPUTING, halves, DEPTH, COLUMNS), x.dtype),
      # Part of a result at a time: all of it would not fit beside the ring.
      'out_smem': tiles.tiled((_COMPUTING, COLUMNS, part), partial_dtype),
      'loaded': plgpu.Barrier(
        num_arrivals=halves + _COMPUTING + 1, num_barriers=steps
      ),
      'used': plgpu.Barrier(num_arrivals=_COMPUTING, num_barriers=steps),
    },
    grid=(*grid, splits),
    grid_names=('column', 'row', 'part'),
    num_threads=_COMPUTING + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
  )(x, values, scales, *([] if codebook is None else [codebook]))
  return out.sum(0).T[:m, :n].astype(out_dtype)


def _check(x, out_dtype, transposed, group, stored, halves) -> None:
  if transposed:
    raise NotImplementedError("a product with w' is not in this kernel.")
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f'x must be bfloat16 or float16, got {x.dtype}')
  if out_dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f'out_dtype must be float32, bfloat16 or float16, got {out_dtype}'
    )
  divides = group >= _FEWEST_ROWS and DEPTH % group == 0
  if group != stored and group % DEPTH and not divides:
    raise NotImplementedError(
      f'groups must be all of K, or multiples or parts of {halves * DEPTH} rows'
      f' and at least {halves * _FEWEST_ROWS}, got {halves * group}'
    )


def _arranged(x, halves: int, size: int, rows: int) -> jax.Array:
  """x [M, K] as tiles of w meet it: [rows, size], zero beyond M and K.

  Of every tile the columns that meet low halves come first.
  """
  x = jnp.pad(x, ((0, rows - len(x)), (0, size - x.shape[1])))
  if halves == 1:
    return x
  x = x.reshape(rows, size // (2 * DEPTH), -1, 2, formats.HALF)
  return x.swapaxes(2, 3).reshape(rows, size)


def _kernel(
  x_ref,
  values_ref,
  scales_ref,
  *refs,
  x_smem,
  values_smem,
  scales_smem,
  wide_smem,
  out_smem,
  loaded,
  used,
  group: int,
  serves: int,
  splits: int,
):
  """256 columns of a result over one part of K; `refs` are codebook and out."""
  *codebook, out_ref = refs
  warpgroup, part = lax.axis_index('warpgroup'), lax.axis_index('part')
  steps, halves, m, _ = x_smem.shape
  rows = pl.ds(lax.axis_index('row') * m, m)
  first = lax.axis_index('column') * (_COMPUTING * COLUMNS)
  count = pl.cdiv(values_ref.shape[0], DEPTH)
  share = lambda n: lax.div(count * n, jnp.int32(splits))
  low, high = share(part), share(part + 1)
  slot_of = lambda n: lax.rem(n - low, jnp.int32(steps))

  @pl.when(warpgroup == _COMPUTING)
  def _():
    plgpu.set_max_registers(40, action='decrease')

    def load(n, carry):
      slot = slot_of(n)
      # The first round finds the ring empty: nobody will say so.
      pl.when(n >= low + steps)(lambda: plgpu.barrier_wait(used.at[slot]))

      def copy(source, target):
        plgpu.copy_gmem_to_smem(source, target, loaded.at[slot])

      for own in range(_COMPUTING):
        columns = pl.ds(first + own * COLUMNS, COLUMNS)
        tile = pl.ds(n * DEPTH, DEPTH), columns
        copy(values_ref.at[tile], values_smem.at[slot, own])
      for half in range(halves):
        depth = pl.ds((n * halves + half) * DEPTH, DEPTH)
        copy(x_ref.at[rows, depth], x_smem.at[slot, half])
      height, width = scales_smem.shape[1:]
      row = lax.div(n, jnp.int32(serves)) * height
      tile = pl.ds(row, height), pl.ds(first, width)
      copy(scales_ref.at[tile], scales_smem.at[slot])
      return carry

    lax.fori_loop(low, high, load, None)

  @pl.when(warpgroup < _COMPUTING)
  def _():
    plgpu.set_max_registers(232, action='increase')
    layout = plgpu.Layout.WGMMA_8BIT  # four bytes of a row lie together
    wide = wide_smem.at[warpgroup]
    values_of_codes = [ref[i] for ref in codebook for i in range(16)]
    shape = DEPTH, COLUMNS

    def scales_of(slot):
      """The scale of each weight of a tile, [64, 128]."""
      mine = pl.ds(warpgroup * COLUMNS, COLUMNS)
      each = [
        compat.load(scales_smem.at[slot, i, mine], layout.reduce(0))
        for i in range(scales_smem.shape[1])
      ]
      each = [
        plgpu.layout_cast(lax.broadcast_in_dim(own, shape, [1]), layout)
        for own in each
      ]
      row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
      scales = each[0]
      for i, own in enumerate(each[1:], 1):
        scales = jnp.where(row >= i * group, own, scales)
      return scales

    def dequantize(slot):
      stored = compat.load(values_smem.at[slot, warpgroup], layout)
      parts = [stored]
      if halves == 2:
        parts = formats.halves(stored, signed=not codebook)
      if codebook:
        parts = [formats.look_up(codes, values_of_codes) for codes in parts]
      scales = scales_of(slot)
      for half, values in enumerate(parts):
        weights = values.astype(jnp.float32) * scales
        wide.at[half][...] = weights.astype(wide.dtype)
      plgpu.commit_smem()

    def multiply(acc):
      def step(n, carry):
        slot = slot_of(n)
        plgpu.barrier_wait(loaded.at[slot])
        dequantize(slot)
        for half in range(halves):
          plgpu.wgmma(
            acc,
            compat.transposed(wide.at[half]),
            compat.transposed(x_smem.at[slot, half]),
          )
        plgpu.wgmma_wait(0)
        tiles.free(used.at[slot], n + steps < high)
        return carry

      lax.fori_loop(low, high, step, None)
      return acc[...]

    product = pl.run_scoped(multiply, plgpu.ACC((COLUMNS, m), jnp.float32))
    sent = out_smem.at[warpgroup]
    columns = pl.ds(first + warpgroup * COLUMNS, COLUMNS)
    size = out_smem.shape[2]
    for begin in range(0, m, size):
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      sent[...] = product[:, begin : begin + size].astype(out_smem.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        sent,
        out_ref.at[part, columns, rows].at[:, begin : begin + size],
      )
    plgpu.wait_smem_to_gmem(0)
