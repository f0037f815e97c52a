"""Decode attention on a TPU, in Pallas.

    grid (row, key head, part, block); the last one is innermost

      HBM                       VMEM                          HBM
      q  [G T, D]  -- once -----> q                         out [G T, Dv]
      k  [m, D]    -- a block --> k --> s = q k' --+        lse [G T]
      v  [m, Dv]   -- a block --> v ---------------+--> m, l, o --^ last block

The queries that share a key head are the rows of one product, the recurrence is
that of `attention.blockwise`. Blocks that no query of the row sees are neither
computed nor fetched: their index is that of the nearest block that is needed,
and a block that is already there is not fetched again. A cache in several parts
is several independent columns of work, merged at the end.

What a query sees is two things: slots `low .. start - 1`, and of the T new
slots those whose bit is set. The bits of a block are looked up by a product
with a one-hot matrix, which is exact.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels import roofline
from pallas_kernels import shards
from pallas_kernels.attention.api import merge
from pallas_kernels.decode_attention import blockwise

BLOCKS = (512, 384, 256, 128)  # sizes; the first that divides the slots
_LANES = 128  # of a vector register; statistics fill all of them alike
_ROWS = 16  # a multiple for both float32 and bfloat16


def attention(
  rule: masks.Rule,
  splits: int | None,
  q: jax.Array,  # [B, T, H, D]
  k: jax.Array,  # [B, K, S, D]
  v: jax.Array,  # [B, K, S, Dv]
  limits: masks.Limits,
  k_scales: jax.Array | None,  # [B, K, S] float32
  v_scales: jax.Array | None,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, H, Dv] and log-sum-exp [B, H, T]; see `api`.

  `interpret` runs it without a TPU, as `pallas_call` does.

  Raises:
    NotImplementedError: The dtype is not one of a TPU, there are more than 128
      new tokens, or the slots are not whole blocks.
  """
  batch, time, heads, width = q.shape
  kv_heads, slots = k.shape[1:3]
  splits = splits or 1  # a TPU's core takes one after the other
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(f'{q.dtype} is not a dtype of this kernel.')
  if time > _LANES:
    raise NotImplementedError(f'{time} new tokens are more than {_LANES}.')
  block = next((n for n in BLOCKS if slots % (n * splits) == 0), None)
  if block is None:
    raise NotImplementedError(
      f'{slots} slots are not {splits} parts of whole blocks of {BLOCKS[-1]}.'
    )
  rows = blockwise.rows_of(q, kv_heads)
  used_rows = rows.shape[2]
  pad = lambda x, value: jnp.pad(
    x,
    ((0, 0), (0, -used_rows % _ROWS), (0, 0)),
    constant_values=value,
  )
  rows = jax.vmap(functools.partial(pad, value=0), 1, 1)(rows)
  lowest, low, bits = _sight(rule, limits, time, heads // kv_heads)
  scalars = (limits.offset, limits.kv_length, lowest)
  arrays = [rows, pad(low, slots), pad(bits, 0), k, v]
  if k_scales is not None:
    arrays += [k_scales[:, :, None], v_scales[:, :, None]]
  out, lse = _call(rule, splits, block, scalars, arrays, interpret)
  queries = lambda x: blockwise.queries_of(x[:, :, :used_rows], time)
  parts = [
    (
      queries(out[:, :, part]).astype(q.dtype if splits == 1 else jnp.float32),
      queries(lse[:, :, part, :, :1])[..., 0].transpose(0, 2, 1),
    )
    for part in range(splits)
  ]
  out, lse = parts[0] if splits == 1 else merge(parts)
  return out.astype(q.dtype), lse


def _sight(rule, limits, time: int, groups: int):
  """What each row of queries sees.

  Returns:
    The lowest slot that any query of a row of the batch sees [B] int32, the
    lowest of each query [B, G T, 1] int32, and which of the new slots it sees
    [B, G T, 128] float32 of zeros and ones.
  """
  bits = limits.ancestors
  if bits is None:
    chain = jnp.tri(time, dtype=bool)
    bits = jnp.broadcast_to(chain, (len(limits.offset), time, time))
  depth = bits.sum(-1, dtype=jnp.int32) - 1
  low = jnp.zeros_like(depth)
  if rule.window is not None:
    low = jnp.maximum(limits.offset[:, None] + depth - rule.window + 1, 0)
    bits &= depth[:, :, None] - depth[:, None] < rule.window
  bits = jnp.pad(bits, ((0, 0), (0, 0), (0, _LANES - time)))
  a_group = lambda x: jnp.tile(x, (1, groups, 1))
  return low.min(1), a_group(low[..., None]), a_group(bits.astype(jnp.float32))


def _call(rule, splits, block, scalars, arrays, interpret):
  rows, _, _, k, v = arrays[:5]
  batch, kv_heads, count, width = rows.shape
  parts = batch, kv_heads, splits, count
  slots, v_width = v.shape[2:]
  blocks = slots // block // splits

  def at_block(b, h, part, j, offset, length, lowest):
    del offset
    first = lax.div(lowest[b], block)
    last = lax.div(jnp.maximum(length[b] - 1, 0), block)
    return b, h, jnp.clip(part * blocks + j, first, jnp.maximum(first, last)), 0

  def at_scale(*args):
    b, h, column, _ = at_block(*args)
    return b, h, 0, column

  a_row = lambda b, h, *_: (b, h, 0, 0)
  of_batch = lambda b, *_: (b, 0, 0)
  of_part = lambda b, h, part, *_: (b, h, part, 0, 0)
  specs = [
    pl.BlockSpec((1, 1, count, width), a_row),
    pl.BlockSpec((1, count, 1), of_batch),
    pl.BlockSpec((1, count, _LANES), of_batch),
    pl.BlockSpec((1, 1, block, width), at_block),
    pl.BlockSpec((1, 1, block, v_width), at_block),
    pl.BlockSpec((1, 1, 1, block), at_scale),
    pl.BlockSpec((1, 1, 1, block), at_scale),
  ][: len(arrays)]
  work = roofline.decode_attention(
    batch=batch,
    time=count,
    slots=slots,
    heads=kv_heads,
    kv_heads=kv_heads,
    width=width,
    cache_bytes=k.dtype.itemsize,
  )
  return pl.pallas_call(
    functools.partial(_kernel, rule=rule, blocks=blocks),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,
      grid=(batch, kv_heads, splits, blocks),
      in_specs=specs,
      out_specs=[
        pl.BlockSpec((1, 1, 1, count, v_width), of_part),
        pl.BlockSpec((1, 1, 1, count, _LANES), of_part),
      ],
      scratch_shapes=[
        pltpu.VMEM((count, _LANES), jnp.float32),
        pltpu.VMEM((count, _LANES), jnp.float32),
        pltpu.VMEM((count, v_width), jnp.float32),
      ],
    ),
    out_shape=[
      shards.out_shape((*parts, v_width), jnp.float32, rows),
      shards.out_shape((*parts, _LANES), jnp.float32, rows),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=int(work.flops),
      transcendentals=batch * kv_heads * count * slots,
      bytes_accessed=int(work.bytes),
    ),
    interpret=interpret,
    name='decode_attention',
  )(*scalars, *arrays)


