"""Decode attention on a Hopper GPU, in Pallas (Mosaic GPU).

A block of threads takes up to 64 queries that share a key head, over one part
of the row's cache. Two warpgroups share it:

    HBM             shared memory, a ring                registers
    k [m, D] -----> k slot 0 | slot 1 | ... --+
    v [m, D] -----> v slot 0 | slot 1 | ... --+- s, p v -- 64 queries: m, l, o
    q [64, D] ----> q ------------------------+
      copied by warpgroup 1                     computed by warpgroup 0

One query fills little of a tile and the tensor cores idle, but reading the
cache is the work. A row's tiles are shared out evenly among the parts
(split-K), so that a few long rows fill the device too; `merge` joins the
results. What queries see of the tiles that hold new tokens is looked up in an
array of ones and zeros, made before; earlier tiles are seen whole, or from the
window on.

An int8 cache is copied as it is, half the bytes. Warpgroup 0 widens a tile to
the dtype of q, in which its integers are exact, before it multiplies:

    HBM               the ring          shared memory    registers
    k [m, D] int8 --> k slot ---------> k wide --------> s = q k' s_k
    v [m, D] int8 --> v slot ---------> v wide --------> o += (p s_v) v
    scales [m] -----> beside them -----------------------^

A scale of k is a factor of a column of scores, one of v of a column of weights,
so no product with a scale is rounded but that of the weight.
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
from pallas_kernels.attention import mosaic_gpu_tiles as tiles
from pallas_kernels.attention.api import merge
from pallas_kernels.decode_attention import blockwise

ROWS = 64  # queries of a block: the height of a wgmma
COLUMNS = 64  # slots of a tile
STEPS = 3  # slots of the ring
# A power of two near the largest integer of a cache. Scales grow by it, and the
# sums shrink: float16 has few digits left for weights times scales as they are,
# and room for all times the largest value that a scale stands for.
_LARGEST = 128.0
_MULTIPROCESSORS = 132  # of an H100 or H200; each holds one block
_WIDTHS = (64, 128)


def attention(
  rule: masks.Rule,
  splits: int | None,
  q: jax.Array,  # [B, T, H, D]
  k: jax.Array,  # [B, K, S, D]
  v: jax.Array,  # [B, K, S, D]
  limits: masks.Limits,
  k_scales: jax.Array | None,
  v_scales: jax.Array | None,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, H, D] and log-sum-exp [B, H, T]; see `api`.

  `interpret` runs it without a GPU, as `plgpu.kernel` does.

  Raises:
    NotImplementedError: The slots of the cache are not whole tiles, or the
      dtype or the width of a head is not one of this kernel.
  """
  batch, time, _, width = q.shape
  kv_heads, slots = k.shape[1:3]
  quantized = k_scales is not None
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f'{q.dtype} is not a dtype of this kernel.')
  if not quantized and not q.dtype == k.dtype == v.dtype:
    raise NotImplementedError(
      f'q, k and v are of different dtypes: {q.dtype}, {k.dtype}, {v.dtype}.'
    )
  if width not in _WIDTHS or v.shape[3] != width:
    raise NotImplementedError(
      f'heads of width {width} and {v.shape[3]} are not {_WIDTHS}.'
    )
  if slots % COLUMNS:
    raise NotImplementedError(f'{slots} slots are not tiles of {COLUMNS}.')
  rows = blockwise.rows_of(q, kv_heads)
  used_rows = rows.shape[2]
  padding = (0, -used_rows % ROWS)
  rows = jnp.pad(rows, ((0, 0), (0, 0), padding, (0, 0)))
  row_tiles = rows.shape[2] // ROWS
  if splits is None:
    blocks = batch * kv_heads * row_tiles
    splits = min(-(-_MULTIPROCESSORS // blocks), slots // COLUMNS)
  low, tail = _sight(rule, limits, time, rows.shape[2], used_rows, slots)
  # Fewer queries than a tile has rows: only so many results are written.
  kept = -(-min(used_rows, ROWS) // 8) * 8
  head = batch, kv_heads, row_tiles, splits
  scales = [k_scales, v_scales] if quantized else []
  out, lse = plgpu.kernel(
    functools.partial(_kernel, rule=rule, splits=splits, row_tiles=row_tiles),
    out_type=[
      shards.out_shape((*head, kept, width), jnp.float32, q),
      shards.out_shape((*head, ROWS), jnp.float32, q),
    ],
    scratch_types=_scratch(q.dtype, width, quantized, bool(interpret)),
    grid=(kv_heads * row_tiles, splits, batch),
    grid_names=('head', 'part', 'batch'),
    num_threads=2,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
  )(limits.offset, limits.kv_length, low, tail, rows, k, v, *scales)
  # [B, K, rows, parts] of each part's results, to parts of [B, K, G T].
  out = jnp.moveaxis(out, 3, 0).reshape(splits, batch, kv_heads, -1, width)
  lse = jnp.moveaxis(lse[..., :kept], 3, 0)
  lse = lse.reshape(splits, batch, kv_heads, -1, 1)
  queries = lambda x: blockwise.queries_of(x[:, :, :used_rows], time)
  parts = [
    (queries(o), queries(m)[..., 0].transpose(0, 2, 1))
    for o, m in zip(out, lse, strict=True)
  ]
  out, lse = parts[0] if splits == 1 else merge(parts)
  return out.astype(q.dtype), lse


def _scratch(dtype, width, quantized, interpreted):
  """Shared memory and barriers, by the names of `_kernel`."""
  stored = jnp.int8 if quantized else dtype
  ring = lambda arrivals=1: plgpu.Barrier(
    num_arrivals=arrivals, num_barriers=STEPS
  )
  scratch = {
    'q_smem': tiles.tiled((ROWS, width), dtype),
    'k_smem': tiles.tiled((STEPS, COLUMNS, width), stored),
    'v_smem': tiles.tiled((STEPS, COLUMNS, width), stored),
    'out_smem': tiles.tiled((ROWS, width), jnp.float32),
    'lse_smem': plgpu.SMEM((ROWS,), jnp.float32),
    'q_loaded': plgpu.Barrier(),
    'k_loaded': ring(1 + quantized),  # the scales arrive by themselves
    'v_loaded': ring(1 + quantized),
    'k_used': ring(),
    'v_used': ring(),
  }
  if quantized:
    scratch |= {
      'k_scales_smem': plgpu.SMEM((STEPS, COLUMNS), jnp.float32),
      'v_scales_smem': plgpu.SMEM((STEPS, COLUMNS), jnp.float32),
      'wide_smem': tiles.tiled((COLUMNS, width), dtype),
    }
  if interpreted:
    # The interpreter multiplies from shared memory only.
    scratch['weights_smem'] = tiles.tiled((ROWS, COLUMNS), dtype)
  return scratch


def _sight(rule, limits, time, count, used_rows, slots):
  """What each row of queries sees.

  Returns:
    The lowest slot of each row of queries [B, rows] int32, and whether it sees
    the slots from the tile of the first new token on [B, rows, tail] float32.
  """
  tail = -(-(time + COLUMNS - 1) // COLUMNS) * COLUMNS
  first = jnp.maximum(limits.offset, 0) // COLUMNS * COLUMNS
  none = None if limits.ancestors is None else 0

  def of_row(offset, length, ancestors, first):
    ancestors = None if ancestors is None else ancestors[None]
    one = masks.Limits(offset[None], length[None], None, None, ancestors)
    keys = first + jnp.arange(tail)
    return masks.visible(rule, one, jnp.arange(time), keys)[0]

  seen = jax.vmap(of_row, (0, 0, none, 0))(
    limits.offset, limits.kv_length, limits.ancestors, first
  )
  low = jnp.zeros((len(first), time), jnp.int32)
  if rule.window is not None:
    depth = jnp.arange(time)[None]
    if limits.ancestors is not None:
      depth = limits.ancestors.sum(-1, dtype=jnp.int32) - 1
    low = jnp.maximum(limits.offset[:, None] + depth - rule.window + 1, 0)
  groups = used_rows // time
  more = (0, count - used_rows)
  low = jnp.pad(
    jnp.tile(low, (1, groups)), ((0, 0), more), constant_values=slots
  )
  seen = jnp.tile(seen, (1, groups, 1)).astype(jnp.float32)
  return low, jnp.pad(seen, ((0, 0), more, (0, 0)))


def _kernel(
  offset_ref,
  length_ref,
  low_ref,
  tail_ref,
  q_ref,
  k_ref,
  v_ref,
  *refs,
  q_smem,
  k_smem,
  v_smem,
  out_smem,
  lse_smem,
  q_loaded,
  k_loaded,
  v_loaded,
  k_used,
  v_used,
  k_scales_smem=None,
  v_scales_smem=None,
  wide_smem=None,
  weights_smem=None,
  rule: masks.Rule,
  splits: int,
  row_tiles: int,
):
  """64 queries of one key head over one part of the cache.

  `refs` are the scales of keys and of values, if the cache is int8, and the
  results: out and log-sum-exp.
  """
  *scales_refs, out_ref, lse_ref = refs
  quantized = bool(scales_refs)
  batch, part = lax.axis_index('batch'), lax.axis_index('part')
  head = lax.div(lax.axis_index('head'), jnp.int32(row_tiles))
  row_tile = lax.rem(lax.axis_index('head'), jnp.int32(row_tiles))
  warpgroup = lax.axis_index('warpgroup')
  columns = jnp.int32(COLUMNS)
  offset = jnp.maximum(offset_ref[batch], 0)
  length = jnp.clip(length_ref[batch], 0, k_ref.shape[2])
  first_tail = lax.div(offset, columns)
  lowest = jnp.int32(0)
  if rule.window is not None:
    lowest = jnp.maximum(offset - (rule.window - 1), 0)
  begin = lax.div(lowest, columns)
  count = jnp.maximum(lax.div(length + (COLUMNS - 1), columns) - begin, 0)
  share = lambda n: begin + lax.div(count * n, jnp.int32(splits))
  low, high = share(part), share(part + 1)
  slot_of = lambda n: lax.rem(n - low, jnp.int32(STEPS))

  @pl.when(warpgroup == 1)
  def _():
    plgpu.set_max_registers(40, action='decrease')
    copy = plgpu.copy_gmem_to_smem
    keys, values = [(k_ref, k_smem)], [(v_ref, v_smem)]
    if quantized:
      keys.append((scales_refs[0], k_scales_smem))
      values.append((scales_refs[1], v_scales_smem))
    rings = (keys, k_loaded, k_used), (values, v_loaded, v_used)

    def load(n, carry):
      slot = slot_of(n)
      tile = batch, head, pl.ds(n * COLUMNS, COLUMNS)
      # The first round finds the ring empty: nobody will say so.
      again = n >= low + STEPS
      for arrays, loaded, used in rings:
        pl.when(again)(functools.partial(plgpu.barrier_wait, used.at[slot]))
        for ref, smem in arrays:
          copy(ref.at[tile], smem.at[slot], loaded.at[slot])
      return carry

    lax.fori_loop(low, high, load, None)

  @pl.when(warpgroup == 0)
  def _():
    plgpu.set_max_registers(232, action='increase')
    rows = pl.ds(row_tile * ROWS, ROWS)
    plgpu.copy_gmem_to_smem(q_ref.at[batch, head, rows], q_smem, q_loaded)
    plgpu.barrier_wait(q_loaded)
    width = q_smem.shape[1]
    layout = plgpu.Layout.WGMMA
    iota = lambda shape, axis: plgpu.broadcasted_iota(
      jnp.int32, shape, axis, layout=layout
    )
    filled = lambda shape, value, layout: plgpu.layout_cast(
      jnp.full(shape, value, jnp.float32), layout
    )

    def widened(tile):
      """A tile of the cache in the dtype of q, for the tensor cores."""
      if not quantized:
        return tile
      narrow = compat.load(tile, plgpu.Layout.WGMMA_8BIT)
      wide_smem[...] = narrow.astype(wide_smem.dtype)
      plgpu.commit_smem()
      return wide_smem

    def step(n, carry, in_tail):
      out, largest, total = carry
      slot = slot_of(n)
      plgpu.barrier_wait(k_loaded.at[slot])
      if quantized:
        # Before the fence in `widened`: the next copy must see it as read.
        scales = compat.load(k_scales_smem.at[slot], layout.reduce(0))
      keys = widened(k_smem.at[slot])

      def score(acc):
        plgpu.wgmma(acc, q_smem, compat.transposed(keys))
        return acc[...]

      scores = pl.run_scoped(score, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
      if quantized:
        scores = scores * lax.broadcast_in_dim(scales, scores.shape, [1])
      tiles.free(k_used.at[slot], n + STEPS < high)
      scores = tiles.scaled(rule, scores)
      if in_tail:
        tile = pl.ds((n - first_tail) * COLUMNS, COLUMNS)
        seen = compat.load(
          tail_ref.at[batch, rows, tile], layout, optimized=False
        )
        scores = jnp.where(seen > 0.5, scores, -jnp.inf)
      elif rule.window is not None:
        lows = compat.load(
          low_ref.at[batch, rows], layout.reduce(1), optimized=False
        )
        keys = iota((ROWS, COLUMNS), 1) + n * COLUMNS
        lows = lax.broadcast_in_dim(lows, keys.shape, [0])
        scores = jnp.where(keys >= lows, scores, -jnp.inf)
      new = jnp.maximum(largest, scores.max(axis=1))
      # A query that has seen nothing yet has -inf: its weights must be 0.
      safe = jnp.where(new == -jnp.inf, 0.0, new)
      shrink = jnp.exp2(largest - safe)
      weights = jnp.exp2(scores - lax.broadcast_in_dim(safe, scores.shape, [0]))
      total = total * shrink + weights.sum(axis=1)
      plgpu.barrier_wait(v_loaded.at[slot])
      # A slot that no query sees may hold NaN, and 0 times NaN is NaN.
      cleaned = in_tail or rule.window is not None
      used = lambda key: (key >= lowest) & (key < length)
      if quantized:
        scales = compat.load(v_scales_smem.at[slot], layout.reduce(0))
        scales = scales * _LARGEST
        scales = lax.broadcast_in_dim(scales, weights.shape, [1])
        if cleaned:
          seen = used(iota(weights.shape, 1) + n * COLUMNS)
          scales = jnp.where(seen, scales, 0.0)
        weights = weights * scales
      elif cleaned:
        held = compat.load(v_smem.at[slot], layout, optimized=False)
        seen = used(iota(held.shape, 0) + n * COLUMNS)
        v_smem.at[slot][...] = jnp.where(seen, held, jnp.zeros_like(held))
        plgpu.commit_smem()
      values = widened(v_smem.at[slot])
      narrow = weights.astype(q_smem.dtype)
      if weights_smem is not None:
        weights_smem[...] = narrow
        plgpu.commit_smem()
        narrow = weights_smem

      def gain(acc):
        plgpu.wgmma(acc, narrow, values)
        return acc[...]

      gained = pl.run_scoped(gain, plgpu.ACC((ROWS, width), jnp.float32))
      tiles.free(v_used.at[slot], n + STEPS < high)
      out = out * lax.broadcast_in_dim(shrink, out.shape, [0]) + gained
      return out, new, total

    carry = (
      filled((ROWS, width), 0.0, layout),
      filled((ROWS,), -jnp.inf, layout.reduce(1)),
      filled((ROWS,), 0.0, layout.reduce(1)),
    )
    border = jnp.clip(first_tail, low, high)
    before, tail = (functools.partial(step, in_tail=x) for x in (False, True))
    carry = lax.fori_loop(low, border, before, carry)
    out, largest, total = lax.fori_loop(border, high, tail, carry)

    total_or_one = jnp.where(total == 0.0, 1.0, total)
    divisor = total_or_one * _LARGEST if quantized else total_or_one
    out_smem[...] = out / lax.broadcast_in_dim(divisor, out.shape, [0])
    # Back from the base 2; an empty row keeps its -inf.
    lse_smem[...] = (largest + jnp.log2(total_or_one)) * math.log(2)
    plgpu.commit_smem()
    here = batch, head, row_tile, part
    kept = out_ref.shape[4]
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, kept)], out_ref.at[here])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[here])
    plgpu.wait_smem_to_gmem(0)
