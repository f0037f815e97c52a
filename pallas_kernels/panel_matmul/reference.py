"""What a matrix in panels is, and its product."""

import jax
from jax import lax
import jax.numpy as jnp

WIDTH = 32  # columns of a panel


def to_panels(matrix: jax.Array) -> jax.Array:
  """[K, N] as [N / 32, K, 32], NumPy's array or JAX's.

  Raises:
    ValueError: N is no multiple of 32, or it is no matrix.
  """
  if matrix.ndim != 2 or matrix.shape[1] % WIDTH:
    raise ValueError(
      f'a matrix in panels has a multiple of {WIDTH} columns, got'
      f' {list(matrix.shape)}.'
    )
  return matrix.reshape(len(matrix), -1, WIDTH).swapaxes(0, 1)


def from_panels(panels: jax.Array) -> jax.Array:
  """The matrix [K, N] of panels [N / 32, K, 32]."""
  return panels.swapaxes(0, 1).reshape(panels.shape[1], -1)


def panel_matmul(
  x: jax.Array,  # [M, K]
  panels: jax.Array,  # [N / 32, K, 32]
) -> jax.Array:
  """`x @ from_panels(panels)`, summed in float32: [M, N]."""
  matrix = from_panels(panels)
  return lax.dot(x, matrix, preferred_element_type=jnp.float32)
