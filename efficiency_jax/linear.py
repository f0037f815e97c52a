"""The one matrix product of every model, and the only reader of weight leaves.

Weight techniques put typed leaves where an array was; a model calls `linear`
and `logits_from_table` and never looks inside.
"""

import dataclasses
import functools
from typing import TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels.narrow_matmul import reference
from pallas_kernels.narrow_matmul.api import narrow_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTensor:
  """A frozen kernel W and a trained correction: W + scale A B.

  `adaptation.lora` makes them (arXiv 2106.09685). No gradient reaches W.
  """

  base: 'Kernel'  # [I, O], W
  a: jax.Array  # [I, r]
  b: jax.Array  # [r, O]
  scale: float = dataclasses.field(metadata={'static': True})


Kernel: TypeAlias = jax.Array | LoraTensor


def linear(
  x: jax.Array,  # [..., I]
  kernel: Kernel,  # [I, O]
  bias: jax.Array | None = None,  # [O]
) -> jax.Array:
  """Returns `x @ kernel + bias` in the dtype of `x`, summed in float32."""
  y = _opened(x, kernel)
  if bias is not None:
    bias = jnp.expand_dims(bias.astype(jnp.float32), range(y.ndim - 1))
    y = y + bias
  return y.astype(x.dtype)


def logits_from_table(
  x: jax.Array,  # [..., D]
  table: jax.Array,  # [V, D]
) -> jax.Array:
  """Scores every row of an embedding table: `x @ table.T`, [..., V] float32."""
  return _dot(x, table, contract=1)


def embed(tokens: jax.Array, table: jax.Array) -> jax.Array:
  """Rows of `table` [V, D] for `tokens` [...]: [..., D]."""
  return jnp.take(table, tokens, axis=0, mode='clip')


def _opened(x: jax.Array, kernel: Kernel) -> jax.Array:
  """`x @ kernel` in float32, whatever kind of leaf the kernel is."""
  if isinstance(kernel, LoraTensor):
    down = _dot(x, kernel.a, contract=0).astype(x.dtype)
    correction = kernel.scale * _dot(down, kernel.b, contract=0)
    return _opened(x, lax.stop_gradient(kernel.base)) + correction
  return _dot(x, kernel, contract=0)


# Parts of the inner axis that a one-row product is summed from on a CPU.
_PARTS = 4
# Rows up to which a product takes as long as reading its weights.
_FEW = 16


def _dot(x: jax.Array, weight: jax.Array, contract: int) -> jax.Array:
  """Contracts the last axis of `x` with axis `contract` of a matrix."""
  rows = x.reshape(-1, x.shape[-1])
  transposed = contract == 1
  product = functools.partial(reference.narrow_matmul, transposed=transposed)
  one_row = rows.shape[0] == 1 and contract == 0
  # A narrow weight must not be widened whole.
  wide = x.dtype == weight.dtype == jnp.float32
  if one_row and wide and x.shape[-1] % _PARTS == 0:
    y = lax.platform_dependent(
      rows, weight, cpu=_product_in_parts, default=product
    )
    return y.reshape(*x.shape[:-1], -1)
  if wide and 2 <= rows.shape[0] <= _FEW:
    y = narrow_matmul(rows, weight, transposed=transposed)
    return y.reshape(*x.shape[:-1], -1)
  # XLA turns a one-row product of narrow operands into a matrix-vector product
  # that first converts the whole weight to float32: two rows avoid it.
  pad = rows.shape[0] == 1 and x.dtype != jnp.float32
  if pad:
    rows = jnp.concatenate([rows, rows])
  y = product(rows, weight)
  return (y[:1] if pad else y).reshape(*x.shape[:-1], -1)


def _product_in_parts(row: jax.Array, weight: jax.Array) -> jax.Array:
  """[1, I] times [I, O] as a sum over parts of I.

  XLA reads the weights of a batch of matrix-vector products faster than those
  of a single one on two CPU cores (DESIGN.md).
  """
  row = row.reshape(1, _PARTS, -1)
  weight = weight.reshape(_PARTS, -1, weight.shape[1])
  return jnp.einsum('tpi,pio->pto', row, weight).sum(0)
