"""What decode attention means: attention over the cache, dequantized whole."""

import jax
import jax.numpy as jnp

from pallas_kernels import masks
from pallas_kernels.attention import reference


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
  del splits  # parts of the work, and nothing of its meaning
  if k_scales is not None:
    k, v = (
      x.astype(jnp.float32) * scales[..., None]
      for x, scales in ((k, k_scales), (v, v_scales))
    )
  slots_first = (x.transpose(0, 2, 1, 3) for x in (k, v))
  return reference.attention(rule, q, *slots_first, limits)
