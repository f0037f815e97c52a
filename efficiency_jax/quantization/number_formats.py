"""Floats of 32, 16 and 8 bits: what their bits mean, and what a cast loses.

A float is (-1)^sign 2^(exponent - bias) (1 + fraction / 2^f); with the exponent
0 it is (-1)^sign 2^(1 - bias) fraction / 2^f.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import leaves
from efficiency_jax.quantization import absmax
from pallas_kernels.dequant_matmul import formats as kernel_formats


class Format(NamedTuple):
  """The layout of a float format, highest bit first: sign, exponent,
  fraction."""

  name: str
  dtype: Any
  exponent_bits: int
  fraction_bits: int

  @property
  def bits(self) -> int:
    return 1 + self.exponent_bits + self.fraction_bits

  @property
  def bias(self) -> int:
    return 2 ** (self.exponent_bits - 1) - 1

  @property
  def largest(self) -> float:
    return float(jnp.finfo(self.dtype).max)

  @property
  def smallest_normal(self) -> float:
    return float(jnp.finfo(self.dtype).smallest_normal)

  @property
  def epsilon(self) -> float:
    """The step after 1."""
    return 2.0**-self.fraction_bits


FORMATS = {
  f.name: f
  for f in (
    Format('fp32', jnp.float32, 8, 23),
    Format('fp16', jnp.float16, 5, 10),
    Format('bf16', jnp.bfloat16, 8, 7),
    Format('fp8 e4m3', jnp.float8_e4m3fn, 4, 3),
    Format('fp8 e5m2', jnp.float8_e5m2, 5, 2),
  )
}


class Fields(NamedTuple):
  """The bits of one number, as integers."""

  sign: int
  exponent: int
  fraction: int


def fields(number: float, name: str) -> Fields:
  """A number rounded to a format, and its three fields."""
  fmt = FORMATS[name]
  stored = np.asarray(number, np.float32).astype(fmt.dtype)
  bits = int(stored.view(f'u{fmt.bits // 8}'))
  return Fields(
    sign=bits >> (fmt.bits - 1),
    exponent=bits >> fmt.fraction_bits & (2**fmt.exponent_bits - 1),
    fraction=bits & (2**fmt.fraction_bits - 1),
  )


def drawn(number: float, name: str) -> str:
  """The bits of a number in a format: `0 01111 1000000000` is 1.5 in fp16."""
  fmt = FORMATS[name]
  sign, exponent, fraction = fields(number, name)
  return (
    f'{sign} {exponent:0{fmt.exponent_bits}b} {fraction:0{fmt.fraction_bits}b}'
  )


class CastReport(NamedTuple):
  """What a cast of some numbers lost.

  Attributes:
    overflowed: Share of finite numbers that became infinite or NaN.
    underflowed: Share of numbers that became 0 and were not.
    largest: Largest magnitude before.
    relative_error: Root of the mean squared error over that of the numbers,
      among those that stayed finite.
  """

  overflowed: float
  underflowed: float
  largest: float
  relative_error: float


def cast(x: jax.Array, name: str) -> tuple[jax.Array, CastReport]:
  """Numbers in another format, and what that lost."""
  x = x.astype(jnp.float32)
  y = x.astype(FORMATS[name].dtype)
  back = y.astype(jnp.float32)
  lost = jnp.isfinite(x) & ~jnp.isfinite(back)
  error = jnp.where(jnp.isfinite(back), back - x, 0)
  size = jnp.where(jnp.isfinite(back), x, 0)
  tiny = jnp.finfo(jnp.float32).tiny
  ratio = jnp.sum(error**2) / jnp.maximum(jnp.sum(size**2), tiny)
  report = CastReport(
    overflowed=float(jnp.mean(lost)),
    underflowed=float(jnp.mean((back == 0) & (x != 0))),
    largest=float(jnp.abs(x).max()),
    relative_error=float(jnp.sqrt(ratio)),
  )
  return y, report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floats:
  """A method of `rules.quantize`: narrower floats.

  Attributes:
    format: Of `FORMATS`.
    per: With fp8 what shares a scale, so that the largest weight is the largest
      number of the format; None has no scales. 16 bits take none.
  """

  format: str = 'bf16'
  per: absmax.Granularity | None = None

  def __post_init__(self):
    narrow = [f.name for f in FORMATS.values() if f.bits <= 16]
    if self.format not in narrow:
      raise ValueError(
        f'format must be of {", ".join(narrow)}, got {self.format!r}.'
      )
    if self.per is not None and FORMATS[self.format].bits != 8:
      raise ValueError(f'{self.format} takes no scales: leave per out.')

  @property
  def name(self) -> str:
    if self.per is None:
      return self.format
    scales = f'group {self.per}' if isinstance(self.per, int) else self.per
    return f'{self.format}, {scales}'

  def __call__(self, matrix: jax.Array) -> leaves.QTensor:
    """Stores a matrix [K, N].

    Raises:
      ValueError: A weight is too large for the format.
    """
    fmt = FORMATS[self.format]
    scales = None
    values = matrix
    if self.per is not None:
      groups = absmax.grouped(matrix, self.per)
      scales = kernel_formats.usable(jnp.abs(groups).max(1) * (1 / fmt.largest))
      values = jnp.clip(
        groups * (1 / scales)[:, None], -fmt.largest, fmt.largest
      ).reshape(matrix.shape)
    stored, report = cast(values, self.format)
    if report.overflowed:
      raise ValueError(
        f'{report.overflowed:.2%} of the weights are beyond {fmt.largest:g},'
        f' the largest {fmt.name}; the largest is {report.largest:g}: take'
        ' scales or a wider format.'
      )
    return leaves.check(
      leaves.QTensor(
        values=stored, scales=scales, bits=fmt.bits, dtype=matrix.dtype
      )
    )
