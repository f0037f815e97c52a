"""Attention of the decoder: over a whole sequence, and over a cache.

Both compute softmax(q k' / scale + mask) v with grouped queries (arXiv
2305.13245), an optional sliding window (arXiv 2310.06825) and an optional
soft-cap of the scores (arXiv 2408.00118). The kernels do the work; `None` for
`implementation` is the platform's choice.
"""

import jax

from efficiency_jax.models import cache as kv_cache
from pallas_kernels.attention import api as flash
from pallas_kernels.decode_attention import api as decode
from pallas_kernels.dispatch import Implementation

# Up to here the queries are few and reading the cache is the work; beyond, the
# tiles of flash attention pay.
FEW_QUERIES = 64


def full_attention(
  queries: jax.Array,  # [B, T, H, head_dim], already scaled
  keys: jax.Array,  # [B, T, K, head_dim]
  values: jax.Array,  # [B, T, K, head_dim]
  *,
  segments: jax.Array | None = None,  # [B, T] int32
  window: int | None = None,
  softcap: float | None = None,
  implementation: Implementation = None,
) -> jax.Array:
  """Causal attention inside whole sequences: [B, T, H, head_dim].

  Differentiable, and memory grows with T (`pallas_kernels.attention`). Tokens
  of different segments do not see each other.
  """
  out, _ = flash.attention(
    queries,
    keys,
    values,
    causal=True,
    q_segments=segments,
    kv_segments=segments,
    window=window,
    softcap=softcap,
    scale=1.0,
    implementation=implementation,
  )
  return out


def cached_attention(
  queries: jax.Array,  # [B, T, H, head_dim], already scaled
  keys: kv_cache.Slots,  # [B, K, S, head_dim], new keys already written
  values: kv_cache.Slots,  # [B, K, S, head_dim]
  start: jax.Array,  # [B] int32, slot of the first new token
  *,
  ancestors: jax.Array | None = None,  # [T, T] or [B, T, T] bool
  window: int | None = None,
  softcap: float | None = None,
  implementation: Implementation = None,
) -> jax.Array:
  """Attention of T new queries a row over its cache: [B, T, H, head_dim].

  Query t of row b sees the slots `s <= start[b] + t`, and with a window only
  the last `window` of them; what other slots hold does not matter. The cost
  follows the longest row and not the number of slots. With `ancestors` the new
  tokens are a tree (`pallas_kernels.decode_attention`).
  """
  options = {
    'window': window,
    'softcap': softcap,
    'scale': 1.0,
    'implementation': implementation,
  }
  length = start + queries.shape[1]
  int8 = isinstance(keys, kv_cache.Int8Slots)
  if queries.shape[1] <= FEW_QUERIES or ancestors is not None:
    if int8:
      (keys, k_scales), (values, v_scales) = keys, values
      options |= {'k_scales': k_scales, 'v_scales': v_scales}
    return decode.decode_attention(
      queries, keys, values, length, ancestors=ancestors, **options
    )[0]
  if int8:
    keys, values = (x.dequantize(queries.dtype) for x in (keys, values))
  slots_first = (x.transpose(0, 2, 1, 3) for x in (keys, values))
  return flash.attention(
    queries,
    *slots_first,
    causal=True,
    offset=start,
    kv_length=length,
    **options,
  )[0]
