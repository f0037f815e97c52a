"""What the product of a few rows and a matrix means."""

import jax
from jax import lax
import jax.numpy as jnp


def narrow_matmul(
  x: jax.Array,  # [M, K]
  w: jax.Array,  # [K, N], or [N, K] if transposed
  *,
  transposed: bool,
) -> jax.Array:
  """`x @ w`, or `x @ w.T`, summed in float32: [M, N]."""
  contracted = ((1,), (1 if transposed else 0,))
  return lax.dot_general(
    x, w, (contracted, ((), ())), preferred_element_type=jnp.float32
  )
