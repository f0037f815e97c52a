"""Rotary position embeddings (arXiv 2104.09864), the half-split form.

Component i of a head is paired with component i + head_dim / 2 and the pair is
turned by `position * theta ** (-2 i / head_dim)`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.models.config import RopeScaling


def frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
  """Radians per position of every pair: [head_dim / 2] float32."""
  exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
  inverse = (1.0 / theta**exponent).astype(np.float32)
  if scaling is None:
    return inverse
  if scaling.kind == 'linear':
    return (inverse / scaling.factor).astype(np.float32)
  wavelength = 2 * np.pi / inverse
  blend = (
    scaling.original_context / wavelength - scaling.low_frequency_factor
  ) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
  blend = np.clip(blend, 0.0, 1.0)
  scaled = (1 - blend) * inverse / scaling.factor + blend * inverse
  return scaled.astype(np.float32)


def rotation(
  positions: jax.Array,  # [B, T] int32
  inverse: np.ndarray,  # [head_dim / 2]
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines at `positions`: two [B, T, 1, head_dim / 2] float32."""
  positions = positions[:, :, None, None].astype(jnp.float32)
  angles = positions * inverse[None, None, None]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: jax.Array,  # [B, T, heads, head_dim]
  turn: tuple[jax.Array, jax.Array],
) -> jax.Array:
  """Turns every pair of every head of `x`; same shape and dtype."""
  cosine, sine = turn
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [first * cosine - second * sine, second * cosine + first * sine]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)
