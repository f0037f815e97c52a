"""Products with a matrix that lies in panels, as a CPU reads it best.

    out = x @ W,   x [M, K],   W [K, N] as panels [N / 32, K, 32]

A panel is 32 columns of W, line by line, so that it is one piece of memory:

      W [K, N]                       panels
    a a a a b b b b                a a a a   panel 0
    a a a a b b b b       ->       a a a a
    a a a a b b b b                a a a a
                                   b b b b   panel 1
                                   ...

A processor reads a piece of memory faster than columns of a matrix, whose lines
lie far apart, each on another page. Libraries pack the right operand like this
at every product (Goto and van de Geijn, doi 10.1145/1356052.1356053); weights
can be packed once. 2 M K N operations, 4 K N bytes in float32.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.panel_matmul import blockwise
from pallas_kernels.panel_matmul import llvm_cpu
from pallas_kernels.panel_matmul import reference

IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
  'reference': reference.panel_matmul,
  'blockwise': blockwise.panel_matmul,
  'llvm_cpu': llvm_cpu.panel_matmul,
}


def panel_matmul(
  x: jax.Array,
  panels: jax.Array,
  *,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """`x @ W`, summed in float32.

  Args:
    x: [M, K].
    panels: W as [N / 32, K, 32], see `reference.to_panels`.
    implementation: See `dispatch`. `llvm_cpu` takes float32, and gives every
      row the bits that it gets alone.

  Returns:
    [M, N] float32.

  Raises:
    ValueError: The shapes do not fit.
    NotImplementedError: The implementation that was named does not take them.
  """
  fits = x.ndim == 2 and panels.ndim == 3
  fits = fits and panels.shape[1:] == (x.shape[1], reference.WIDTH)
  if not fits:
    raise ValueError(
      f'x {x.shape} and panels {panels.shape} do not multiply: x is [M, K],'
      f' panels [N / {reference.WIDTH}, K, {reference.WIDTH}].'
    )
  if not isinstance(implementation, (str, type(None))):
    implementation = tuple(implementation)
  return _product(implementation, x, panels)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(implementation, x, panels):
  implementations = dispatch.bind(IMPLEMENTATIONS)
  return dispatch.call(
    'panel_matmul', implementations, implementation, x, panels
  )


@_product.defjvp
def _product_jvp(implementation, primals, tangents):
  (x, panels), (dx, dpanels) = primals, tangents
  product = reference.panel_matmul
  change = product(dx.astype(jnp.float32), panels) + product(x, dpanels)
  return _product(implementation, x, panels), change
