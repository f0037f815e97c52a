"""Attention of the decoder: over a whole sequence, and over a cache.

Both compute softmax(q k' / scale + mask) v with grouped queries (arXiv
2305.13245), an optional sliding window (arXiv 2310.06825) and an optional
soft-cap of the scores (arXiv 2408.00118). Statistics are float32.
"""

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.models.cache import BLOCK
from pallas_kernels.attention import api as flash
from pallas_kernels.dispatch import Implementation

# Finite, so that a block whose keys are all masked adds exp(0) terms that the
# rescaling of the next block multiplies by exactly zero, and never a NaN.
_MASKED = -1e30


def full_attention(
  queries: jax.Array,  # [B, T, H, head_dim], already scaled
  keys: jax.Array,  # [B, T, K, head_dim]
  values: jax.Array,  # [B, T, K, head_dim]
  *,
  window: int | None = None,
  softcap: float | None = None,
  implementation: Implementation = None,
) -> jax.Array:
  """Causal attention inside whole sequences: [B, T, H, head_dim].

  Differentiable, and memory grows with T (`pallas_kernels.attention`).
  """
  out, _ = flash.attention(
    queries,
    keys,
    values,
    causal=True,
    window=window,
    softcap=softcap,
    scale=1.0,
    implementation=implementation,
  )
  return out


def cached_attention(
  queries: jax.Array,  # [B, T, H, head_dim], already scaled
  keys: jax.Array,  # [B, K, S, head_dim], new keys already written
  values: jax.Array,  # [B, K, S, head_dim]
  positions: jax.Array,  # [B, T] int32, absolute
  *,
  window: int | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Attention of T new queries a row over its cache: [B, T, H, head_dim].

  Query t of row b sees the slots `s <= positions[b, t]`, and with a window only
  the last `window` of them; what other slots hold does not matter as long as it
  is finite. The cache is read block by block with a running maximum and sum
  (arXiv 1805.02867), from the first block any query needs to the last, so the
  cost follows the longest row and not the capacity.
  """
  batch, time, heads, head_dim = queries.shape
  if keys.shape[2] % BLOCK:
    # A shorter last block would be clamped to start before its own slots.
    raise ValueError(
      f'a cache must have a multiple of {BLOCK} slots, got {keys.shape[2]}:'
      ' make it with cache.init.'
    )
  groups = heads // keys.shape[1]
  # Rows of one product are the (group, time) pairs that share a key head.
  rows = _group(queries, keys.shape[1]).transpose(0, 2, 3, 1, 4)
  rows = rows.reshape(batch, keys.shape[1], groups * time, head_dim)
  row_position = jnp.tile(positions, (1, groups))[:, :, None]

  def read_block(index, carry):
    maximum, total, out = carry
    start = index * BLOCK
    key_block = lax.dynamic_slice_in_dim(keys, start, BLOCK, 2)
    value_block = lax.dynamic_slice_in_dim(values, start, BLOCK, 2)
    key_position = start + jnp.arange(BLOCK)[None, None]
    visible = _visible(row_position, key_position, window)[:, None]
    scores = jnp.einsum(
      'bkmh,bksh->bkms', rows, key_block, preferred_element_type=jnp.float32
    )
    scores = jnp.where(visible, _cap(scores, softcap), _MASKED)
    new_maximum = jnp.maximum(maximum, scores.max(-1, keepdims=True))
    shrink = jnp.exp(maximum - new_maximum)
    weights = jnp.exp(scores - new_maximum)
    block_out = jnp.einsum(
      'bkms,bksh->bkmh',
      weights.astype(values.dtype),
      value_block,
      preferred_element_type=jnp.float32,
    )
    total = total * shrink + weights.sum(-1, keepdims=True)
    return new_maximum, total, out * shrink + block_out

  first = 0
  if window is not None:
    first = jnp.maximum(positions.min() - window + 1, 0) // BLOCK
  last = positions.max() // BLOCK + 1
  statistic = jnp.zeros((*rows.shape[:3], 1), jnp.float32)
  carry = (statistic + _MASKED, statistic, jnp.zeros(rows.shape, jnp.float32))
  _, total, out = lax.fori_loop(first, last, read_block, carry)
  out = (out / total).reshape(batch, keys.shape[1], groups, time, head_dim)
  out = out.transpose(0, 3, 1, 2, 4).reshape(queries.shape)
  return out.astype(queries.dtype)


def _group(queries: jax.Array, kv_heads: int) -> jax.Array:
  """Splits the heads by the key head they share: [B, T, K, H / K, head_dim]."""
  batch, time, heads, head_dim = queries.shape
  return queries.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)


def _visible(query_position, key_position, window: int | None) -> jax.Array:
  visible = key_position <= query_position
  if window is not None:
    visible &= key_position > query_position - window
  return visible


def _cap(scores: jax.Array, softcap: float | None) -> jax.Array:
  return scores if softcap is None else softcap * jnp.tanh(scores / softcap)
