"""How weights of 8 and 4 bits are stored, and the simplest way to make them.

    w_kn = value(q_kn) s_gn,    g = k // G         G consecutive k share a scale

    int8   q in -127 .. 127 is the value           s = max |w| / 127
    int4   q in -7 .. 7 is the value               s = max |w| / 7
    NF4    q in 0 .. 15, value = NF4[q]            s = max |w|

with the maximum over a group. A group of zeros has scale 1.

Two values of 4 bits share a byte. Of every 32 consecutive rows of a column,
byte i holds row i in its low half and row 16 + i in its high half:

    rows of w       0 .. 15 | 16 .. 31 | 32 .. 47 | 48 .. 63 | ...
    rows of bytes    0 .. 15  low, high   16 .. 31  low, high  | ...

Why so. Pairs lie along K, so that both halves of a byte belong to one column:
columns are the lanes of a TPU, and nothing has to cross them. Neighbours (rows
2i and 2i + 1) would have to be woven together, row by row; sixteen rows are
whole registers of a TPU (8 rows of 32 bits, 16 of bfloat16), which are only
renamed. And 32 rows stay together, so that a slice of whole groups of the bytes
is that slice of the weight, on whichever device it lies. (Blocks of llama.cpp's
Q4_0 have the same order.)
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

BLOCK = 32  # rows of a column whose 4-bit values lie together
HALF = BLOCK // 2

# The 16 quantiles of a normal distribution of QLoRA (arXiv 2305.14314,
# appendix E), with an exact zero, scaled to -1 .. 1.
NF4 = np.asarray(
  [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
  ],
  np.float32,
)
NF4_GROUP = 64

# Below it a scale is not a normal float32, and has no usable reciprocal.
SMALLEST = float(np.finfo(np.float32).tiny)
_SCALES = 256  # that share a step when they are quantized themselves


class Quantized(NamedTuple):
  """A weight [K, N]; `dequant_matmul(x, *quantized)` multiplies with it.

  Attributes:
    values: [K, N] int8, or [K / 2, N] uint8 as `pack_int4` packs.
    scales: [K / G, N] float32.
    codebook: [16] float32, the value of each 4-bit code; None where 4 bits are
      a signed integer.
  """

  values: jax.Array
  scales: jax.Array
  codebook: jax.Array | None = None


def pack_int4(values: jax.Array) -> jax.Array:
  """Two to a byte: [K, N] integers in -8 .. 7 or 0 .. 15 to [K / 2, N] uint8.

  Their low four bits are kept, a negative number's in two's complement. K is a
  multiple of 32; the order is at the head of this module.
  """
  rows, columns = values.shape
  if rows % BLOCK:
    raise ValueError(
      f'values have {rows} rows; right is a multiple of {BLOCK}.'
    )
  nibbles = values.astype(jnp.int32) & 15
  nibbles = nibbles.reshape(rows // BLOCK, 2, HALF, columns)
  packed = nibbles[:, 0] | nibbles[:, 1] << 4
  return packed.astype(jnp.uint8).reshape(rows // 2, columns)


def halves(packed: jax.Array, *, signed: bool) -> tuple[jax.Array, jax.Array]:
  """Values of the low and of the high half of each byte, both as int32.

  Signed they are -8 .. 7, else 0 .. 15. Low ones are rows 0 .. 15 of each 32.
  """
  # 32 bits are the width that both a TPU and XLA on a CPU shift fast.
  packed = packed.astype(jnp.int32)
  if signed:
    return packed << 28 >> 28, packed << 24 >> 28
  return packed & 15, packed >> 4 & 15


def columns_of_halves(x: jax.Array) -> list[jax.Array]:
  """Columns of x [M, K] that meet the low and the high half of each byte."""
  rows, columns = x.shape
  x = x.reshape(rows, columns // BLOCK, 2, HALF)
  return [x[:, :, half].reshape(rows, columns // 2) for half in range(2)]


def unpack_int4(packed: jax.Array, *, signed: bool) -> jax.Array:
  """What `pack_int4` packed: [K / 2, N] uint8 to [K, N] int32."""
  rows, columns = packed.shape
  low, high = (
    half.reshape(rows // HALF, HALF, columns)
    for half in halves(packed, signed=signed)
  )
  return jnp.concatenate([low, high], axis=1).reshape(2 * rows, columns)


def quantize_int8(w: jax.Array, group: int | None = None) -> Quantized:
  """Absmax quantization of [K, N]; `group` None gives a column one scale."""
  values, scales = _nearest_integers(w, group or w.shape[0], 127)
  return Quantized(values.astype(jnp.int8), scales)


def quantize_int4(w: jax.Array, group: int) -> Quantized:
  """Absmax quantization of [K, N]; -8 has no partner and is never produced."""
  values, scales = _nearest_integers(w, group, 7)
  return Quantized(pack_int4(values), scales)


def quantize_nf4(w: jax.Array, group: int = NF4_GROUP) -> Quantized:
  """Nearest NF4 values of [K, N] after division by the absmax of the group.

  Where 64 divides K these are the codes and scales that bitsandbytes has for
  the transposed weight, which it cuts into blocks of 64 row by row.
  """
  return quantize_codes(w, NF4, group)


def quantize_codes(w: jax.Array, code: np.ndarray, group: int) -> Quantized:
  """Nearest of 16 increasing values in -1 .. 1, as `quantize_nf4`."""
  groups, scales = _groups(w, group, 1)
  codes = nearest(groups * (1 / scales)[:, None], code)
  packed = pack_int4(codes.reshape(w.shape))
  return Quantized(packed, scales, jnp.asarray(code))


def nearest(values: jax.Array, code: np.ndarray) -> jax.Array:
  """The place of the nearest number of an increasing table, for every value."""
  return jnp.searchsorted((code[1:] + code[:-1]) / 2, values)


def _nearest_integers(w, group: int, largest: int):
  groups, scales = _groups(w, group, largest)
  values = jnp.round(groups * (1 / scales)[:, None])
  values = jnp.clip(values, -largest, largest).astype(jnp.int32)
  return values.reshape(w.shape), scales


def _groups(w, group: int, largest: int):
  """w as [K / G, G, N] float32, and the scales [K / G, N]."""
  rows, columns = w.shape
  if group < 1 or rows % group:
    raise ValueError(f'group is {group}, and does not divide the {rows} rows.')
  groups = w.astype(jnp.float32).reshape(rows // group, group, columns)
  # A product, because compilers replace the division by a constant with one,
  # and then a compiled program would round otherwise than single operations.
  return groups, usable(jnp.abs(groups).max(1) * (1 / largest))


def usable(scales: jax.Array) -> jax.Array:
  """Scales, with 1 for those that have no reciprocal: of zeros, or nearly."""
  return jnp.where(scales < SMALLEST, 1.0, scales)


class QuantizedScales(NamedTuple):
  """Scales [K / G, N] in 8 bits each: QLoRA's double quantization.

      s_i = offset + step_(i // 256) DYNAMIC_MAP[code_i]

  i counts column by column, which is the order of bitsandbytes. With groups of
  64 that is 8 / 64 + 32 / (64 * 256) = 0.127 bits a weight instead of 0.5.

  Attributes:
    codes: [N, K / G] uint8.
    steps: [ceil(N K / G / 256)] float32.
    offset: [] float32, the mean of the scales.
  """

  codes: jax.Array
  steps: jax.Array
  offset: jax.Array


def _dynamic_map() -> np.ndarray:
  """[256] float32, increasing: the 8-bit dynamic data type of bitsandbytes.

  For each decade 10^-6 .. 10^0 the middles of 1, 2, 4 .. 64 equal parts of
  0.1 .. 1 (arXiv 1511.04561), with both signs, and 0 and 1.
  """
  positive = []
  for i in range(7):
    edges = np.linspace(0.1, 1, 2**i + 1)
    positive.append(10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2)
  positive = np.concatenate(positive)
  return np.sort([*-positive, 0, *positive, 1]).astype(np.float32)


DYNAMIC_MAP = _dynamic_map()


def quantize_scales(scales: jax.Array) -> QuantizedScales:
  """Double quantization of [K / G, N] float32 (arXiv 2305.14314, section 3)."""
  offset = scales.mean()
  rest = (scales.T - offset).reshape(-1)
  padded = jnp.pad(rest, (0, -rest.size % _SCALES)).reshape(-1, _SCALES)
  steps = usable(jnp.abs(padded).max(1))
  codes = nearest(padded * (1 / steps)[:, None], DYNAMIC_MAP)
  codes = codes.astype(jnp.uint8).reshape(-1)[: rest.size]
  return QuantizedScales(codes.reshape(scales.T.shape), steps, offset)


def dequantize_scales(quantized: QuantizedScales) -> jax.Array:
  """Scales [K / G, N] float32, as `dequant_matmul` takes them.

  A 64th of the weight: made by XLA before the product, not in its tiles.
  """
  codes, steps, offset = quantized
  steps = jnp.repeat(steps, _SCALES)[: codes.size].reshape(codes.shape)
  values = jnp.take(jnp.asarray(DYNAMIC_MAP), codes.astype(jnp.int32), axis=0)
  return (values * steps + offset).T


def look_up(codes: jax.Array, codebook: jax.Array) -> jax.Array:
  """codebook[codes] for codes 0 .. 15, without memory: 15 selections.

  Neither a TPU nor XLA on a CPU gathers one number a lane as fast. `codebook`
  is [16], or a reference to it.
  """
  values = [codebook[i] for i in range(16)]
  for bit in range(4):
    odd = codes >> bit & 1 != 0
    values = [
      lax.select(odd, *(jnp.broadcast_to(v, codes.shape) for v in (high, low)))
      for low, high in zip(values[::2], values[1::2], strict=True)
    ]
  return values[0]
