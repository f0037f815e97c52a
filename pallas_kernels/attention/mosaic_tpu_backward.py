"""The gradients of flash attention on a TPU, in Pallas.

    dq: grid (batch, head, row, step)   dk, dv: (batch, key head, column,
                                                 query head of it, step)
           k, v ->  each step                  +----------+
         +------+------+------+                | dk    dv | kept, all heads
    q    | s p  | s p  | s p  |                +----------+
    dout | dp   | dp   | dp   |           q    | s' p'    |  |
    lse  | ds   | ds   | ds   |           dout | dp' ds'  |  | each step
    kept +------+------+------+           lse  +----------+  v
    dq =   ds k + ds k + ds k                  | s' p' .. |

Each tile of p is computed again from the log-sum-exp that the forward pass kept
(arXiv 2205.14135, algorithm 4):

    D  = sum_d dout out - dlse      p  = exp(s - lse)      dp = dout v'
    ds = p (dp - D)                 dv = p' dout, dk = ds' q, dq = ds k

The second kernel holds its tiles transposed, so that both of its products are
plain ones and the statistics of the queries lie along the lanes.
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
from pallas_kernels.attention import mosaic_tpu_tiles as tiles

TILE = (256, 512)


def backward(
  rule: masks.Rule,
  q: jax.Array,  # [B, Sq, H, D]
  k: jax.Array,  # [B, Sk, K, D]
  v: jax.Array,  # [B, Sk, K, Dv]
  limits: masks.Limits,
  out: jax.Array,  # [B, Sq, H, Dv]
  lse: jax.Array,  # [B, H, Sq]
  d_out: jax.Array,  # [B, Sq, H, Dv]
  d_lse: jax.Array,  # [B, H, Sq]
  *,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v from those of both outputs.

  `interpret` runs it without a TPU, as `pallas_call` does.

  Raises:
    NotImplementedError: As the forward pass.
  """
  cut = tiles.layout(rule, q, k, v, limits, TILE)
  empty = jnp.isneginf(lse)
  delta = jnp.einsum(
    'bihd,bihd->bhi', out, d_out, preferred_element_type=jnp.float32
  )
  delta = jnp.where(empty, 0, delta - d_lse)
  lse = jnp.where(empty, 0, lse)
  (n, m), (rows, columns) = cut.size, cut.count
  arrays = (
    tiles.head_major(q, n, rows),
    tiles.head_major(k, m, columns),
    tiles.head_major(v, m, columns),
    tiles.head_major(d_out, n, rows),
    tiles.lined(lse, n, rows),
    tiles.lined(delta, n, rows),
    *tiles.segments(cut, limits),
  )
  dq = _queries(cut, limits, arrays, interpret)
  dk, dv = _keys(cut, limits, arrays, interpret)
  back = lambda x, like: x.transpose(0, 2, 1, 3)[:, : like.shape[1]]
  return back(dq, q), back(dk, k), back(dv, v)


def _specs(cut: tiles.Layout, arrays, place) -> list[pl.BlockSpec]:
  """Blocks of the inputs; `place` gives the batch, the query head, the key
  head, the row and the column of a step of the grid."""
  (n, m), width, v_width = cut.size, arrays[0].shape[3], arrays[2].shape[3]

  def spec(shape, *names):
    def index(*args):
      at = dict(zip('bhkij', place(*args), strict=True))
      return *(at[name] for name in names), *(0,) * (len(shape) - len(names))

    return pl.BlockSpec(shape, index)

  statistic = spec((1, 1, 1, 1, n), 'b', 'h', 'i')
  specs = [
    spec((1, 1, n, width), 'b', 'h', 'i'),
    spec((1, 1, m, width), 'b', 'k', 'j'),
    spec((1, 1, m, v_width), 'b', 'k', 'j'),
    spec((1, 1, n, v_width), 'b', 'h', 'i'),
    statistic,
    statistic,
  ]
  if cut.segmented:
    specs += [spec((1, 1, 1, n), 'b', 'i'), spec((1, 1, 1, m), 'b', 'j')]
  return specs


def _queries(cut: tiles.Layout, limits, arrays, interpret) -> jax.Array:
  """dq [B, H, S', D]."""
  q, k, v, d_out, *_ = arrays
  batch, heads, _, width = q.shape
  groups, n = heads // k.shape[1], cut.size[0]
  walk, scalars = tiles.walk_rows(cut, limits)

  def place(b, h, i, step, *scalars):
    return b, h, lax.div(h, groups), i, walk.at(scalars, b, i, step)[0]

  return pl.pallas_call(
    functools.partial(_queries_kernel, cut=cut, walk=walk),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(batch, heads, walk.lines, walk.steps),
      in_specs=_specs(cut, arrays, place),
      out_specs=pl.BlockSpec(
        (1, 1, n, width), lambda b, h, i, step, *_: (b, h, i, 0)
      ),
      scratch_shapes=[pltpu.VMEM((n, width), jnp.float32)],
    ),
    out_shape=shards.out_shape(q.shape, q.dtype, q),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=tiles.cost(cut, 3, heads, q, q, k, v, d_out),
    interpret=interpret,
    name='flash_attention_dq',
  )(*scalars, *arrays)


