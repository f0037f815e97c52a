"""Weights as 4-bit codes of a fixed table: NF4 and FP4 (arXiv 2305.14314).

    w' = code[q] s,      s = max |w| over a block,      q the nearest code

NF4 has the quantiles of a normal distribution, which is best where weights are
normal; FP4 the numbers of a tiny float. Double quantization stores the scales s
in 8 bits too (section 3): 0.127 instead of 0.5 bits a weight in blocks of 64.
"""

import dataclasses
from typing import Literal

import jax
import numpy as np

from efficiency_jax import leaves
from pallas_kernels.dequant_matmul import formats

# Sign, two bits of exponent and one of fraction, as bitsandbytes has it: its
# largest is 12, and the least is not a half but a 192th of that.
_POSITIVE = np.array([0, 0.0625, 2, 3, 4, 6, 8, 12]) / 12

CODES = {
  'NF4': formats.NF4,
  'FP4': np.concatenate([-_POSITIVE[::-1], _POSITIVE]).astype(np.float32),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
  """A method of `rules.quantize`: 4-bit codes with absmax scales.

  Attributes:
    code: 'NF4' or 'FP4'.
    block: Rows of a column that share a scale.
    double: Whether scales are in 8 bits.
  """

  code: Literal['NF4', 'FP4'] = 'NF4'
  block: int = 64
  double: bool = False

  def __post_init__(self):
    if self.code not in CODES:
      raise ValueError(f'code must be of {sorted(CODES)}, got {self.code!r}.')
    if self.block < 1:
      raise ValueError(f'block must be >= 1, got {self.block}.')

  @property
  def name(self) -> str:
    return f'{self.code}{" + DQ" if self.double else ""}, block {self.block}'

  def __call__(self, matrix: jax.Array) -> leaves.QTensor:
    """Stores a matrix [K, N]; see the head of the module.

    Raises:
      ValueError: The block does not divide K, or 32 does not.
    """
    packed = formats.quantize_codes(matrix, CODES[self.code], self.block)
    scales = packed.scales
    return leaves.check(
      leaves.QTensor(
        values=packed.values,
        scales=formats.quantize_scales(scales) if self.double else scales,
        codebook=packed.codebook,
        bits=4,
        dtype=matrix.dtype,
      )
    )
