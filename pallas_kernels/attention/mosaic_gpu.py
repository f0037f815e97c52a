"""Flash attention on a Hopper GPU: the forward pass in Pallas (Mosaic GPU).

A block of threads works on 128 queries of one head. Three warpgroups share it:

    HBM             shared memory, a ring           registers
    k [m, D] -----> k slot 0 | slot 1 --+           +- 64 queries: m, l, o
    v [m, D] -----> v slot 0 | slot 1 --+- s, p v --+
    q [128, D] ---> q ------------------+           +- 64 queries: m, l, o
      copied by warpgroup 2               computed by warpgroups 0 and 1

The copying warpgroup waits until both others have used a slot and fills it with
the next tile of keys, so that memory and the tensor cores work at once
(FlashAttention-3, arXiv 2407.08608). The two others take turns: while one
exponentiates, the other one multiplies. The recurrence is that of `blockwise`,
with exponentials to the base 2. Tiles that every query sees whole skip the
mask, and tiles that none sees are not loaded. Of a causal mask the last rows,
which see most, come first, so that no multiprocessor is left with them alone.
"""

import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels import masks
from pallas_kernels import shards
from pallas_kernels.attention import blockwise
from pallas_kernels.attention import mosaic_gpu_backward
from pallas_kernels.attention import mosaic_gpu_tiles as tiles
from pallas_kernels.attention.mosaic_gpu_tiles import COMPUTING
from pallas_kernels.attention.mosaic_gpu_tiles import ROWS

COLUMNS = 128  # keys of a tile
STEPS = 2  # slots of the ring


