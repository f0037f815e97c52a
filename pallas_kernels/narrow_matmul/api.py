"""Products of a few rows and a large matrix, as in a decoding step.

    out = x @ w,   x [M, K], M a few rows,   w [K, N], or transposed [N, K]

Such a product takes as long as reading w, if w is read once: 4 K N bytes in
float32 against 2 M K N operations.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.narrow_matmul import blockwise
from pallas_kernels.narrow_matmul import llvm_cpu
from pallas_kernels.narrow_matmul import reference

IMPLEMENTATIONS = {
  'reference': reference.narrow_matmul,
  'blockwise': blockwise.narrow_matmul,
  'llvm_cpu': llvm_cpu.narrow_matmul,
}


def narrow_matmul(
  x: jax.Array,
  w: jax.Array,
  *,
  transposed: bool = False,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """`x @ w`, or `x @ w.T`, summed in float32.

  Args:
    x: [M, K].
    w: [K, N], or [N, K] if transposed.
    transposed: Whether rows of `w` are scored, as those of an embedding table.
    implementation: See `dispatch`. `llvm_cpu` takes float32, at most 32 rows,
      and sizes that fill vectors; `blockwise` is XLA's own product.

  Returns:
    [M, N] float32.

  Raises:
    ValueError: The shapes do not fit.
    NotImplementedError: The implementation that was named does not take them.
  """
  inner = w.shape[1 if transposed else 0] if w.ndim == 2 else None
  if x.ndim != 2 or x.shape[1] != inner:
    raise ValueError(
      f'x {x.shape} and w {w.shape}, transposed={transposed}, do not multiply.'
    )
  if not isinstance(implementation, (str, type(None))):
    implementation = tuple(implementation)
  return _product(transposed, implementation, x, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(transposed, implementation, x, w):
  implementations = dispatch.bind(IMPLEMENTATIONS, transposed=transposed)
  return dispatch.call('narrow_matmul', implementations, implementation, x, w)


@_product.defjvp
def _product_jvp(transposed, implementation, primals, tangents):
  (x, w), (dx, dw) = primals, tangents
  product = functools.partial(reference.narrow_matmul, transposed=transposed)
  change = product(dx.astype(jnp.float32), w) + product(x, dw)
  return _product(transposed, implementation, x, w), change
