"""Means over units that were drawn at random, and how far to trust them.

A unit is what is independent of the others: a window of text, whose tokens are
not, or a question.
"""

import dataclasses
import functools

import numpy as np
from scipy import special

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate:
  """The mean of something per token or per question, with its uncertainty.

  Units differ in size, so the mean is a ratio of sums, r = sum_i s_i / sum_i
  c_i over the units i = 1 .. N. Its standard error is the usual one of a ratio
  (Cochran, Sampling Techniques, 1977, section 2.11),

      se^2 = N / (N - 1) sum_i (s_i - r c_i)^2 / (sum_i c_i)^2,

  which for units of size 1 is the standard error of a mean, and for answers
  that are right or wrong sqrt(r (1 - r) / (N - 1)). The interval takes r as
  normal and its error as estimated from N units: r -+ t se with Student's t of
  N - 1 degrees of freedom.

  Attributes:
    sums: float64 [N], the sum s_i in each unit.
    counts: float64 [N], tokens or questions c_i in each unit.
  """

  sums: np.ndarray
  counts: np.ndarray

  def __post_init__(self):
    for name in ('sums', 'counts'):
      array = np.asarray(getattr(self, name), np.float64)
      object.__setattr__(self, name, array)
    if self.sums.ndim != 1 or self.sums.shape != self.counts.shape:
      raise ValueError(
        f'sums and counts must be lists of one length, got shapes'
        f' {self.sums.shape} and {self.counts.shape}.'
      )
    if not self.counts.sum() > 0:
      raise ValueError(
        'counts must add up to more than 0: nothing was counted.'
      )

  @functools.cached_property
  def value(self) -> float:
    """The mean r."""
    return float(self.sums.sum() / self.counts.sum())

  @functools.cached_property
  def standard_error(self) -> float:
    """The standard deviation of `value`; infinite for a single unit."""
    units = len(self.sums)
    if units == 1:
      return float('inf')
    residuals = self.sums - self.value * self.counts
    scale = np.sqrt(units / (units - 1)) / self.counts.sum()
    return float(scale * np.sqrt(np.sum(residuals**2)))

  @property
  def low(self) -> float:
    """The lower end of the interval of 95 %."""
    return self.value - self._half_width

  @property
  def high(self) -> float:
    """The upper end of the interval of 95 %."""
    return self.value + self._half_width

  @property
  def _half_width(self) -> float:
    if len(self.sums) == 1:
      return float('inf')
    quantile = special.stdtrit(len(self.sums) - 1, (1 + CONFIDENCE) / 2)
    return float(quantile) * self.standard_error


def compare(a: Estimate, b: Estimate) -> Estimate:
  """How much more a is than b, measured on the same units: r_a - r_b.

  The difference is taken in each unit before anything is averaged. What makes a
  unit hard for both falls out, so the interval is much narrower than the two of
  a and b, and tells small losses from none.

  Raises:
    ValueError: The units are not the same: they differ in number or size.
  """
  if not np.array_equal(a.counts, b.counts):
    raise ValueError(
      'a and b must be measured on the same units: they have'
      f' {len(a.counts)} and {len(b.counts)}, of {a.counts.sum():.0f} and'
      f' {b.counts.sum():.0f} tokens or questions.'
    )
  return Estimate(a.sums - b.sums, a.counts)
