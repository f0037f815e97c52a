"""Flash attention in plain JAX: runs everywhere, and fast on a CPU.

    keys     tile 0   tile 1   tile 2
           +--------+--------+--------+
  queries  | s, p   | s, p   | hidden |   one row of tiles at a time:
   tile 1  |        |        |        |   m, l, o are all that is kept of it
           +--------+--------+--------+

The scores are never whole in memory. Each tile of keys updates, for every
query, the largest score m so far, the sum l and the output o (arXiv 2205.14135,
algorithm 1; arXiv 1805.02867):

    m' = max(m, max_j s_j)          p_j = exp(s_j - m')
    l' = l exp(m - m') + sum_j p_j
    o' = o exp(m - m') + sum_j p_j v_j

and in the end out = o / l, lse = m + log l. Tiles that no query of the row sees
are skipped. The backward pass computes each p again from the kept lse (its
algorithm 4):

    D  = sum_d dout out - dlse      dp = dout v'
    ds = p (dp - D)                 dv += p' dout, dk += ds' q, dq += ds k
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels import shards

# Queries and keys of a tile: the scores of one head group fit the cache of a
# core, and the products are large enough to be worth two cores.
TILE = (256, 512)
BACKWARD_TILE = (256, 256)  # it holds twice as many arrays of scores


class _Plan(NamedTuple):
  """Sizes, and which key tiles each row of tiles looks at."""

  size: tuple[int, int]
  count: tuple[int, int]
  columns: jax.Array | None  # [rows, n] int32, kept tiles of each row
  kept: jax.Array | None  # [rows] int32, how many of them count


def _plan(rule: masks.Rule, q_size: int, kv_size: int, tile) -> _Plan:
  size = (min(tile[0], q_size), min(tile[1], kv_size))
  if rule.tiles is not None:
    size = rule.tiles.size
  count = (-(-q_size // size[0]), -(-kv_size // size[1]))
  if rule.tiles is None:
    return _Plan(size, count, None, None)
  columns = jnp.asarray(rule.tiles.padded(0))
  kept = jnp.asarray([len(row) for row in rule.tiles.kept], jnp.int32)
  return _Plan(size, count, columns, kept)


def _column_loop(rule, limits, plan: _Plan, row, kv_size: int, body, carry):
  """Runs `body(column, carry)` for the key tiles that a row of tiles needs."""
  rows, columns = plan.size
  low, high = masks.key_range(rule, limits, row * rows, rows, kv_size)
  first, last = low // columns, -(-high // columns)
  if plan.columns is None:
    return lax.fori_loop(first, last, body, carry)

  def listed(n, carry):
    column = plan.columns[row, n]
    needed = (first <= column) & (column < last)
    return lax.cond(needed, body, lambda _, carry: carry, column, carry)

  return lax.fori_loop(0, plan.kept[row], listed, carry)


def _tile_scores(rule, limits, plan, row, column, q_tile, k_tile, q_size):
  """Scores [B, K, G, n, m] float32 of a tile, -inf where nothing is seen, and
  which of the keys any query sees [B, 1, m, 1]."""
  queries = row * plan.size[0] + jnp.arange(plan.size[0])
  # Those of the padding see no more than the last query does.
  queries = jnp.minimum(queries, q_size - 1)
  keys = column * plan.size[1] + jnp.arange(plan.size[1])
  seen = masks.visible(rule, limits, queries, keys)
  scores = jnp.einsum(
    'bkgnd,bkmd->bkgnm', q_tile, k_tile, preferred_element_type=jnp.float32
  )
  scores = scores * rule.scale
  if rule.softcap is not None:
    scores = rule.softcap * jnp.tanh(scores / rule.softcap)
  scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
  return scores, seen.any(axis=1)[:, None, :, None]


def forward(
  rule: masks.Rule,
  q: jax.Array,  # [B, Sq, H, D]
  k: jax.Array,  # [B, Sk, K, D]
  v: jax.Array,  # [B, Sk, K, Dv]
  limits: masks.Limits,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, Sq, H, Dv] and log-sum-exp [B, H, Sq]; see `api`."""
  batch, q_size, heads, _ = q.shape
  kv_size, kv_heads = k.shape[1:3]
  plan = _plan(rule, q_size, kv_size, TILE)
  q_tiles = _query_tiles(q, kv_heads, plan)
  k, v = (_key_rows(x, plan) for x in (k, v))

  def row_of_tiles(inputs):
    row, q_tile = inputs

    def step(column, carry):
      largest, total, out = carry
      k_tile, v_tile = (_columns(x, column, plan) for x in (k, v))
      scores, used = _tile_scores(
        rule, limits, plan, row, column, q_tile, k_tile, q_size
      )
      # What an unseen key holds must not matter, and 0 times NaN is NaN.
      v_tile = jnp.where(used, v_tile, 0)
      new = jnp.maximum(largest, scores.max(-1, keepdims=True))
      # A query that has seen nothing yet has -inf: its weights must be 0.
      safe = jnp.where(jnp.isneginf(new), 0, new)
      weights = jnp.exp(scores - safe)
      shrink = jnp.exp(largest - safe)
      total = total * shrink + weights.sum(-1, keepdims=True)
      gained = jnp.einsum(
        'bkgnm,bkmd->bkgnd',
        weights.astype(v_tile.dtype),
        v_tile,
        preferred_element_type=jnp.float32,
      )
      return new, total, out * shrink + gained

    filled = lambda width, value: shards.full(
      (*q_tile.shape[:-1], width), value, jnp.float32, q_tile
    )
    largest, total, out = _column_loop(
      rule,
      limits,
      plan,
      row,
      kv_size,
      step,
      (filled(1, -jnp.inf), filled(1, 0), filled(v.shape[-1], 0)),
    )
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(total))
    return (out / total).astype(q.dtype), lse[..., 0]

  out, lse = lax.map(row_of_tiles, (jnp.arange(plan.count[0]), q_tiles))
  out = _whole_queries(out, q_size)
  lse = lse.transpose(1, 2, 3, 0, 4).reshape(batch, heads, -1)[..., :q_size]
  return out, lse


