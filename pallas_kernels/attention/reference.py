"""What attention means, in ten lines and quadratic memory."""

import jax
import jax.numpy as jnp

from pallas_kernels import masks


def attention(
  rule: masks.Rule,
  q: jax.Array,  # [B, Sq, H, D]
  k: jax.Array,  # [B, Sk, K, D]
  v: jax.Array,  # [B, Sk, K, Dv]
  limits: masks.Limits,
) -> tuple[jax.Array, jax.Array]:
  """softmax(cap(q k' scale) + mask) v and its log-sum-exp; see `api`."""
  groups = q.shape[2] // k.shape[2]
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  seen = masks.as_array(rule, limits, q.shape[1], k.shape[1])[:, None]
  # A key that no query sees must not matter, whatever it holds.
  used = seen.any(axis=(1, 2))[:, :, None, None]
  k, v = (jnp.where(used, x, 0).repeat(groups, 2).astype(dtype) for x in (k, v))
  scores = jnp.einsum('bihd,bjhd->bhij', q.astype(dtype), k) * rule.scale
  if rule.softcap is not None:
    scores = rule.softcap * jnp.tanh(scores / rule.softcap)
  scores = jnp.where(seen, scores, -jnp.inf)
  lse = jax.nn.logsumexp(scores, axis=-1)
  empty = jnp.isneginf(lse)[..., None]
  weights = jnp.where(
    empty, 0, jnp.exp(scores - jnp.where(empty, 0, lse[..., None]))
  )
  out = jnp.einsum('bhij,bjhd->bihd', weights, v)
  return out.astype(q.dtype), lse
