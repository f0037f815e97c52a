"""Root-mean-square norms of a few rows (arXiv 1910.07467).

    out = x / sqrt(mean(x^2) + epsilon) scale

XLA adds up eight rows in another order than one. The kernel for the CPU adds
every row in the same order.
"""

import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.rms_norm import llvm_cpu
from pallas_kernels.rms_norm import reference

IMPLEMENTATIONS = {
  'reference': reference.rms_norm,
  'blockwise': reference.rms_norm,
  'llvm_cpu': llvm_cpu.rms_norm,
}


def rms_norm(
  x: jax.Array,
  scale: jax.Array,
  *,
  epsilon: float,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """x / sqrt(mean(x^2) + epsilon) scale, computed in float32; differentiable.

  Args:
    x: [..., D].
    scale: [D].
    epsilon: 0 or more.
    implementation: See `dispatch`. `llvm_cpu` takes float32 and a D that fills
      vectors; the bits of a row do not depend on the others. `blockwise` is
      XLA's.

  Returns:
    [..., D] in the dtype of x.

  Raises:
    ValueError: The shapes do not fit, or epsilon is negative.
    NotImplementedError: The implementation that was named does not take them.
  """
  if not x.ndim or scale.shape != x.shape[-1:]:
    raise ValueError(
      f'scale must be [D], one number a column of x, got {scale.shape} and'
      f' {x.shape}.'
    )
  if epsilon < 0:
    raise ValueError(f'epsilon must be >= 0, got {epsilon}.')
  if not isinstance(implementation, (str, type(None))):
    implementation = tuple(implementation)
  # Not -1, which stands for no number where a row is empty.
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  scale = scale.astype(jnp.float32)
  return _norm(float(epsilon), implementation, rows, scale).reshape(x.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _norm(epsilon, implementation, x, scale):
  implementations = dispatch.bind(IMPLEMENTATIONS, epsilon=epsilon)
  return dispatch.call('rms_norm', implementations, implementation, x, scale)


@_norm.defjvp
def _norm_jvp(epsilon, implementation, primals, tangents):
  formula = functools.partial(reference.rms_norm, epsilon=epsilon)
  _, change = jax.jvp(formula, primals, tangents)
  return _norm(epsilon, implementation, *primals), change
