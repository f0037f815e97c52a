"""The gradients of flash attention on a Hopper GPU, in Pallas (Mosaic GPU).

    dq: a block of 128 queries         dk, dv: a block of 128 keys, all heads
                                               that share them
          k, v ->  the ring                 +---------+
         +------+------+------+             | dk   dv |  kept
    q    | s p  | s p  | s p  |             +---------+
    dout | dp   | dp   | dp   |      q, lse | s' p'   |  |
    lse  | ds   | ds   | ds   |        dout | dp' ds' |  | the ring
    kept +------+------+------+       delta | ...     |  v
    dq =   ds k + ds k + ds k               +---------+

Each tile of p is computed again from the log-sum-exp that the forward pass kept
(arXiv 2205.14135, algorithm 4):

    D  = sum_d dout out - dlse      p  = exp(s - lse)      dp = dout v'
    ds = p (dp - D)                 dv = p' dout, dk = ds' q, dq = ds k

The second kernel holds its tiles transposed, so that p' and ds' are left sides
of products as they lie in registers. Nothing is added up across blocks: the
gradients are the same in every run. Warpgroups share the work as in the
forward pass.
"""

import functools
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

STEPS = 2  # slots of a ring
# Registers of a thread. Those of a launch, 3 x 168, allow no more than these.
LOADS_WITH, COMPUTES_WITH = 24, 240
# Keys, or queries, of a tile in the ring, by the width of heads: more of them
# do not fit into registers.
RING = {64: 128, 128: 64}