def _kernel(offset_ref, length_ref, lowest_ref, *refs, rule, blocks):
  """One block of slots for the queries of one key head."""
  q_ref, low_ref, bits_ref, k_ref, v_ref, *scales = refs[:-5]
  out_ref, lse_ref, largest_ref, total_ref, sum_ref = refs[-5:]
  b, part, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
  offset, length, lowest = offset_ref[b], length_ref[b], lowest_ref[b]
  n, m = q_ref.shape[2], k_ref.shape[2]
  first = (part * blocks + step) * m

  @pl.when(step == 0)
  def _():
    largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when((first < length) & (first + m > lowest))
  def _():
    q = q_ref[0, 0]
    scores = lax.dot_general(
      q,
      k_ref[0, 0].astype(q.dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    if scales:
      scores = scores * scales[0][0, 0]
    scores = scores * rule.scale
    if rule.softcap is not None:
      scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    keys = first + lax.broadcasted_iota(jnp.int32, (n, m), 1)
    node = first + lax.broadcasted_iota(jnp.int32, (_LANES, m), 1) - offset
    one_hot = node == lax.broadcasted_iota(jnp.int32, (_LANES, m), 0)
    bits = jnp.dot(
      bits_ref[0],
      one_hot.astype(jnp.float32),
      preferred_element_type=jnp.float32,
    )
    seen = (low_ref[0] <= keys) & (keys < offset) | (bits > 0.5)
    scores = jnp.where(seen, scores, -jnp.inf)

    old = largest_ref[...]
    new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
    # A query that has seen nothing yet has -inf: its weights must be 0.
    safe = jnp.where(new == -jnp.inf, 0.0, new)
    weights = jnp.exp(scores - safe[:, :1])
    shrink = jnp.exp(old - safe)
    total_ref[...] = total_ref[...] * shrink + weights.sum(1, keepdims=True)
    used = lambda slot: (lowest <= slot) & (slot < length)
    if scales:
      slot = first + lax.broadcasted_iota(jnp.int32, (1, m), 1)
      weights = weights * jnp.where(used(slot), scales[1][0, 0], 0.0)
    # What an unseen slot holds must not matter, and 0 times NaN is NaN.
    slot = first + lax.broadcasted_iota(jnp.int32, (m, 1), 0)
    values = v_ref[0, 0].astype(q.dtype)
    values = jnp.where(used(slot), values, jnp.zeros_like(values))
    gained = jnp.dot(
      weights.astype(q.dtype), values, preferred_element_type=jnp.float32
    )
    sum_ref[...] = sum_ref[...] * shrink[:, :1] + gained
    largest_ref[...] = new

  @pl.when(step == blocks - 1)
  def _():
    total = total_ref[...]
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out_ref[0, 0, 0] = sum_ref[...] / total[:, :1]
    lse_ref[0, 0, 0] = jnp.where(
      empty, -jnp.inf, largest_ref[...] + jnp.log(total)
    )