def _keys(cut: tiles.Layout, limits, arrays, interpret):
  """dk [B, K, S', D] and dv [B, K, S', Dv]."""
  q, k, v, d_out, *_ = arrays
  batch, heads, m = q.shape[0], q.shape[1], cut.size[1]
  kv_heads = k.shape[1]
  groups = heads // kv_heads
  walk, scalars = tiles.walk_columns(cut, limits)

  def place(b, h, j, g, step, *scalars):
    return b, h * groups + g, h, walk.at(scalars, b, j, step)[0], j

  def out_spec(x):
    return pl.BlockSpec(
      (1, 1, m, x.shape[3]), lambda b, h, j, g, step, *_: (b, h, j, 0)
    )

  return pl.pallas_call(
    functools.partial(_keys_kernel, cut=cut, walk=walk),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(batch, kv_heads, walk.lines, groups, walk.steps),
      in_specs=_specs(cut, arrays, place),
      out_specs=[out_spec(k), out_spec(v)],
      scratch_shapes=[
        pltpu.VMEM((m, k.shape[3]), jnp.float32),
        pltpu.VMEM((m, v.shape[3]), jnp.float32),
      ],
    ),
    out_shape=[
      shards.out_shape(k.shape, k.dtype, k),
      shards.out_shape(v.shape, v.dtype, v),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',) * 3 + ('arbitrary',) * 2
    ),
    cost_estimate=tiles.cost(cut, 4, heads, q, d_out, k, k, v, v),
    interpret=interpret,
    name='flash_attention_dk_dv',
  )(*scalars, *arrays)


def _d_scores(rule: masks.Rule, seen, scores, weights, d_weights, delta):
  """ds before the factor of the scores, which its products get at the end."""
  d_scores = weights * (d_weights - delta)
  if rule.softcap is not None:
    bend = scores / rule.softcap
    d_scores = d_scores * (1 - bend * bend)
  # Not 0 times what the values of unseen keys made of `d_weights`.
  return jnp.where(seen, d_scores, 0.0)


def _queries_kernel(*refs, cut: tiles.Layout, walk: tiles.Walk):
  """dq of n queries gains what a tile of m keys adds."""
  scalars, (q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *segments) = (
    refs[:5],
    refs[5:-2],
  )
  dq_ref, sum_ref = refs[-2:]
  b, row, step = (pl.program_id(axis) for axis in (0, 2, 3))
  column, needed = walk.at(scalars, b, row, step)

  @pl.when(step == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(needed)
  def _():
    q, k, v, d_out = (x[0, 0] for x in (q_ref, k_ref, v_ref, d_out_ref))
    lse, delta = (tiles.upright(x[0, 0, 0]) for x in (lse_ref, delta_ref))
    seen = tiles.visible(cut, scalars, b, row, column, segments)
    scores = tiles.scores(cut.rule, seen, q, k)
    weights = jnp.exp(scores - lse)
    d_weights = tiles.product(d_out, v, 1, 1)
    ds = _d_scores(cut.rule, seen, scores, weights, d_weights, delta)
    k = tiles.without_unseen(cut, scalars, b, row, column, seen, k)
    sum_ref[...] += tiles.product(ds.astype(k.dtype), k, 1, 0)

  @pl.when(step == walk.steps - 1)
  def _():
    dq_ref[0, 0] = (sum_ref[...] * cut.rule.scale).astype(dq_ref.dtype)


def _keys_kernel(*refs, cut: tiles.Layout, walk: tiles.Walk):
  """dk and dv of m keys gain what a tile of n queries adds."""
  scalars, (q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, *segments) = (
    refs[:5],
    refs[5:-4],
  )
  dk_ref, dv_ref, dk_sum_ref, dv_sum_ref = refs[-4:]
  b, column, group, step = (pl.program_id(axis) for axis in (0, 2, 3, 4))
  row, needed = walk.at(scalars, b, column, step)

  @pl.when((group == 0) & (step == 0))
  def _():
    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

  @pl.when(needed)
  def _():
    q, k, v, d_out = (x[0, 0] for x in (q_ref, k_ref, v_ref, d_out_ref))
    seen = tiles.visible(
      cut, scalars, b, row, column, segments, transposed=True
    )
    scores = tiles.scores(cut.rule, seen, k, q)
    weights = jnp.exp(scores - lse_ref[0, 0, 0])
    dv_sum_ref[...] += tiles.product(weights.astype(q.dtype), d_out, 1, 0)
    d_weights = tiles.product(v, d_out, 1, 1)
    ds = _d_scores(
      cut.rule, seen, scores, weights, d_weights, delta_ref[0, 0, 0]
    )
    dk_sum_ref[...] += tiles.product(ds.astype(q.dtype), q, 1, 0)

  last = (group == pl.num_programs(3) - 1) & (step == walk.steps - 1)

  @pl.when(last)
  def _():
    dk_ref[0, 0] = (dk_sum_ref[...] * cut.rule.scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_sum_ref[...].astype(dv_ref.dtype)
