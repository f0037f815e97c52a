"""Typed leaves: what weight techniques put where a weight was.

A leaf is a frozen pytree. Techniques make leaves, and `linear` is the only
reader: models never look inside. A leaf stands for a matrix W [K, N] that
multiplies from the right, `x [..., K] @ W`; that of an embedding table [V, D]
is its transpose [D, V], in which form the table scores.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dequant_matmul import formats
from pallas_kernels.panel_matmul.reference import from_panels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraTensor:
  """A frozen kernel W and a trained correction: W + scale A B.

  `adaptation.lora` makes them (arXiv 2106.09685). No gradient reaches W.
  """

  base: 'Leaf'  # [K, N], W
  a: jax.Array  # [K, r]
  b: jax.Array  # [r, N]
  scale: float = dataclasses.field(metadata={'static': True})

  @property
  def dtype(self) -> jnp.dtype:
    return self.base.dtype


class Outliers(NamedTuple):
  """Single entries of a matrix that are kept as they are."""

  positions: jax.Array  # [n] int32, k N + j of entry (k, j)
  values: jax.Array  # [n] float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
  """How the left operand of a product becomes integers.

  With a scale for every row and no threshold, a row of the product does not
  depend on other rows; one scale for all of x, and outlying columns "in any
  row", depend on what else is computed together. Either way a text may depend
  on the width of the pass where floats between the products differ in their
  last bits from width to width (`models.width` knows where they do not): where
  that turns a rounding the other way, a step of 1 / 127 is what is left of it.

  Attributes:
    bits: Of the integers, 2 to 8.
    per: A scale for every row of x, or one for all of x.
    threshold: Columns of x that reach it in any row are multiplied in floats
      (LLM.int8(), arXiv 2208.07339); None takes none out.
    max_outliers: Most columns that are taken out.
  """

  bits: int = 8
  per: Literal['row', 'tensor'] = 'row'
  threshold: float | None = None
  max_outliers: int = 32

  def __post_init__(self):
    if not 2 <= self.bits <= 8:
      raise ValueError(f'activation bits must be in 2..8, got {self.bits}.')
    if self.per not in ('row', 'tensor'):
      raise ValueError(
        f"activation scales are per 'row' or 'tensor', got {self.per!r}."
      )
    if self.threshold is not None and (self.bits, self.per) != (8, 'row'):
      raise ValueError('a threshold for outliers is for 8 bits and per row.')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QTensor:
  """A matrix W [K, N] in few bits.

      w_kn = value(q_kn) s_gn + o_gn,    g = k // G

  where G = K / groups consecutive rows of a column share a scale. `value` is
  the integer itself, or `codebook[q]`.

  Attributes:
    values: q, as small as they are:
      16 bits: [K, N] bfloat16 or float16, 8 bits: [K, N] int8 or a float8
      dtype, whose numbers are the values;
      4 bits: [K / 2, N] uint8 in the order of `dequant_matmul.formats`;
      others: [bits, K / 8, N] uint8, where bit i of byte j of plane p is bit p
      of the value of row 8 j + i.
      Without a codebook they are signed, in two's complement; a single bit is
      +1 where it is set, else -1.
    scales: s, [groups, N], or [1, 1], of a float dtype; or these in 8 bits
      themselves (double quantization); or None for 1.
    offsets: o, likewise, or None for 0. A zero point z is the offset -z s.
    codebook: [2^bits] float32 or None.
    outliers: Entries that replace what the formula gives, or None.
    input_scales: [K] float32 or None: x is multiplied with them first (AWQ,
      SmoothQuant). They are not part of W, but of what `dequantize` returns.
    x_scale: [] float32 or None: the scale of x where it was calibrated.
    bits: Of a value, 1 to 8, or 16.
    dtype: What `dequantize` returns and a model computes in.
    transposed: Whether W' is what stood there, a table [V, D].
    activation: Of the product in integers; None multiplies floats.
  """

  values: jax.Array
  scales: 'jax.Array | formats.QuantizedScales | None' = None
  offsets: jax.Array | None = None
  codebook: jax.Array | None = None
  outliers: Outliers | None = None
  input_scales: jax.Array | None = None
  x_scale: jax.Array | None = None
  bits: int = dataclasses.field(metadata={'static': True})
  dtype: Any = dataclasses.field(metadata={'static': True})
  transposed: bool = dataclasses.field(default=False, metadata={'static': True})
  activation: Activation | None = dataclasses.field(
    default=None, metadata={'static': True}
  )

  @property
  def matrix_shape(self) -> tuple[int, int]:
    """[K, N], the matrix that multiplies."""
    *_, rows, columns = self.values.shape
    if self.values.ndim == 3:
      return 8 * rows, columns
    return (2 * rows if self.values.dtype == jnp.uint8 else rows), columns

  @property
  def shape(self) -> tuple[int, int]:
    """Of what `dequantize` returns."""
    return self.matrix_shape[::-1] if self.transposed else self.matrix_shape

  @property
  def num_bytes(self) -> int:
    """Bytes of all arrays."""
    return sum(
      leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self)
    )

  @property
  def bits_per_weight(self) -> float:
    """Stored bits of all arrays over the number of weights."""
    return 8 * self.num_bytes / (self.matrix_shape[0] * self.matrix_shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeTensor:
  """A weight that is trained while it computes as if it were quantized.

  The product is that of the `QTensor` that `method` makes of the weight, and
  gradients pass through rounding as if it were not there: quantization-aware
  training (arXiv 1712.05877; straight-through, 1308.3432).

  Attributes:
    weight: [K, N], or a table [V, D].
    x_scale: [] float32, the scale of x, trained too; None finds it anew at
      every product.
    method: A method of `quantization.rules`, without calibration.
    transposed: Whether the weight is a table.
  """

  weight: jax.Array
  x_scale: jax.Array | None = None
  method: Callable[[jax.Array], QTensor] = dataclasses.field(
    metadata={'static': True}
  )
  transposed: bool = dataclasses.field(default=False, metadata={'static': True})

  @property
  def dtype(self) -> jnp.dtype:
    return self.weight.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  def quantized(self) -> QTensor:
    """The leaf of the trained model."""
    weight = self.weight.astype(jnp.float32)
    q = self.method(weight.T if self.transposed else weight)
    return dataclasses.replace(
      q,
      x_scale=self.x_scale,
      dtype=self.weight.dtype,
      transposed=self.transposed,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PanelTensor:
  """A matrix W [K, N] in panels of 32 columns, one after another in memory.

  Its numbers are what they were; `panels.for_cpu` makes them, and
  `pallas_kernels.panel_matmul` says what for.

  Attributes:
    panels: [N / 32, K, 32].
    transposed: Whether W' is what stood there, a table [V, D].
  """

  panels: jax.Array
  transposed: bool = dataclasses.field(default=False, metadata={'static': True})

  @property
  def dtype(self) -> jnp.dtype:
    return self.panels.dtype

  @property
  def shape(self) -> tuple[int, int]:
    """Of what stood there."""
    count, inner, width = self.panels.shape
    shape = inner, count * width
    return shape[::-1] if self.transposed else shape


def rounds_activations(params: Any) -> bool:
  """Whether some product of these parameters rounds what it multiplies."""
  is_leaf = lambda node: isinstance(node, QTensor)
  found = jax.tree.leaves(params, is_leaf=is_leaf)
  return any(is_leaf(leaf) and leaf.activation is not None for leaf in found)


Leaf: TypeAlias = jax.Array | LoraTensor | QTensor | FakeTensor | PanelTensor
"""A weight as `linear` takes it."""


def check(q: QTensor) -> QTensor:
  """Returns `q` if its arrays fit together.

  Raises:
    ValueError: They do not; or integers are to multiply what is no integers.
  """
  if q.bits not in (*range(1, 9), 16):
    raise ValueError(f'bits must be in 1..8, or 16, got {q.bits}.')
  stored = q.values.dtype
  layout = 2 if q.bits in (4, 8, 16) else 3
  whole = 8 * stored.itemsize == q.bits and stored != jnp.uint8
  packed = stored == jnp.uint8 and q.bits < 8
  if q.values.ndim != layout or not (whole or packed):
    raise ValueError(
      f'values of {q.bits} bits cannot be {stored} {list(q.values.shape)}.'
    )
  rows, columns = q.matrix_shape
  for name in ('scales', 'offsets'):
    array = getattr(q, name)
    if isinstance(array, formats.QuantizedScales):
      array = jax.eval_shape(formats.dequantize_scales, array)
    if array is None or array.shape == (1, 1):
      continue
    if array.ndim != 2 or array.shape[1] != columns or rows % array.shape[0]:
      raise ValueError(
        f'{name} must be [groups, {columns}] with groups that divide {rows},'
        f' got {list(array.shape)}.'
      )
  if q.codebook is not None and q.codebook.shape != (2**q.bits,):
    raise ValueError(
      f'codebook must have {2**q.bits} values, got {list(q.codebook.shape)}.'
    )
  if q.input_scales is not None and q.input_scales.shape != (rows,):
    raise ValueError(
      f'input_scales must be [{rows}], got {list(q.input_scales.shape)}.'
    )
  integers = q.bits <= 8 and q.codebook is None
  integers = integers and jnp.issubdtype(stored, jnp.integer)
  if q.activation is not None and (not integers or q.outliers is not None):
    raise ValueError(
      'only integers without outliers multiply integers: leave activation out.'
    )
  return q


def dequantize(leaf: QTensor | PanelTensor) -> jax.Array:
  """The weight that a leaf stands for, in its own orientation and dtype.

  It makes the leaf's products but for the rounding of activations:
  `input_scales` are multiplied into it.
  """
  if isinstance(leaf, PanelTensor):
    matrix = from_panels(leaf.panels)
    return matrix.T if leaf.transposed else matrix
  matrix = dequantized_matrix(leaf)
  if leaf.input_scales is not None:
    matrix *= leaf.input_scales[:, None]
  matrix = matrix.astype(leaf.dtype)
  return matrix.T if leaf.transposed else matrix


def dequantized_matrix(q: QTensor) -> jax.Array:
  """[K, N] float32, without `input_scales`."""
  shape = q.matrix_shape
  values = _values(q)
  values = _scaled(values, float_scales(q.scales), jnp.multiply)
  values = _scaled(values, q.offsets, jnp.add)
  if q.outliers is not None:
    flat = values.reshape(-1).at[q.outliers.positions].set(q.outliers.values)
    values = flat.reshape(shape)
  return values


def selected(q: QTensor, index: jax.Array) -> QTensor:
  """The columns `index` [n] of the matrix, rows of a table, as a leaf.

  Raises:
    ValueError: The leaf has outliers.
  """
  take = lambda x: jnp.take(x, index, axis=-1, mode='clip')
  # Copies, because a state that holds the selection may be donated.
  copy = lambda x: None if x is None else jnp.copy(x)
  each = lambda x: copy(x) if x is None or x.shape[-1] == 1 else take(x)
  if q.outliers is not None:
    raise ValueError('columns of a weight with outliers cannot be selected.')
  return dataclasses.replace(
    q,
    values=take(q.values),
    scales=each(float_scales(q.scales)),
    offsets=each(q.offsets),
    codebook=copy(q.codebook),
    input_scales=copy(q.input_scales),
    x_scale=copy(q.x_scale),
  )


def columns(q: QTensor, index: jax.Array) -> jax.Array:
  """Columns of the matrix, as rows: index [...] to [..., K] in its dtype."""
  flat = index.reshape(-1)
  if q.outliers is None:
    chosen = dequantized_matrix(selected(q, flat))
  else:
    chosen = jnp.take(dequantized_matrix(q), flat, axis=1, mode='clip')
  return chosen.T.astype(q.dtype).reshape(*index.shape, -1)


def float_scales(
  scales: 'jax.Array | formats.QuantizedScales | None',
) -> jax.Array | None:
  """Scales as floats, also those that are quantized themselves."""
  if isinstance(scales, formats.QuantizedScales):
    return formats.dequantize_scales(scales)
  return scales


def integers(q: QTensor) -> jax.Array:
  """q_kn, [K, N] int32: signed values, or codes of a codebook."""
  signed = q.codebook is None
  if q.bits == 8:
    values = q.values.astype(jnp.int32)
    return values if signed else values & 255
  if q.bits == 4:
    return formats.unpack_int4(q.values, signed=signed)
  return unpack(q.values, signed=signed)


def pack(values: jax.Array, bits: int) -> jax.Array:
  """[K, N] integers as `QTensor.values` of so many bits; signs as one.

  Raises:
    ValueError: K does not fill whole bytes.
  """
  rows, columns = values.shape
  if bits == 8:
    return values.astype(jnp.int8)
  if bits == 4:
    return formats.pack_int4(values)
  if rows % 8:
    raise ValueError(
      f'{rows} rows do not fill bytes; {bits} bits need a multiple of 8.'
    )
  values = values > 0 if bits == 1 else values
  values = values.astype(jnp.int32).reshape(rows // 8, 8, columns)
  places = np.arange(8, dtype=np.int32)[:, None]
  planes = [
    ((values >> plane & 1) << places).sum(1).astype(jnp.uint8)
    for plane in range(bits)
  ]
  return jnp.stack(planes)


def unpack(planes: jax.Array, *, signed: bool) -> jax.Array:
  """What `pack` made of 1, 2, 3, 5, 6 or 7 bits: [K, N] int32."""
  bits, rows, columns = planes.shape
  places = np.arange(8, dtype=np.int32)[:, None]
  if bits == 1 and signed:
    return 2 * unpack(planes, signed=False) - 1
  values = jnp.zeros((rows, 8, columns), jnp.int32)
  for plane in range(bits):
    bit = planes[plane, :, None].astype(jnp.int32) >> places & 1
    # The highest plane of a signed number counts negatively.
    negative = signed and plane == bits - 1
    values += bit * (-(2**plane) if negative else 2**plane)
  return values.reshape(8 * rows, columns)


def _values(q: QTensor) -> jax.Array:
  """value(q_kn), [K, N] float32."""
  if not jnp.issubdtype(q.values.dtype, jnp.integer):
    return q.values.astype(jnp.float32)
  values = integers(q)
  if q.codebook is None:
    return values.astype(jnp.float32)
  return jnp.take(q.codebook, values, axis=0, mode='clip')


def _scaled(values: jax.Array, scales: jax.Array | None, with_them):
  """Every value with the scale of its group, by an operation."""
  if scales is None:
    return values
  scales = scales.astype(jnp.float32)
  groups, columns = values.reshape(len(scales), -1, values.shape[1]), scales
  return with_them(groups, columns[:, None]).reshape(values.shape)
