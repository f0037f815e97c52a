"""Decode attention in plain JAX: runs everywhere.

      cache of a row   slots 0..127   128..255   256..383   384..511
                     +--------------+----------+----------+----------+
     T new queries   |   s, p       |   s, p   | s, p |   |  unread  |
                     +--------------+----------+------^---+----------+
                                                    length

The (group, time) pairs that share a key head are the rows of one product, so
each block of the cache is read once, with the running maximum and sum of
`attention.blockwise`. Blocks beyond the longest row, and before the window of
every query, are never read. The scales of an int8 cache are factors of a score
and of a weight, so the cache itself is never multiplied:

    q (k_s a_s)' = (q k_s') a_s         p_s (v_s c_s) = (p_s c_s) v_s
"""

import itertools

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels import shards
from pallas_kernels.attention.api import merge

BLOCK = 128  # slots read at a time; a row of them stays in the cache of a core


def attention(
  rule: masks.Rule,
  splits: int | None,
  q: jax.Array,  # [B, T, H, D]
  k: jax.Array,  # [B, K, S, D]
  v: jax.Array,  # [B, K, S, Dv]
  limits: masks.Limits,
  k_scales: jax.Array | None,  # [B, K, S] float32
  v_scales: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Out [B, T, H, Dv] and log-sum-exp [B, H, T]; see `api`."""
  batch, time, heads, _ = q.shape
  kv_heads, slots = k.shape[1:3]
  groups = heads // kv_heads
  block = min(BLOCK, slots)
  rows = rows_of(q, kv_heads)

  def read_block(index, carry):
    largest, total, out = carry
    # A shorter last block begins earlier and hides what was read before.
    start = jnp.minimum(index * block, slots - block)
    part = lambda x: lax.dynamic_slice_in_dim(x, start, block, 2)
    keys = start + jnp.arange(block)
    seen = masks.visible(rule, limits, jnp.arange(time), keys)
    if slots % block:
      seen &= keys >= index * block
    used = seen.any(1)[:, None, :, None]
    seen = jnp.tile(seen, (1, groups, 1))[:, None]
    scores = jnp.einsum(
      'bkmd,bksd->bkms',
      rows,
      part(k).astype(rows.dtype),
      preferred_element_type=jnp.float32,
    )
    if k_scales is not None:
      scores = scores * part(k_scales)[:, :, None]
    scores = scores * rule.scale
    if rule.softcap is not None:
      scores = rule.softcap * jnp.tanh(scores / rule.softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    new = jnp.maximum(largest, scores.max(-1, keepdims=True))
    # A query that has seen nothing yet has -inf: its weights must be 0.
    safe = jnp.where(jnp.isneginf(new), 0, new)
    weights, shrink = jnp.exp(scores - safe), jnp.exp(largest - safe)
    total = total * shrink + weights.sum(-1, keepdims=True)
    if v_scales is not None:
      weights = weights * jnp.where(used[..., 0], part(v_scales), 0)[:, :, None]
    # What an unseen slot holds must not matter, and 0 times NaN is NaN.
    values = jnp.where(used, part(v), 0).astype(rows.dtype)
    gained = jnp.einsum(
      'bkms,bksd->bkmd',
      weights.astype(rows.dtype),
      values,
      preferred_element_type=jnp.float32,
    )
    return new, total, out * shrink + gained

  splits = splits or 1
  low, high = masks.key_range(rule, limits, jnp.int32(0), time, slots)
  low, high = low // block, -(-high // block)

  def read(low, high):
    """The result over the blocks `low .. high - 1`."""
    filled = lambda width, value: shards.full(
      (*rows.shape[:3], width), value, jnp.float32, rows
    )
    carry = (filled(1, -jnp.inf), filled(1, 0), filled(v.shape[3], 0))
    largest, total, out = lax.fori_loop(low, high, read_block, carry)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, largest + jnp.log(total))
    return queries_of(out / total, time), lse.reshape(batch, heads, time)

  ends = [-(-slots // block) * part // splits for part in range(splits + 1)]
  parts = [
    read(jnp.maximum(low, first), jnp.minimum(high, last))
    for first, last in itertools.pairwise(ends)
  ]
  out, lse = parts[0] if splits == 1 else merge(parts)
  return out.astype(q.dtype), lse


def rows_of(q: jax.Array, kv_heads: int) -> jax.Array:
  """[B, T, H, D] -> [B, K, G T, D]: the queries that share a key head."""
  batch, time, heads, width = q.shape
  q = q.reshape(batch, time, kv_heads, heads // kv_heads, width)
  return q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)


def queries_of(rows: jax.Array, time: int) -> jax.Array:
  """[B, K, G T, D] -> [B, T, H, D]: undoes `rows_of`."""
  batch, kv_heads, _, width = rows.shape
  rows = rows.reshape(batch, kv_heads, -1, time, width)
  return rows.transpose(0, 3, 1, 2, 4).reshape(batch, time, -1, width)
