"""The int8 product on a Hopper GPU, in Pallas (Mosaic GPU).

A block of threads computes 128 x 256 integers. Three warpgroups share it:

    HBM              shared memory, a ring         registers
    x [128, k] ----> x slot 0 | slot 1 | ... --+   +- 64 rows:  acc [64, 256]
    w' [256, k] ---> w slot 0 | slot 1 | ... --+---+
      copied by warpgroup 2                        +- 64 rows:  acc [64, 256]

acc is int32 and exact; after the last tile it is multiplied by the scales of
its rows and columns and rounded once. The tensor cores take 8-bit numbers with
the summed axis last, so w is transposed before, as rows are quantized before:
passes over memory that cost a fifth of a product of 8192^3 and half of one of
few rows.
"""

from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels import shards
from pallas_kernels.attention import mosaic_gpu_tiles as tiles
from pallas_kernels.int8_matmul import reference

ROWS = 64  # of a computing warpgroup: the height of a wgmma
COLUMNS = 256
DEPTH = 128  # of a tile along the summed axis
STEPS = 4  # slots of the ring
_COMPUTING = 2  # warpgroups
_NEAR = 8  # blocks above each other that run one after the other


def int8_matmul(
  x: jax.Array,  # [M, K] float, or int8
  w: jax.Array,  # [K, N] int8
  w_scales: jax.Array,  # [N] float32
  x_scales: jax.Array | None = None,  # [M] float32, of int8 x
  w_offsets: jax.Array | None = None,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  interpret: Any = False,
) -> jax.Array:
  """(q @ w) s_x s_w, [M, N]; see `api`.

  `interpret` runs it without a GPU, as `plgpu.kernel` does.

  Raises:
    NotImplementedError: `out_dtype` is not float32, bfloat16 or float16, an
      axis is empty, or weights have scales of groups or offsets.
  """
  reference.only_scales_of_columns(w, w_scales, w_offsets)
  out_dtype = jnp.dtype(out_dtype)
  if out_dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise NotImplementedError(
      f'out_dtype must be float32, bfloat16 or float16, got {out_dtype}'
    )
  if 0 in (*x.shape, *w.shape):
    raise NotImplementedError(f'an axis is empty: x {x.shape}, w {w.shape}')
  if x_scales is None:
    x, x_scales = reference.quantize_rows(x)
  (m, k), n = x.shape, w.shape[1]
  rows = _COMPUTING * ROWS
  up = lambda size, multiple: -size % multiple
  # Zeros add nothing, and rows and columns beyond the real ones are cut off.
  x = jnp.pad(x, ((0, up(m, rows)), (0, up(k, DEPTH))))
  w = jnp.pad(w.T, ((0, up(n, COLUMNS)), (0, up(k, DEPTH))))
  x_scales = jnp.pad(x_scales, (0, up(m, rows)))
  w_scales = jnp.pad(w_scales, (0, up(n, COLUMNS)))
  ring = lambda arrivals: plgpu.Barrier(
    num_arrivals=arrivals, num_barriers=STEPS
  )
  out = plgpu.kernel(
    _kernel,
    out_type=shards.out_shape((x.shape[0], w.shape[0]), out_dtype, x),
    scratch_types=[
      tiles.tiled((STEPS, rows, DEPTH), jnp.int8),
      tiles.tiled((STEPS, COLUMNS, DEPTH), jnp.int8),
      plgpu.SMEM((rows,), jnp.float32),
      plgpu.SMEM((COLUMNS,), jnp.float32),
      # Part of a result at a time: all of it would not fit beside the ring.
      tiles.tiled(
        (_COMPUTING, ROWS, 128 // jnp.dtype(out_dtype).itemsize), out_dtype
      ),
      ring(2),
      ring(_COMPUTING),
      plgpu.Barrier(num_arrivals=2),
    ],
    grid=(x.shape[0] // rows * (w.shape[0] // COLUMNS),),
    grid_names=('block',),
    num_threads=_COMPUTING + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
  )(x, w, x_scales, w_scales)
  return out[:m, :n]


def _kernel(
  x_ref,
  w_ref,
  x_scales_ref,
  w_scales_ref,
  out_ref,
  x_smem,
  w_smem,
  x_scales_smem,
  w_scales_smem,
  out_smem,
  loaded,
  used,
  scales_loaded,
):
  """128 rows and 256 columns of the result."""
  warpgroup = lax.axis_index('warpgroup')
  height = _COMPUTING * ROWS
  # Blocks that run at once are near each other, and share what they read.
  row, column = plgpu.planar_snake(
    lax.axis_index('block'),
    (x_ref.shape[0] // height, w_ref.shape[0] // COLUMNS),
    minor_dim=0,
    tile_width=_NEAR,
  )
  rows = pl.ds(row * height, height)
  columns = pl.ds(column * COLUMNS, COLUMNS)
  steps = x_ref.shape[1] // DEPTH
  slot_of = lambda n: lax.rem(n, jnp.int32(STEPS))
  copy = plgpu.copy_gmem_to_smem

  @pl.when(warpgroup == _COMPUTING)
  def _():
    plgpu.set_max_registers(40, action='decrease')
    copy(x_scales_ref.at[rows], x_scales_smem, scales_loaded)
    copy(w_scales_ref.at[columns], w_scales_smem, scales_loaded)

    def load(n, carry):
      slot, depth = slot_of(n), pl.ds(n * DEPTH, DEPTH)
      # The first round finds the ring empty: nobody will say so.
      pl.when(n >= STEPS)(lambda: plgpu.barrier_wait(used.at[slot]))
      copy(x_ref.at[rows, depth], x_smem.at[slot], loaded.at[slot])
      copy(w_ref.at[columns, depth], w_smem.at[slot], loaded.at[slot])
      return carry

    lax.fori_loop(0, steps, load, None)

  @pl.when(warpgroup < _COMPUTING)
  def _():
    plgpu.set_max_registers(232, action='increase')
    mine = pl.ds(warpgroup * ROWS, ROWS)

    def multiply(acc):
      def step(n, carry):
        slot = slot_of(n)
        plgpu.barrier_wait(loaded.at[slot])
        plgpu.wgmma(
          acc, x_smem.at[slot, mine], compat.transposed(w_smem.at[slot])
        )
        # One product may be under way: the slot before this one is free.
        plgpu.wgmma_wait(1)
        before = used.at[slot_of(n + STEPS - 1)]
        tiles.free(before, (n > 0) & (n + STEPS - 1 < steps))
        return carry

      lax.fori_loop(0, steps, step, None)
      return acc[...]

    product = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.int32))
    plgpu.barrier_wait(scales_loaded)
    layout = plgpu.Layout.WGMMA
    x_scales = compat.load(x_scales_smem.at[mine], layout.reduce(1))
    part = out_smem.shape[2]
    for first in range(0, COLUMNS, part):
      some = slice(first, first + part)
      w_scales = compat.load(w_scales_smem.at[some], layout.reduce(0))
      scaled = product[:, some].astype(jnp.float32)
      scaled = scaled * lax.broadcast_in_dim(w_scales, scaled.shape, [1])
      scaled = scaled * lax.broadcast_in_dim(x_scales, scaled.shape, [0])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      out_smem.at[warpgroup][...] = scaled.astype(out_smem.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(
        out_smem.at[warpgroup], out_ref.at[rows, columns].at[mine, some]
      )
    plgpu.wait_smem_to_gmem(0)
