"""The one matrix product of every model, and the only reader of weight leaves.

Weight techniques put typed leaves (`leaves`) where an array was; a model calls
`linear`, `logits_from_table` and `embed` and never looks inside.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax import leaves
from efficiency_jax.leaves import FakeTensor
from efficiency_jax.leaves import LoraTensor
from efficiency_jax.leaves import PanelTensor
from efficiency_jax.leaves import QTensor
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.dequant_matmul.api import dequant_matmul
from pallas_kernels.int8_matmul.api import int8_matmul
from pallas_kernels.int8_matmul.api import llm_int8_matmul
from pallas_kernels.narrow_matmul import reference
from pallas_kernels.narrow_matmul.api import narrow_matmul
from pallas_kernels.narrow_matmul.llvm_cpu import MOST_ROWS
from pallas_kernels.panel_matmul.api import panel_matmul
from pallas_kernels.panel_matmul.reference import WIDTH
from pallas_kernels.panel_matmul.reference import to_panels


def linear(
  x: jax.Array,  # [..., I]
  kernel: leaves.Leaf,  # [I, O]
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
  table: leaves.Leaf,  # [V, D]
) -> jax.Array:
  """Scores every row of an embedding table: `x @ table.T`, [..., V] float32."""
  if isinstance(table, QTensor | FakeTensor | PanelTensor):
    return _opened(x, table)
  return _dot(x, table, contract=1)


def embed(tokens: jax.Array, table: leaves.Leaf) -> jax.Array:
  """Rows of `table` [V, D] for `tokens` [...]: [..., D]."""
  if isinstance(table, QTensor):
    return leaves.columns(table, tokens)
  if isinstance(table, FakeTensor):
    table = _fake_weight(table, table.quantized()).astype(table.dtype).T
  if isinstance(table, PanelTensor):
    tokens = jnp.clip(tokens, 0, table.shape[0] - 1)
    return table.panels[tokens // WIDTH, :, tokens % WIDTH]
  return jnp.take(table, tokens, axis=0, mode='clip')


def rows_of_table(
  table: leaves.Leaf,  # [V, D]
  index: jax.Array,  # [R] int32
) -> leaves.Leaf:
  """Some rows of a table, as a table [R, D] of the same kind."""
  if isinstance(table, QTensor) and table.outliers is None:
    return leaves.selected(table, index)
  rows = embed(index, table)
  if isinstance(table, PanelTensor) and len(rows) % WIDTH == 0:
    return PanelTensor(panels=to_panels(rows.T), transposed=True)
  return rows


def _opened(x: jax.Array, kernel: leaves.Leaf) -> jax.Array:
  """`x @ kernel` in float32, whatever kind of leaf the kernel is."""
  if isinstance(kernel, LoraTensor):
    down = _dot(x, kernel.a, contract=0).astype(x.dtype)
    correction = kernel.scale * _dot(down, kernel.b, contract=0)
    return _opened(x, lax.stop_gradient(kernel.base)) + correction
  if isinstance(kernel, QTensor):
    return _quantized(x, kernel)
  if isinstance(kernel, FakeTensor):
    return _as_if_quantized(x, kernel)
  if isinstance(kernel, PanelTensor):
    y = panel_matmul(x.reshape(-1, x.shape[-1]), kernel.panels)
    return y.reshape(*x.shape[:-1], -1)
  return _dot(x, kernel, contract=0)


def _as_if_quantized(x: jax.Array, fake: FakeTensor) -> jax.Array:
  """The product of `fake.quantized()`, with straight-through gradients."""
  q = fake.quantized()
  weight = _fake_weight(fake, q)
  if q.activation is not None:
    x = fake_quantized(x, q.activation, fake.x_scale)
  return _dot(x, weight.astype(x.dtype), contract=0)


def _fake_weight(fake: FakeTensor, q: QTensor) -> jax.Array:
  """The weight as it is quantized, [K, N], whose gradient is the weight's."""
  weight = fake.weight.astype(jnp.float32)
  weight = weight.T if fake.transposed else weight
  rounded = lax.stop_gradient(leaves.dequantized_matrix(q))
  return weight + lax.stop_gradient(rounded - weight)


def fake_quantized(
  x: jax.Array,  # [..., K]
  how: leaves.Activation,
  x_scale: jax.Array | None = None,  # []
) -> jax.Array:
  """x rounded to the integers of `quantized_activations`, and back to floats.

  The gradient of x is 1 where x was not clipped, else 0. That of `x_scale` is
  round(v) - v for v = x / s, or the bound where x was clipped (LSQ, arXiv
  1902.08153); both are what differentiation gives when rounding counts as the
  identity.
  """
  largest = 2 ** (how.bits - 1) - 1
  if x_scale is None:
    _, x_scale = quantized_activations(lax.stop_gradient(x), how)
    x_scale = x_scale[..., None]
  v = jnp.clip(x.astype(jnp.float32) * (1 / x_scale), -largest, largest)
  v = v + lax.stop_gradient(jnp.round(v) - v)
  return (v * x_scale).astype(x.dtype)