def backward(rule, q, k, v, limits, out, lse, d_out, d_lse):
  """Gradients of q, k and v; `lse` and `d_lse` are [B, H, Sq]."""
  q_size, kv_heads = q.shape[1], k.shape[2]
  kv_size = k.shape[1]
  plan = _plan(rule, q_size, kv_size, BACKWARD_TILE)
  empty = jnp.isneginf(lse)
  delta = jnp.einsum(
    'bihd,bihd->bhi', out, d_out, preferred_element_type=jnp.float32
  )
  delta = jnp.where(empty, 0, delta - d_lse)
  lse = jnp.where(empty, 0, lse)
  split = lambda x: _query_tiles(
    x.transpose(0, 2, 1)[..., None], kv_heads, plan
  )
  tiles = (
    jnp.arange(plan.count[0]),
    _query_tiles(q, kv_heads, plan),
    _query_tiles(d_out, kv_heads, plan),
    split(lse),
    split(delta),
  )
  k_rows, v_rows = (_key_rows(x, plan) for x in (k, v))
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  zeros = lambda x: shards.full(x.shape, 0, jnp.float32, x)

  def row_of_tiles(carry, inputs):
    row, q_tile, d_out_tile, lse_tile, delta_tile = inputs

    def step(column, carry):
      dq, dk, dv = carry
      k_tile, v_tile = (_columns(x, column, plan) for x in (k_rows, v_rows))
      scores, used = _tile_scores(
        rule, limits, plan, row, column, q_tile, k_tile, q_size
      )
      k_tile, v_tile = (jnp.where(used, x, 0) for x in (k_tile, v_tile))
      weights = jnp.exp(scores - lse_tile)
      d_weights = product('bkgnd,bkmd->bkgnm', d_out_tile, v_tile)
      d_scores = weights * (d_weights - delta_tile)
      if rule.softcap is not None:
        hidden = jnp.isneginf(scores)
        bend = jnp.where(hidden, 0, scores) / rule.softcap
        d_scores = d_scores * (1 - bend * bend)
      d_scores = (d_scores * rule.scale).astype(q.dtype)
      weights = weights.astype(q.dtype)
      dq = dq + product('bkgnm,bkmd->bkgnd', d_scores, k_tile)
      dk = _add(
        dk, product('bkgnm,bkgnd->bkmd', d_scores, q_tile), column, plan
      )
      dv = _add(
        dv, product('bkgnm,bkgnd->bkmd', weights, d_out_tile), column, plan
      )
      return dq, dk, dv

    dq, dk, dv = _column_loop(
      rule, limits, plan, row, kv_size, step, (zeros(q_tile), *carry)
    )
    return (dk, dv), dq

  (dk, dv), dq = lax.scan(row_of_tiles, (zeros(k_rows), zeros(v_rows)), tiles)
  back = lambda x, like: x.transpose(0, 2, 1, 3)[:, :kv_size].astype(like.dtype)
  return _whole_queries(dq, q_size).astype(q.dtype), back(dk, k), back(dv, v)