def forward(
  rule: masks.Rule,
  q: jax.Array,  # [B, Sq, H, D]
  k: jax.Array,  # [B, Sk, K, D]
  v: jax.Array,  # [B, Sk, K, D]
  limits: masks.Limits,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, Sq, H, D] and log-sum-exp [B, H, Sq]; see `api`.

  `interpret` runs it without a GPU, as `plgpu.kernel` does.

  Raises:
    NotImplementedError: The mask has segments or tiles, or the dtype or the
      width of a head is not one of this kernel.
  """
  tiles.check(rule, q, k, v, limits)
  batch, q_size, heads, width = q.shape
  kv_heads = k.shape[2]
  v = tiles.without_unseen(rule, limits, q_size, v)
  q, k, v = (tiles.padded(x) for x in (q, k, v))
  grid = (heads, q.shape[1] // tiles.BLOCK, batch)
  groups = heads // kv_heads
  out, lse = plgpu.kernel(
    functools.partial(_kernel, rule=rule, groups=groups),
    out_type=[
      shards.out_shape(q.shape, q.dtype, q),
      # Positions last, so that a copy of 64 of them is contiguous.
      shards.out_shape((batch, heads, q.shape[1]), jnp.float32, q),
    ],
    scratch_types=[
      tiles.tiled((COMPUTING, ROWS, width), q.dtype),
      tiles.tiled((STEPS, COLUMNS, width), q.dtype),
      tiles.tiled((STEPS, COLUMNS, width), q.dtype),
      plgpu.SMEM((COMPUTING, ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=COMPUTING),
      plgpu.Barrier(num_barriers=STEPS),
      plgpu.Barrier(num_barriers=STEPS),
      plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STEPS),
      plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=STEPS),
      plgpu.Barrier(num_arrivals=COMPUTING),
      # The interpreter multiplies from shared memory only.
      *[tiles.tiled((COMPUTING, ROWS, COLUMNS), q.dtype)] * bool(interpret),
    ],
    grid=grid,
    grid_names=('head', 'row', 'batch'),
    num_threads=COMPUTING + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
  )(limits.offset, limits.kv_length, q, k, v)
  return out[:, :q_size], lse[:, :, :q_size]


attention = blockwise.differentiable(forward, mosaic_gpu_backward.backward)


def _kernel(
  offset_ref,
  length_ref,
  q_ref,
  k_ref,
  v_ref,
  out_ref,
  lse_ref,
  q_smem,
  k_smem,
  v_smem,
  lse_smem,
  q_loaded,
  k_loaded,
  v_loaded,
  k_used,
  v_used,
  turn,
  weights_smem=None,
  *,
  rule: masks.Rule,
  groups: int,
):
  """128 queries of one head."""
  head, batch = lax.axis_index('head'), lax.axis_index('batch')
  warpgroup = lax.axis_index('warpgroup')
  row = lax.axis_index('row')
  if rule.causal:
    row = q_ref.shape[1] // tiles.BLOCK - 1 - row
  first = row * tiles.BLOCK
  offset = offset_ref[batch]
  kv_size = k_ref.shape[1]
  length = jnp.minimum(length_ref[batch], kv_size)
  low, whole_low, whole_high, high = _ranges(
    rule, first + offset, tiles.BLOCK, length
  )
  slot_of = lambda n: lax.rem(n - low, jnp.int32(STEPS))

  @pl.when(warpgroup == COMPUTING)
  def _():
    plgpu.set_max_registers(40, action='decrease')
    key_head = lax.div(head, jnp.int32(groups))

    def load(n, carry):
      slot = slot_of(n)
      part = batch, pl.ds(n * COLUMNS, COLUMNS), key_head
      # The first round finds the ring empty: nobody will say so.
      again = n >= low + STEPS
      pl.when(again)(lambda: plgpu.barrier_wait(k_used.at[slot]))
      copy = plgpu.copy_gmem_to_smem
      copy(k_ref.at[part], k_smem.at[slot], k_loaded.at[slot])
      pl.when(again)(lambda: plgpu.barrier_wait(v_used.at[slot]))
      copy(v_ref.at[part], v_smem.at[slot], v_loaded.at[slot])
      return carry

    lax.fori_loop(low, high, load, None)

  @pl.when(warpgroup < COMPUTING)
  def _():
    plgpu.set_max_registers(232, action='increase')
    mine = first + warpgroup * ROWS
    rows = batch, pl.ds(mine, ROWS), head
    q_tile = q_smem.at[warpgroup]
    plgpu.copy_gmem_to_smem(q_ref.at[rows], q_tile, q_loaded.at[warpgroup])
    plgpu.barrier_wait(q_loaded.at[warpgroup])
    width = q_tile.shape[1]
    filled = lambda shape, value, layout: plgpu.layout_cast(
      jnp.full(shape, value, jnp.float32), layout
    )
    a_row = plgpu.Layout.WGMMA.reduce(1)

    def take_turns():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    # The second one begins a turn later, so the first one ends a turn later.
    pl.when(warpgroup == 1)(take_turns)

    def step(n, carry, masked):
      out, largest, total = carry
      slot = slot_of(n)
      plgpu.barrier_wait(k_loaded.at[slot])

      def score(acc):
        plgpu.wgmma(acc, q_tile, compat.transposed(k_smem.at[slot]))
        take_turns()
        return acc[...]

      scores = pl.run_scoped(score, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
      tiles.free(k_used.at[slot], n + STEPS < high)
      scores = tiles.scaled(rule, scores)
      if masked:
        iota = lambda axis: plgpu.broadcasted_iota(
          jnp.int32, (ROWS, COLUMNS), axis, layout=plgpu.Layout.WGMMA
        )
        position, key = iota(0) + mine + offset, iota(1) + n * COLUMNS
        seen = masks.between(rule, length, position, position, key)
        scores = jnp.where(seen, scores, -jnp.inf)
      new = jnp.maximum(largest, scores.max(axis=1))
      # A query that has seen nothing yet has -inf: its weights must be 0.
      safe = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
      shrink = jnp.exp2(largest - safe)
      weights = jnp.exp2(scores - lax.broadcast_in_dim(safe, scores.shape, [0]))
      total = total * shrink + weights.sum(axis=1)
      narrow = weights.astype(q_smem.dtype)
      plgpu.barrier_wait(v_loaded.at[slot])
      take_turns()

      if weights_smem is not None:
        weights_smem.at[warpgroup][...] = narrow
        plgpu.commit_smem()
        narrow = weights_smem.at[warpgroup]

      def gain(acc):
        plgpu.wgmma(acc, narrow, v_smem.at[slot])
        return acc[...]

      gained = pl.run_scoped(gain, plgpu.ACC((ROWS, width), jnp.float32))
      tiles.free(v_used.at[slot], n + STEPS < high)
      out = out * lax.broadcast_in_dim(shrink, out.shape, [0]) + gained
      return out, new, total

    carry = (
      filled((ROWS, width), 0.0, plgpu.Layout.WGMMA),
      filled((ROWS,), -jnp.inf, a_row),
      filled((ROWS,), 0.0, a_row),
    )
    masked, whole = (functools.partial(step, masked=m) for m in (True, False))
    if rule.window is not None:
      carry = lax.fori_loop(low, whole_low, masked, carry)
    carry = lax.fori_loop(whole_low, whole_high, whole, carry)
    out, largest, total = lax.fori_loop(whole_high, high, masked, carry)
    pl.when(warpgroup == 0)(take_turns)

    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out = out / lax.broadcast_in_dim(total, out.shape, [0])
    # Back from the base 2; an empty row keeps its -inf.
    lse = (largest + jnp.log2(total)) * math.log(2)
    q_tile[...] = out.astype(q_smem.dtype)
    lse_smem.at[warpgroup][...] = lse
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, out_ref.at[rows])
    plgpu.copy_smem_to_gmem(
      lse_smem.at[warpgroup], lse_ref.at[batch, head, pl.ds(mine, ROWS)]
    )
    plgpu.wait_smem_to_gmem(0)


def _ranges(rule, position, count, length):
  """Tiles of keys for queries at `position .. position + count - 1`.

  Returns:
    `low <= whole_low <= whole_high <= high`: the queries see nothing outside of
    tiles `low .. high - 1`, and all of `whole_low .. whole_high - 1`.
  """
  last = position + count - 1
  high, whole_high = length, length
  low, whole_low = jnp.int32(0), jnp.int32(0)
  if rule.causal:
    high = jnp.minimum(high, last + 1)
    whole_high = jnp.minimum(whole_high, position + 1)
  if rule.window is not None:
    low = jnp.maximum(low, position - rule.window + 1)
    whole_low = jnp.maximum(whole_low, last - rule.window + 1)
    if not rule.causal:
      high = jnp.minimum(high, last + rule.window)
      whole_high = jnp.minimum(whole_high, position + rule.window)
  tiles = jnp.int32(COLUMNS)
  up = lambda n: lax.div(jnp.maximum(n, 0) + (COLUMNS - 1), tiles)
  down = lambda n: lax.div(jnp.maximum(n, 0), tiles)
  low = down(low)
  high = jnp.maximum(low, up(high))
  whole_low = jnp.clip(up(whole_low), low, high)
  return low, whole_low, jnp.clip(down(whole_high), whole_low, high), high