def _quantized(x: jax.Array, q: QTensor) -> jax.Array:
  """x times the matrix of a `QTensor`, [..., N] float32."""
  if q.input_scales is not None:
    x = (x * q.input_scales).astype(x.dtype)
  if q.activation is not None:
    return _in_integers(x, q)
  if q.bits == 16:
    return _dot(x, q.values, contract=0)
  scales = leaves.float_scales(q.scales)
  if scales is None or not _kernel_reads(q, len(scales)):
    # The weight is made for a while.
    return _dot(x, leaves.dequantized_matrix(q).astype(x.dtype), contract=0)
  columns = q.matrix_shape[1]
  wide = lambda s: jnp.broadcast_to(s, (len(scales), columns))
  y = dequant_matmul(
    x,
    q.values,
    # Half precision is read as it is stored.
    wide(scales if scales.dtype == jnp.float16 else scales.astype(jnp.float32)),
    q.codebook,
    out_dtype=jnp.float32,
  )
  if q.offsets is not None:
    # sum_k x_k o_gn: what x sums to in each group, times the offsets.
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], len(scales), -1)
    y = y + _dot(parts.sum(-1), wide(q.offsets.astype(jnp.float32)), contract=0)
  return y


def _kernel_reads(q: QTensor, groups: int) -> bool:
  """Whether `dequant_matmul` multiplies the values as they are stored."""
  if q.outliers is not None or not jnp.issubdtype(q.values.dtype, jnp.integer):
    return False
  if q.bits == 8:
    return q.codebook is None
  return q.bits == 4 and q.matrix_shape[0] % (32 * groups) == 0


def _in_integers(x: jax.Array, q: QTensor) -> jax.Array:
  """The product of integers that `q.activation` asks for."""
  how = q.activation
  rows, columns = q.matrix_shape
  groups = q.scales.shape[0]
  wide = lambda s: None if s is None else jnp.broadcast_to(s, (groups, columns))
  scales, offsets = wide(q.scales), wide(q.offsets)
  # As the kernels store it; other widths become bytes for the product.
  values = q.values
  if q.bits not in (4, 8):
    values = leaves.integers(q).astype(jnp.int8)
  if groups > 1 and rows // groups % formats.BLOCK:
    # A group too short for a kernel: integers times dequantized weights.
    values, x_scales = quantized_activations(x, how, q.x_scale)
    y = _dot(values.astype(jnp.float32), leaves.dequantized_matrix(q), 0)
    return y * x_scales[..., None]
  if how.threshold is not None:
    return llm_int8_matmul(
      x,
      values,
      scales,
      w_offsets=offsets,
      threshold=how.threshold,
      max_outliers=how.max_outliers,
    )
  if how.per == 'row' and how.bits == 8 and q.x_scale is None:
    return int8_matmul(x, values, scales, w_offsets=offsets)
  x, x_scales = quantized_activations(x, how, q.x_scale)
  return int8_matmul(x, values, scales, w_offsets=offsets, x_scales=x_scales)


def quantized_activations(
  x: jax.Array,  # [..., K]
  how: leaves.Activation,
  x_scale: jax.Array | None = None,  # []
) -> tuple[jax.Array, jax.Array]:
  """x as integers and the scale of every row: [..., K] int8, [...] float32.

  q = clip(round(x / s), -b, b) with b = 2^(bits - 1) - 1; s is `x_scale` where
  it was calibrated, else max |x| / b of the row or of all of x.
  """
  largest = 2 ** (how.bits - 1) - 1
  x = x.astype(jnp.float32)
  if x_scale is None:
    axes = -1 if how.per == 'row' else None
    x_scale = formats.usable(jnp.abs(x).max(axes) * (1 / largest))
  x_scales = jnp.broadcast_to(x_scale, x.shape[:-1])
  values = jnp.round(x * (1 / x_scales)[..., None])
  return jnp.clip(values, -largest, largest).astype(jnp.int8), x_scales


def _dot(x: jax.Array, weight: jax.Array, contract: int) -> jax.Array:
  """Contracts the last axis of `x` with axis `contract` of a matrix."""
  rows = x.reshape(-1, x.shape[-1])
  transposed = contract == 1
  product = functools.partial(reference.narrow_matmul, transposed=transposed)
  # Few rows take as long as reading the weight, which a kernel reads once; a
  # narrow one must not be widened whole.
  wide = x.dtype == weight.dtype == jnp.float32
  if wide and 1 <= rows.shape[0] <= MOST_ROWS:
    y = narrow_matmul(rows, weight, transposed=transposed)
    return y.reshape(*x.shape[:-1], -1)
  # XLA turns a one-row product of narrow operands into a matrix-vector product
  # that first converts the whole weight to float32: two rows avoid it.
  pad = rows.shape[0] == 1 and x.dtype != jnp.float32
  if pad:
    rows = jnp.concatenate([rows, rows])
  y = product(rows, weight)
  return (y[:1] if pad else y).reshape(*x.shape[:-1], -1)
