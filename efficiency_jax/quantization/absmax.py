"""Weights as integers of 2 to 8 bits with a scale: absmax and zero point.

Symmetric (absmax), with b = 2^(bits - 1) - 1:

    s = max |w| / b,      q = round(w / s) in -b .. b,        w' = q s

With a zero point, over the range of w, which is widened to hold 0:

    s = (max - min) / (2^bits - 1),   z = -2^(bits - 1) - round(min / s)
    q = clip(round(w / s) + z),       w' = (q - z) s

so that 0 is exact. The maximum is over a group: all of the matrix, a column (an
output channel), or a number of consecutive rows of a column. (LLM.int8(), arXiv
2208.07339, section 2.1, has the same up to the direction of s.)

The lecture's example of absmax:

>>> import jax.numpy as jnp
>>> from efficiency_jax import leaves
>>> x = jnp.array([[1.2, -0.5, -4.3, 1.2, -3.1, 0.8, 2.4, 5.4]])
>>> leaves.integers(Integers(per='tensor')(x))
Array([[  28,  -12, -101,   28,  -73,   19,   56,  127]], dtype=int32)
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from efficiency_jax import leaves
from pallas_kernels.dequant_matmul import formats

Granularity = Literal['tensor', 'channel'] | int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integers:
  """A method of `rules.quantize`: integers with scales.

  Attributes:
    bits: 2 to 8.
    per: What shares a scale: 'tensor', 'channel' (a column of [K, N]), or so
      many consecutive rows of a column.
    symmetric: Absmax; else with a zero point.
    activation: Integers for the other operand too; None multiplies floats.
    scale_dtype: Of the scales and offsets as stored.
    clip: Factor of the largest magnitude from which on weights are clipped.
  """

  bits: int = 8
  per: Granularity = 'channel'
  symmetric: bool = True
  activation: leaves.Activation | None = None
  scale_dtype: jax.typing.DTypeLike = jnp.float32
  clip: float = 1.0

  def __post_init__(self):
    if not 2 <= self.bits <= 8:
      raise ValueError(f'bits must be in 2..8, got {self.bits}.')
    if self.per not in ('tensor', 'channel') and (
      not isinstance(self.per, int) or self.per < 1
    ):
      raise ValueError(
        "per must be 'tensor', 'channel' or a number of rows, got"
        f' {self.per!r}.'
      )
    if not 0 < self.clip <= 1:
      raise ValueError(f'clip must be in (0, 1], got {self.clip}.')

  @property
  def name(self) -> str:
    kind = 'absmax' if self.symmetric else 'zero point'
    group = f'group {self.per}' if isinstance(self.per, int) else self.per
    operands = f'W{self.bits}'
    if self.activation is not None:
      operands += f'A{self.activation.bits}'
    return f'{operands} {kind}, {group}'

  def __call__(self, matrix: jax.Array) -> leaves.QTensor:
    """Stores a matrix [K, N]; see the head of the module.

    Raises:
      ValueError: The group does not divide K, or K does not fill bytes.
    """
    scales, offsets, q = quantized(grouped(matrix, self.per), self)
    stored = lambda x: None if x is None else x.astype(self.scale_dtype)
    q = q.reshape(matrix.shape)
    return leaves.check(
      leaves.QTensor(
        values=leaves.pack(q, self.bits),
        scales=stored(scales),
        offsets=stored(offsets),
        bits=self.bits,
        dtype=matrix.dtype,
        activation=self.activation,
      )
    )


def grouped(matrix: jax.Array, per: Granularity) -> jax.Array:
  """[K, N] as groups that share a scale: [groups, G, N], or [1, K N, 1].

  Raises:
    ValueError: The group does not divide K.
  """
  rows, columns = matrix.shape
  if per == 'tensor':
    return matrix.reshape(1, -1, 1)
  size = rows if per == 'channel' else per
  if rows % size:
    raise ValueError(f'groups of {size} do not divide {rows} rows.')
  return matrix.reshape(rows // size, size, columns)


# Compiled as a whole: one program a shape, not ten.
@functools.partial(jax.jit, static_argnames='how')
def quantized(
  groups: jax.Array,  # [groups, G, N]
  how: Integers,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
  """Scales [groups, N], offsets likewise or None, and integers [groups, G, N].

  Values are chosen for the scale as it is stored.
  """
  make = _symmetric if how.symmetric else _asymmetric
  rounded = lambda scales: scales.astype(how.scale_dtype).astype(jnp.float32)
  return make(groups, how.bits, how.clip, rounded)


def _symmetric(groups, bits: int, clip: float, rounded):
  largest = 2 ** (bits - 1) - 1
  # A product, because compilers replace the division by a constant with one.
  scales = rounded(
    formats.usable(clip * jnp.abs(groups).max(1) * (1 / largest))
  )
  q = jnp.round(groups * (1 / scales)[:, None])
  return scales, None, jnp.clip(q, -largest, largest).astype(jnp.int32)


def _asymmetric(groups, bits: int, clip: float, rounded):
  low = clip * jnp.minimum(groups.min(1), 0)
  high = clip * jnp.maximum(groups.max(1), 0)
  scales = rounded(formats.usable((high - low) * (1 / (2**bits - 1))))
  least = -(2 ** (bits - 1))
  zeros = least - jnp.round(low / scales)
  q = jnp.round(groups * (1 / scales)[:, None]) + zeros[:, None]
  q = jnp.clip(q, least, -least - 1).astype(jnp.int32)
  return scales, -zeros * scales, q
