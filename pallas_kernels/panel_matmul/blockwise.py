"""The product with a matrix in panels by XLA, panel after panel."""

import jax
import jax.numpy as jnp


def panel_matmul(
  x: jax.Array,  # [M, K]
  panels: jax.Array,  # [P, K, 32]
) -> jax.Array:
  """`x @ from_panels(panels)`, summed in float32: [M, 32 P]."""
  y = jnp.einsum('mk,pkn->mpn', x, panels, preferred_element_type=jnp.float32)
  return y.reshape(len(x), -1)