def backward(
  rule: masks.Rule,
  q: jax.Array,  # [B, Sq, H, D]
  k: jax.Array,  # [B, Sk, K, D]
  v: jax.Array,  # [B, Sk, K, D]
  limits: masks.Limits,
  out: jax.Array,  # [B, Sq, H, D]
  lse: jax.Array,  # [B, H, Sq]
  d_out: jax.Array,  # [B, Sq, H, D]
  d_lse: jax.Array,  # [B, H, Sq]
  *,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v from those of both outputs.

  `interpret` runs it without a GPU, as `plgpu.kernel` does.

  Raises:
    NotImplementedError: As the forward pass.
  """
  tiles.check(rule, q, k, v, limits)
  q_size, kv_size = q.shape[1], k.shape[1]
  empty = jnp.isneginf(lse)
  delta = jnp.einsum(
    'bihd,bihd->bhi', out, d_out, preferred_element_type=jnp.float32
  )
  delta = jnp.where(empty, 0, delta - d_lse)
  # Rows without keys, and those of the padding, get weights exp2(s - inf) = 0.
  lse = jnp.where(empty, jnp.inf, lse * tiles.LOG2E)
  k, v = (tiles.without_unseen(rule, limits, q_size, x) for x in (k, v))
  q, k, v, d_out = (tiles.padded(x) for x in (q, k, v, d_out))
  lse = tiles.padded(lse, axis=2, fill=jnp.inf)
  # One array [B, H, 2, Sq], and so one copy.
  statistics = jnp.stack([lse, tiles.padded(delta, axis=2)], axis=2)
  arrays = limits.offset, limits.kv_length, q, k, v, d_out, statistics
  dq = _queries(rule, arrays, interpret)
  dk, dv = _keys(rule, q_size, arrays, interpret)
  return dq[:, :q_size], dk[:, :kv_size], dv[:, :kv_size]


def _call(kernel, arrays, out_type, grid, scratch, staged, interpret, name):
  # The interpreter multiplies from shared memory only.
  scratch = [*scratch, *staged * bool(interpret)]
  return plgpu.kernel(
    kernel,
    out_type=out_type,
    scratch_types=scratch,
    grid=grid,
    grid_names=('head', 'block', 'batch'),
    num_threads=tiles.COMPUTING + 1,
    thread_name='warpgroup',
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    interpret=interpret,
    kernel_name=name,
  )(*arrays)


def _queries(rule, arrays, interpret) -> jax.Array:
  """dq [B, S', H, D]."""
  q, k = arrays[2:4]
  batch, size, heads, width = q.shape
  block, ring = (
    tiles.tiled((count, rows, width), q.dtype)
    for count, rows in ((tiles.COMPUTING, tiles.ROWS), (STEPS, RING[width]))
  )
  statistics = plgpu.SMEM((tiles.COMPUTING, 2, tiles.ROWS), jnp.float32)
  loaded = plgpu.Barrier(num_barriers=STEPS)
  used = plgpu.Barrier(num_arrivals=tiles.COMPUTING, num_barriers=STEPS)
  return _call(
    functools.partial(_queries_kernel, rule=rule, groups=heads // k.shape[2]),
    arrays,
    shards.out_shape(q.shape, q.dtype, q),
    (heads, size // tiles.BLOCK, batch),
    [
      *(block, block, statistics, ring, ring),
      plgpu.Barrier(num_arrivals=3, num_barriers=tiles.COMPUTING),
      *(loaded, loaded, used, used),
    ],
    [tiles.tiled((tiles.COMPUTING, tiles.ROWS, RING[width]), q.dtype)],
    interpret,
    'attention_dq',
  )


def _keys(rule, q_size, arrays, interpret):
  """dk and dv [B, S', K, D]."""
  q, k = arrays[2:4]
  batch, size, kv_heads, width = k.shape
  # These take more registers. (Windows that look both ways, at width 128, take
  # 28 bytes more than there are.)
  costly = rule.softcap or (rule.window and not rule.causal)
  queries = 64 if costly else RING[width]
  block, ring = (
    tiles.tiled((count, rows, width), q.dtype)
    for count, rows in ((tiles.COMPUTING, tiles.ROWS), (STEPS, queries))
  )
  statistics = plgpu.SMEM((STEPS, 2, queries), jnp.float32)
  out = shards.out_shape(k.shape, k.dtype, k)
  staged = tiles.tiled((tiles.COMPUTING, tiles.ROWS, queries), q.dtype)
  return _call(
    functools.partial(
      _keys_kernel, rule=rule, groups=q.shape[2] // kv_heads, q_size=q_size
    ),
    arrays,
    [out, out],
    (kv_heads, size // tiles.BLOCK, batch),
    [
      *(block, block, ring, ring, statistics),
      plgpu.Barrier(num_arrivals=2, num_barriers=tiles.COMPUTING),
      plgpu.Barrier(num_arrivals=3, num_barriers=STEPS),
      plgpu.Barrier(num_arrivals=tiles.COMPUTING, num_barriers=STEPS),
    ],
    [staged, staged],
    interpret,
    'attention_dk_dv',
  )


def _weights(rule, length, scores, lse, position, key, corners):
  """p of a tile, and ds / (dp - D), which is p too if scores are not capped.

  `lse`, `position` and `key` are functions, called where they are needed and
  not before: registers are scarce. `corners` are the first and the last
  position, and the first and the last key.
  """
  (p0, p1), (k0, k1) = corners
  bend = None if rule.softcap is None else tiles.bend(rule, scores)
  scores = tiles.scaled(rule, scores)

  def masked(scores):
    # Only the distance counts: one number a score, not two.
    apart = position() - key()
    seen = masks.between(rule, jnp.int32(1), apart, apart, jnp.int32(0))
    return jnp.where(seen & (key() < length), scores, -jnp.inf)

  # The first query sees the last key, and the last query the first one.
  whole = masks.between(rule, length, p0, p0, k1)
  whole &= masks.between(rule, length, p1, p1, k0)
  scores = lax.cond(whole, lambda scores: scores, masked, scores)
  weights = jnp.exp2(scores - lse())
  return weights, weights if bend is None else weights * (1.0 - bend * bend)


def _queries_kernel(
  offset_ref,
  length_ref,
  q_ref,
  k_ref,
  v_ref,
  d_out_ref,
  statistics_ref,
  dq_ref,
  q_smem,
  d_out_smem,
  statistics_smem,
  k_smem,
  v_smem,
  rows_loaded,
  k_loaded,
  v_loaded,
  k_used,
  v_used,
  *staged,
  rule: masks.Rule,
  groups: int,
):
  """dq of 128 queries of one head."""
  head, batch = lax.axis_index('head'), lax.axis_index('batch')
  warpgroup = lax.axis_index('warpgroup')
  first = lax.axis_index('block') * tiles.BLOCK
  last = first + (tiles.BLOCK - 1)
  offset, columns = offset_ref[batch], k_smem.shape[1]
  length = jnp.minimum(length_ref[batch], k_ref.shape[1])
  low, high = tiles.over(
    *masks.keys_of(rule, offset, length, first, last, k_ref.shape[1]), columns
  )
  slot_of = lambda n: lax.rem(n - low, jnp.int32(STEPS))
  copy = plgpu.copy_gmem_to_smem

  @pl.when(warpgroup == tiles.COMPUTING)
  def _():
    plgpu.set_max_registers(LOADS_WITH, action='decrease')
    key_head = lax.div(head, jnp.int32(groups))

    def load(n, carry):
      slot = slot_of(n)
      part = batch, pl.ds(n * columns, columns), key_head
      # The first round finds the ring empty: nobody will say so.
      again = n >= low + STEPS
      pl.when(again)(lambda: plgpu.barrier_wait(k_used.at[slot]))
      copy(k_ref.at[part], k_smem.at[slot], k_loaded.at[slot])
      pl.when(again)(lambda: plgpu.barrier_wait(v_used.at[slot]))
      copy(v_ref.at[part], v_smem.at[slot], v_loaded.at[slot])
      return carry

    lax.fori_loop(low, high, load, None)

  @pl.when(warpgroup < tiles.COMPUTING)
  def _():
    plgpu.set_max_registers(COMPUTES_WITH, action='increase')
    mine = first + warpgroup * tiles.ROWS
    rows = batch, pl.ds(mine, tiles.ROWS), head
    numbers = batch, head, slice(None), pl.ds(mine, tiles.ROWS)
    q_tile, d_out_tile = q_smem.at[warpgroup], d_out_smem.at[warpgroup]
    for source, target in (
      (q_ref.at[rows], q_tile),
      (d_out_ref.at[rows], d_out_tile),
      (statistics_ref.at[numbers], statistics_smem.at[warpgroup]),
    ):
      copy(source, target, rows_loaded.at[warpgroup])
    plgpu.barrier_wait(rows_loaded.at[warpgroup])
    shape, width = (tiles.ROWS, columns), q_tile.shape[1]
    a_row = plgpu.Layout.WGMMA.reduce(1)
    lse, delta = (
      compat.load(statistics_smem.at[warpgroup, n], a_row) for n in range(2)
    )
    position = mine + offset
    buffer = staged[0].at[warpgroup] if staged else None

    def add_up(dq):
      def step(n, carry):
        slot, key = slot_of(n), n * columns
        plgpu.barrier_wait(k_loaded.at[slot])
        scores = tiles.product(
          q_tile, compat.transposed(k_smem.at[slot]), shape
        )
        _, slopes = _weights(
          rule,
          length,
          scores,
          lambda: lax.broadcast_in_dim(lse, shape, [0]),
          lambda: tiles.iota(shape, 0) + position,
          lambda: tiles.iota(shape, 1) + key,
          ((position, position + tiles.ROWS - 1), (key, key + columns - 1)),
        )
        plgpu.barrier_wait(v_loaded.at[slot])
        d_weights = tiles.product(
          d_out_tile, compat.transposed(v_smem.at[slot]), shape
        )
        tiles.free(v_used.at[slot], n + STEPS < high)
        d_scores = slopes * (
          d_weights - lax.broadcast_in_dim(delta, shape, [0])
        )
        d_scores = tiles.left_side(d_scores, q_smem.dtype, buffer)
        plgpu.wgmma(dq, d_scores, k_smem.at[slot])
        plgpu.wgmma_wait(0)
        tiles.free(k_used.at[slot], n + STEPS < high)
        return carry

      lax.fori_loop(low, high, step, None)
      return dq[...]

    dq = pl.run_scoped(add_up, plgpu.ACC((tiles.ROWS, width), jnp.float32))
    q_tile[...] = (dq * rule.scale).astype(q_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[rows])
    plgpu.wait_smem_to_gmem(0)


def _keys_kernel(
  offset_ref,
  length_ref,
  q_ref,
  k_ref,
  v_ref,
  d_out_ref,
  statistics_ref,
  dk_ref,
  dv_ref,
  k_smem,
  v_smem,
  q_smem,
  d_out_smem,
  statistics_smem,
  keys_loaded,
  loaded,
  used,
  *staged,
  rule: masks.Rule,
  groups: int,
  q_size: int,
):
  """dk and dv of 128 keys of one head, from all query heads that share it."""
  key_head, batch = lax.axis_index('head'), lax.axis_index('batch')
  warpgroup = lax.axis_index('warpgroup')
  first = lax.axis_index('block') * tiles.BLOCK
  last = first + (tiles.BLOCK - 1)
  offset, queries = offset_ref[batch], q_smem.shape[1]
  length = jnp.minimum(length_ref[batch], k_ref.shape[1])
  low, high = tiles.over(
    *masks.queries_of(rule, offset, length, first, last, q_size), queries
  )
  slot_of = lambda n: lax.rem(n, jnp.int32(STEPS))
  copy = plgpu.copy_gmem_to_smem

  @pl.when(warpgroup == tiles.COMPUTING)
  def _():
    plgpu.set_max_registers(LOADS_WITH, action='decrease')

    def load(row, n, head):
      slot, some = slot_of(n), pl.ds(row * queries, queries)
      # The first round finds the ring empty: nobody will say so.
      pl.when(n >= STEPS)(lambda: plgpu.barrier_wait(used.at[slot]))
      for source, target in (
        (q_ref.at[batch, some, head], q_smem),
        (d_out_ref.at[batch, some, head], d_out_smem),
        (statistics_ref.at[batch, head, slice(None), some], statistics_smem),
      ):
        copy(source, target.at[slot], loaded.at[slot])
      return n + 1

    def load_head(group, n):
      head = key_head * groups + group
      return lax.fori_loop(low, high, functools.partial(load, head=head), n)

    lax.fori_loop(0, groups, load_head, jnp.int32(0))

  @pl.when(warpgroup < tiles.COMPUTING)
  def _():
    plgpu.set_max_registers(COMPUTES_WITH, action='increase')
    mine = first + warpgroup * tiles.ROWS
    rows = batch, pl.ds(mine, tiles.ROWS), key_head
    k_tile, v_tile = k_smem.at[warpgroup], v_smem.at[warpgroup]
    copy(k_ref.at[rows], k_tile, keys_loaded.at[warpgroup])
    copy(v_ref.at[rows], v_tile, keys_loaded.at[warpgroup])
    plgpu.barrier_wait(keys_loaded.at[warpgroup])
    shape, width = (tiles.ROWS, queries), k_tile.shape[1]
    across = lambda ref: lax.broadcast_in_dim(
      compat.load(ref, plgpu.Layout.WGMMA.reduce(0)), shape, [1]
    )
    buffers = [x.at[warpgroup] for x in staged] or [None, None]

    count = groups * (high - low)

    def add_up(dk, dv):
      def step(n, carry):
        slot = slot_of(n)
        row = n if groups == 1 else lax.rem(n, high - low)
        position = (low + row) * queries + offset
        plgpu.barrier_wait(loaded.at[slot])
        scores = tiles.product(
          k_tile, compat.transposed(q_smem.at[slot]), shape
        )
        weights, slopes = _weights(
          rule,
          length,
          scores,
          lambda: across(statistics_smem.at[slot, 0]),
          lambda: tiles.iota(shape, 1) + position,
          lambda: tiles.iota(shape, 0) + mine,
          ((position, position + queries - 1), (mine, mine + tiles.ROWS - 1)),
        )
        # From here on p is kept as it is multiplied, in half of the registers.
        weights = lax.optimization_barrier(weights.astype(k_smem.dtype))
        if rule.softcap is None:
          slopes = weights.astype(jnp.float32)
        d_weights = tiles.product(
          v_tile, compat.transposed(d_out_smem.at[slot]), shape
        )
        d_scores = slopes * (d_weights - across(statistics_smem.at[slot, 1]))
        weights, d_scores = (
          tiles.left_side(x, k_smem.dtype, buffer)
          for x, buffer in zip((weights, d_scores), buffers, strict=True)
        )
        plgpu.wgmma(dv, weights, d_out_smem.at[slot])
        plgpu.wgmma(dk, d_scores, q_smem.at[slot])
        plgpu.wgmma_wait(0)
        tiles.free(used.at[slot], n + STEPS < count)
        return carry

      lax.fori_loop(0, count, step, None)
      return dk[...], dv[...]

    dk, dv = pl.run_scoped(
      add_up, *[plgpu.ACC((tiles.ROWS, width), jnp.float32)] * 2
    )
    k_tile[...] = (dk * rule.scale).astype(k_smem.dtype)
    v_tile[...] = dv.astype(k_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[rows])
    plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[rows])
    plgpu.wait_smem_to_gmem(0)
