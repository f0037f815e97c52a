"""Flash attention on a TPU, in Pallas.

    grid (batch, head, row of tiles, step along the row); the last is innermost

      HBM                     VMEM                           HBM
      q [n, D]  -- once a row --> q                      out [n, Dv]
      k [m, D]  -- each step ---> k --> s = q k' --+     lse [n]
      v [m, Dv] -- each step ---> v ---------------+--> m, l, o --^ last step

The recurrence is that of `blockwise`; m, l and o stay in VMEM while the columns
go by. Which columns do is in `mosaic_tpu_tiles`: those that no query of the row
sees are neither fetched nor computed. `mosaic_tpu_backward` has the gradients.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels import shards
from pallas_kernels.attention import blockwise
from pallas_kernels.attention import mosaic_tpu_backward
from pallas_kernels.attention import mosaic_tpu_tiles as tiles

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
    NotImplementedError: The dtype or the tiles of the rule are not those of a
      TPU.
  """
  cut = tiles.layout(rule, q, k, v, limits, TILE)
  walk, scalars = tiles.walk_rows(cut, limits)
  batch, q_size, heads, width = q.shape
  groups, v_width = heads // k.shape[2], v.shape[3]
  (n, m), (rows, columns) = cut.size, cut.count
  q = tiles.head_major(q, n, rows)
  k, v = (tiles.head_major(x, m, columns) for x in (k, v))
  of_row = lambda b, h, i, j, *_: (b, h, i, 0)
  column = lambda b, i, j, scalars: walk.at(scalars, b, i, j)[0]
  # `//` asks for the sign, which needs to know the chip.
  of_column = lambda b, h, i, j, *scalars: (
    b,
    lax.div(h, groups),
    column(b, i, j, scalars),
    0,
  )
  in_specs = [
    pl.BlockSpec((1, 1, n, width), of_row),
    pl.BlockSpec((1, 1, m, width), of_column),
    pl.BlockSpec((1, 1, m, v_width), of_column),
  ]
  if cut.segmented:
    in_specs += [
      pl.BlockSpec((1, 1, 1, n), lambda b, h, i, j, *_: (b, i, 0, 0)),
      pl.BlockSpec(
        (1, 1, 1, m),
        lambda b, h, i, j, *scalars: (b, column(b, i, j, scalars), 0, 0),
      ),
    ]
  out, lse = pl.pallas_call(
    functools.partial(_kernel, cut=cut, walk=walk),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(batch, heads, rows, walk.steps),
      in_specs=in_specs,
      out_specs=[
        pl.BlockSpec((1, 1, n, v_width), of_row),
        pl.BlockSpec((1, 1, 1, 1, n), lambda b, h, i, j, *_: (b, h, i, 0, 0)),
      ],
      scratch_shapes=[
        pltpu.VMEM((n, _LANES), jnp.float32),
        pltpu.VMEM((n, _LANES), jnp.float32),
        pltpu.VMEM((n, v_width), jnp.float32),
      ],
    ),
    out_shape=[
      shards.out_shape((*q.shape[:3], v_width), q.dtype, q),
      shards.out_shape((batch, heads, rows, 1, n), jnp.float32, q),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=tiles.cost(cut, 2, heads, q, q, k, v),
    interpret=interpret,
    name='flash_attention',
  )(*scalars, q, k, v, *tiles.segments(cut, limits))
  out = out.transpose(0, 2, 1, 3)[:, :q_size]
  return out, lse.reshape(batch, heads, -1)[..., :q_size]


attention = blockwise.differentiable(forward, mosaic_tpu_backward.backward)


def _kernel(*refs, cut: tiles.Layout, walk: tiles.Walk):
  """One tile: scores of n queries and m keys."""
  scalars, (q_ref, k_ref, v_ref, *segments), refs = (
    refs[:5],
    refs[5:-5],
    refs[-5:],
  )
  out_ref, lse_ref, largest_ref, total_ref, sum_ref = refs
  b, row, step = (pl.program_id(axis) for axis in (0, 2, 3))
  column, needed = walk.at(scalars, b, row, step)

  @pl.when(step == 0)
  def _():
    largest_ref[...] = jnp.full_like(largest_ref, -jnp.inf)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(needed)
  def _():
    seen = tiles.visible(cut, scalars, b, row, column, segments)
    scores = tiles.scores(cut.rule, seen, q_ref[0, 0], k_ref[0, 0])
    v = tiles.without_unseen(cut, scalars, b, row, column, seen, v_ref[0, 0])
    old = largest_ref[...]
    new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
    # A query that has seen nothing yet has -inf: its weights must be 0.
    safe = jnp.where(new == -jnp.inf, 0.0, new)
    weights = jnp.exp(scores - safe[:, :1])
    shrink = jnp.exp(old - safe)
    total_ref[...] = total_ref[...] * shrink + weights.sum(1, keepdims=True)
    gained = tiles.product(weights.astype(v.dtype), v, 1, 0)
    sum_ref[...] = sum_ref[...] * shrink[:, :1] + gained
    largest_ref[...] = new

  @pl.when(step == walk.steps - 1)
  def _():
    total = total_ref[...]
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    out_ref[0, 0] = (sum_ref[...] / total[:, :1]).astype(out_ref.dtype)
    lse = jnp.where(empty, -jnp.inf, largest_ref[...] + jnp.log(total))
    lse_ref[0, 0, 0] = lse.T[:1]
