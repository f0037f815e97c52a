"""Flash attention on a TPU: the forward pass in Pallas.

    grid (batch, head, row of tiles, column of tiles); the last one is innermost

      HBM                     VMEM                           HBM
      q [n, D]  -- once a row --> q                      out [n, Dv]
      k [m, D]  -- each step ---> k --> s = q k' --+     lse [n]
      v [m, Dv] -- each step ---> v ---------------+--> m, l, o --^ last step

The recurrence is that of `blockwise`; m, l and o stay in VMEM while the columns
go by. Columns that no query of a row of tiles sees are skipped. The backward
pass is the one of `blockwise`.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels.attention import blockwise

TILE = (256, 512)
_LANES = 128  # of a vector register; statistics fill all of them alike


def forward(
  rule: masks.Rule,
  q: jax.Array,  # [B, Sq, H, D]
  k: jax.Array,  # [B, Sk, K, D]
  v: jax.Array,  # [B, Sk, K, Dv]
  limits: masks.Limits,
  *,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, Sq, H, Dv] and log-sum-exp [B, H, Sq]; see `api`.

  `interpret` runs it without a TPU, as `pallas_call` does.

  Raises:
    NotImplementedError: The mask has segments or tiles, or the dtype is not
      one of a TPU.
  """
  if limits.q_segments is not None or rule.tiles is not None:
    raise NotImplementedError('segments and tiles are not in this kernel.')
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(f'{q.dtype} is not a dtype of this kernel.')
  batch, q_size, heads, width = q.shape
  kv_size, kv_heads, v_width = *k.shape[1:3], v.shape[3]
  rows = min(TILE[0], _up(q_size, _LANES))
  columns = min(TILE[1], _up(kv_size, _LANES))
  q, k, v = (
    _head_major(x, size) for x, size in ((q, rows), (k, columns), (v, columns))
  )
  grid = (batch, heads, q.shape[2] // rows, k.shape[2] // columns)
  groups = heads // kv_heads
  at_row = lambda b, h, i, j, *_: (b, h, i, 0)
  # `//` asks for the sign, which needs to know the chip.
  at_column = lambda b, h, i, j, *_: (b, lax.div(h, groups), j, 0)
  flops = 4 * batch * heads * q_size * kv_size * width
  out, lse = pl.pallas_call(
    functools.partial(_kernel, rule=rule),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=grid,
      in_specs=[
        pl.BlockSpec((1, 1, rows, width), at_row),
        pl.BlockSpec((1, 1, columns, width), at_column),
        pl.BlockSpec((1, 1, columns, v_width), at_column),
      ],
      out_specs=[
        pl.BlockSpec((1, 1, rows, v_width), at_row),
        pl.BlockSpec((1, 1, 1, rows), lambda b, h, i, j, *_: (b, h, 0, i)),
      ],
      scratch_shapes=[
        pltpu.VMEM((rows, _LANES), jnp.float32),
        pltpu.VMEM((rows, _LANES), jnp.float32),
        pltpu.VMEM((rows, v_width), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((*q.shape[:3], v_width), q.dtype),
      jax.ShapeDtypeStruct((batch, heads, 1, q.shape[2]), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops // 2 if rule.causal else flops,
      transcendentals=batch * heads * q_size * kv_size,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, q, k, v)),
    ),
    interpret=interpret,
    name='flash_attention',
  )(limits.offset, limits.kv_length, q, k, v)
  return out.transpose(0, 2, 1, 3)[:, :q_size], lse[:, :, 0, :q_size]


attention = blockwise.differentiable(forward)


def _kernel(
  offset_ref,
  length_ref,
  q_ref,
  k_ref,
  v_ref,
  out_ref,
  lse_ref,
  largest_ref,
  total_ref,
  sum_ref,
  *,
  rule: masks.Rule,
):
  """One tile: scores of n queries and m keys."""
  column, last = pl.program_id(3), pl.num_programs(3) - 1
  n, m = q_ref.shape[2], k_ref.shape[2]
  offset = offset_ref[pl.program_id(0)]
  length = length_ref[pl.program_id(0)]
  first_position = pl.program_id(2) * n + offset
  first_key = column * m

  @pl.when(column == 0)
  def _():
    largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def within(low_position, high_position, keys):
    """Keys that a query between two positions may see."""
    seen = keys < length
    if rule.causal:
      seen &= keys <= high_position
    if rule.window is not None:
      seen &= keys > low_position - rule.window
      if not rule.causal:
        seen &= keys < high_position + rule.window
    return seen

  last_position = first_position + n - 1
  needed = first_key < length
  if rule.causal:
    needed &= first_key <= last_position
  if rule.window is not None:
    needed &= first_key + m > first_position - rule.window + 1
    if not rule.causal:
      needed &= first_key < last_position + rule.window

  @pl.when(needed)
  def _():
    keys = first_key + lax.broadcasted_iota(jnp.int32, (m, 1), 0)
    used = within(first_position, last_position, keys)
    # What an unseen key holds must not matter, and 0 times NaN is NaN.
    k = jnp.where(used, k_ref[0, 0], 0)
    v = jnp.where(used, v_ref[0, 0], 0)
    scores = lax.dot_general(
      q_ref[0, 0],
      k,
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    scores = scores * rule.scale
    if rule.softcap is not None:
      scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    position = first_position + lax.broadcasted_iota(jnp.int32, (n, m), 0)
    keys = first_key + lax.broadcasted_iota(jnp.int32, (n, m), 1)
    scores = jnp.where(within(position, position, keys), scores, -jnp.inf)

    old = largest_ref[...]
    new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
    # A query that has seen nothing yet has -inf: its weights must be 0.
    safe = jnp.where(new == -jnp.inf, 0.0, new)
    weights = jnp.exp(scores - safe[:, :1])
    shrink = jnp.exp(old - safe)
    total_ref[...] = total_ref[...] * shrink + weights.sum(1, keepdims=True)
    gained = jnp.dot(
      weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    sum_ref[...] = sum_ref[...] * shrink[:, :1] + gained
    largest_ref[...] = new

  @pl.when(column == last)
  def _():
    total = total_ref[...]
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out_ref[0, 0] = (sum_ref[...] / total[:, :1]).astype(out_ref.dtype)
    lse = jnp.where(empty, -jnp.inf, largest_ref[...] + jnp.log(total))
    lse_ref[0, 0] = lse.T[:1]


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _head_major(x: jax.Array, tile: int) -> jax.Array:
  """[B, S, H, D] -> [B, H, S', D] with S' a multiple of `tile`."""
  padding = _up(x.shape[1], tile) - x.shape[1]
  x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0)))
  return x.transpose(0, 2, 1, 3)