def differentiable(
  forward: Callable[..., tuple[jax.Array, jax.Array]],
  backward: Callable[..., tuple[jax.Array, ...]] = backward,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Joins a forward and a backward pass; the latter is the one above if none.

  `forward(rule, q, k, v, limits)` returns out [B, Sq, H, Dv] and log-sum-exp
  [B, H, Sq], which is all that the backward pass needs besides its inputs.
  """

  @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
  def attention(rule, q, k, v, limits):
    return forward(rule, q, k, v, limits)

  def keep(rule, q, k, v, limits):
    out, lse = forward(rule, q, k, v, limits)
    return (out, lse), (q, k, v, limits, out, lse)

  def pull_back(rule, kept, cotangents):
    return *backward(rule, *kept, *cotangents), None

  attention.defvjp(keep, pull_back)
  return attention


attention = differentiable(forward)


def _query_tiles(x: jax.Array, kv_heads: int, plan: _Plan) -> jax.Array:
  """[B, Sq, H, D] -> [rows, B, K, H / K, n, D], padded with zeros."""
  batch, size, heads, width = x.shape
  rows, n = plan.count[0], plan.size[0]
  x = jnp.pad(x, ((0, 0), (0, rows * n - size), (0, 0), (0, 0)))
  x = x.reshape(batch, rows, n, kv_heads, heads // kv_heads, width)
  return x.transpose(1, 0, 3, 4, 2, 5)


def _whole_queries(x: jax.Array, size: int) -> jax.Array:
  """[rows, B, K, G, n, D] -> [B, Sq, H, D]."""
  rows, batch, kv_heads, groups, n, width = x.shape
  x = x.transpose(1, 0, 4, 2, 3, 5)
  return x.reshape(batch, rows * n, kv_heads * groups, width)[:, :size]


def _key_rows(x: jax.Array, plan: _Plan) -> jax.Array:
  """[B, Sk, K, D] -> [B, K, columns * m, D], padded with zeros."""
  padding = plan.count[1] * plan.size[1] - x.shape[1]
  return jnp.pad(
    x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, padding), (0, 0))
  )


def _columns(x: jax.Array, column: jax.Array, plan: _Plan) -> jax.Array:
  return lax.dynamic_slice_in_dim(x, column * plan.size[1], plan.size[1], 2)


def _add(total: jax.Array, part: jax.Array, column, plan: _Plan) -> jax.Array:
  part = part + _columns(total, column, plan)
  return lax.dynamic_update_slice_in_dim(total, part, column * plan.size[1], 2)
