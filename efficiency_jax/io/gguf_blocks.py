"""The blocks of llama.cpp, as they lie in GGUF files and as `QTensor`s.

A block is 32 neighbours of a row, with a scale d and perhaps a minimum m in
float16 (ggml-quants.c):

    Q8_0    w = d q          q in -128 .. 127
    Q4_0    w = d (q - 8)    q in 0 .. 15
    Q4_1    w = d q + m      q in 0 .. 15

A file has a row for each output, [N, K]; a `QTensor` is the same matrix [K, N],
and a block is one of its groups. 4-bit values lie in the order of `pack_int4`,
so changing the form moves bytes and rounds nothing: from blocks to a leaf and
back is the identity. The q - 8 of Q4_0 are signed integers of 4 bits. The q of
Q4_1 stay codes, with the codebook 0, 1 .. 15: as signed integers they would
need the offset m + 8 d, which float16 cannot always hold.

Here blocks are numpy arrays [N, K / 32] of a structured dtype, so rows can be
cut, stacked and put in another order as those of any array.
"""

from collections.abc import Mapping
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.leaves import QTensor
from pallas_kernels.dequant_matmul import formats

Kind = gguf.GGMLQuantizationType

BLOCK = 32
KINDS: Mapping[Kind, np.dtype] = {
  Kind.Q8_0: np.dtype([('d', '<f2'), ('q', 'i1', (BLOCK,))]),
  Kind.Q4_0: np.dtype([('d', '<f2'), ('q', 'u1', (BLOCK // 2,))]),
  Kind.Q4_1: np.dtype([('d', '<f2'), ('m', '<f2'), ('q', 'u1', (BLOCK // 2,))]),
}
_FLOATS: Mapping[str, Kind] = {
  'float32': Kind.F32,
  'float16': Kind.F16,
  'bfloat16': Kind.BF16,
}
_CODES = np.arange(16, dtype=np.float32)
# Turns q into the low four bits of q - 8, in both halves of a byte.
_MINUS_EIGHT = np.uint8(0x88)
_REMEDY = 'dequantize it, or quantize it with gguf_blocks.quantize'


def view(raw: np.ndarray, kind: Kind) -> np.ndarray:
  """Bytes of rows, [N, bytes of a row] uint8, as blocks [N, K / 32]."""
  return raw.view(KINDS[kind])


def is_blocks(array: Any) -> bool:
  """Whether `array` holds blocks and not numbers."""
  return getattr(array, 'dtype', None) in KINDS.values()


def shape(array: np.ndarray) -> tuple[int, ...]:
  """The shape of the numbers that an array of blocks or numbers stands for."""
  if is_blocks(array):
    return (*array.shape[:-1], array.shape[-1] * BLOCK)
  return array.shape


def is_finite(blocks: np.ndarray) -> bool:
  """Whether all scales and minima are numbers."""
  names = [name for name in blocks.dtype.names if name != 'q']
  return all(bool(np.isfinite(blocks[name]).all()) for name in names)


def stored(array: np.ndarray) -> tuple[np.ndarray, Kind]:
  """What a file holds of blocks or of floats, and the name of its form.

  Returns:
    The floats as they are, or bytes [..., bytes of a row] uint8 where numpy has
    no such dtype.

  Raises:
    ValueError: The dtype has no place in GGUF files.
  """
  for kind, dtype in KINDS.items():
    if array.dtype == dtype:
      return np.ascontiguousarray(array).view(np.uint8), kind
  kind = _FLOATS.get(array.dtype.name)
  if kind is None:
    raise ValueError(
      f'dtype must be one of {", ".join(_FLOATS)}, got {array.dtype.name}.'
    )
  array = np.ascontiguousarray(array)
  return array.view(np.uint8) if kind == Kind.BF16 else array, kind


def to_qtensor(
  blocks: np.ndarray,  # [N, K / 32]
  *,
  dtype: Any = jnp.float32,
  transposed: bool = False,
) -> QTensor:
  """The leaf of some blocks, with the same values to the last bit.

  Args:
    blocks: Rows are the columns of a kernel [K, N], or those of a table.
    dtype: What the leaf dequantizes to.
    transposed: The rows are a table [V, D] that is looked up and scored.
  """
  rows = np.moveaxis(blocks['q'], 0, -1)  # [K / 32, 32 or 16, N]
  values = np.ascontiguousarray(rows).reshape(-1, len(blocks))
  offsets = codebook = None
  if blocks.dtype == KINDS[Kind.Q4_0]:
    values = values ^ _MINUS_EIGHT
  if blocks.dtype == KINDS[Kind.Q4_1]:
    offsets, codebook = jnp.asarray(blocks['m'].T), jnp.asarray(_CODES)
  return QTensor(
    values=jnp.asarray(values),
    scales=jnp.asarray(blocks['d'].T),
    offsets=offsets,
    codebook=codebook,
    bits=8 if blocks.dtype == KINDS[Kind.Q8_0] else 4,
    dtype=jnp.dtype(dtype),
    transposed=transposed,
  )


def from_qtensor(leaf: QTensor) -> np.ndarray:
  """The blocks [N, K / 32] that have the values of a leaf, to the last bit.

  Groups of a multiple of 32 share their scale among several blocks.

  Raises:
    ValueError: No kind of block can hold the leaf.
  """
  kind = _kind(leaf)
  values = np.asarray(leaf.values)
  inputs, columns = leaf.matrix_shape
  if inputs % BLOCK:
    raise ValueError(
      f'it has {inputs} inputs, and blocks need a multiple of {BLOCK}:'
      ' dequantize it.'
    )
  blocks = np.empty((columns, inputs // BLOCK), KINDS[kind])
  if kind == Kind.Q4_0:
    values = values ^ _MINUS_EIGHT
  rows = values.reshape(blocks.shape[1], -1, columns)
  blocks['q'] = np.moveaxis(rows, -1, 0)
  blocks['d'] = _in_half(leaf.scales, 'scales', blocks.shape)
  if kind == Kind.Q4_1:
    blocks['m'] = _in_half(leaf.offsets, 'offsets', blocks.shape)
  return blocks


def quantize(
  weight: jax.Array,  # [K, N], or [V, D]
  kind: Kind | str,
  *,
  transposed: bool = False,
) -> QTensor:
  """Quantizes as llama.cpp does, for a leaf that `gguf_export` can write.

  Args:
    weight: A kernel, or a table if `transposed`; 32 must divide K, or D.
    kind: 'Q8_0', 'Q4_0' or 'Q4_1'.
    transposed: The weight is a table [V, D] that is looked up and scored.

  Raises:
    ValueError: The kind is another one, or blocks do not divide the weight.
  """
  kind = Kind[kind] if isinstance(kind, str) else kind
  if kind not in KINDS:
    names = ', '.join(kind.name for kind in KINDS)
    raise ValueError(f'kind must be one of {names}, got {kind.name}.')
  rows = np.asarray(weight, np.float32)
  rows = rows if transposed else rows.T
  if rows.ndim != 2 or rows.shape[1] % BLOCK:
    raise ValueError(
      f'weight must have a multiple of {BLOCK} inputs, got {weight.shape}.'
    )
  data = gguf.quants.quantize(np.ascontiguousarray(rows), kind)
  return to_qtensor(view(data, kind), dtype=weight.dtype, transposed=transposed)


def _kind(leaf: QTensor) -> Kind:
  """Which blocks have values like those of a leaf."""
  for name in ('outliers', 'input_scales', 'activation'):
    if getattr(leaf, name) is not None:
      raise ValueError(f'blocks have no {name}: {_REMEDY}.')
  values, codebook = leaf.values, leaf.codebook
  if codebook is None and leaf.offsets is None:
    if values.dtype == jnp.int8:
      return Kind.Q8_0
    if leaf.bits == 4:
      return Kind.Q4_0
  if leaf.bits == 4 and leaf.offsets is not None and codebook is not None:
    codebook = np.asarray(codebook)
    if np.array_equal(codebook, _CODES):
      return Kind.Q4_1
  raise ValueError(
    f'no block is like its {leaf.bits} bits ({values.dtype.name},'
    f' {"no " if codebook is None else ""}codebook,'
    f' {"no " if leaf.offsets is None else ""}offsets): {_REMEDY}.'
  )


def _in_half(scales: Any, name: str, shape: tuple[int, int]) -> np.ndarray:
  """Scales or offsets [K / G, N] for blocks of `shape` [N, K / 32], exactly."""
  if scales is None:
    return np.ones(shape, np.float16)
  if isinstance(scales, formats.QuantizedScales):
    raise ValueError(f'its {name} are quantized themselves: {_REMEDY}.')
  scales = np.asarray(scales)
  if shape[1] % len(scales):
    raise ValueError(
      f'its {name} are {len(scales)} for {shape[1] * BLOCK} inputs, and groups'
      f' must be a multiple of {BLOCK}: {_REMEDY}.'
    )
  with np.errstate(over='ignore'):
    half = scales.astype(np.float16)
  if not np.isfinite(half).all() or (half.astype(scales.dtype) != scales).any():
    raise ValueError(
      f'its {name} are not numbers of float16: round them first, as in'
      f' dataclasses.replace(leaf, {name}=leaf.{name}.astype(jnp.float16)).'
    )
  half = np.repeat(half, shape[1] // len(half), axis=0)
  return np.broadcast_to(half, shape[::-1]).T
