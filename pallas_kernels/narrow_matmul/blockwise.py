"""The product of a few rows and a matrix by XLA."""

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.narrow_matmul import reference

# Parts of the inner axis that a one-row product is summed from on a CPU.
_PARTS = 4


def narrow_matmul(
  x: jax.Array,  # [M, K]
  w: jax.Array,  # [K, N], or [N, K] if transposed
  *,
  transposed: bool,
) -> jax.Array:
  """`x @ w`, or `x @ w.T`, summed in float32: [M, N]."""

  def product(x, w):
    return reference.narrow_matmul(x, w, transposed=transposed)

  wide = x.dtype == w.dtype == jnp.float32
  if transposed or len(x) != 1 or not wide or x.shape[1] % _PARTS:
    return product(x, w)
  return lax.platform_dependent(x, w, cpu=_in_parts, default=product)


def _in_parts(x: jax.Array, w: jax.Array) -> jax.Array:
  """[1, K] times [K, N] as a sum over parts of K.

  XLA reads the weights of a batch of matrix-vector products faster than those
  of a single one on two CPU cores (DESIGN.md).
  """
  x = x.reshape(1, _PARTS, -1)
  w = w.reshape(_PARTS, -1, w.shape[1])
  return jnp.einsum('mpk,pkn->pmn', x, w).sum(0)
