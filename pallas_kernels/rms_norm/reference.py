"""What an RMS norm means."""

import jax
from jax import lax
import jax.numpy as jnp


def rms_norm(
  x: jax.Array,  # [N, D]
  scale: jax.Array,  # [D] float32
  *,
  epsilon: float,
) -> jax.Array:
  """x / sqrt(mean(x^2) + epsilon) scale, in float32: [N, D] in x's dtype."""
  x32 = x.astype(jnp.float32)
  mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  x32 = x32 * lax.rsqrt(mean_square + epsilon)
  return (x32 * scale[None]).astype(x.dtype)
