"""Rounding that knows what the weight multiplies (GPTQ, arXiv 2210.17323).

Rows of W [K, N] are rounded one after another; what the rounding of a row loses
is made up for by those that are still to come, so that x @ W changes least over
the rows x of some text:

    H = 2 mean(x x') + damping,     U' U = H^-1   (U upper triangular)
    e_k = (w_k - round(w_k)) / U_kk,     w_j -= U_kj e_k   for j > k

The weight is then further from what it was than by plain rounding, and the
product nearer. Scales of a group of rows are taken when it is reached.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from efficiency_jax import leaves
from efficiency_jax.quantization import absmax
from efficiency_jax.quantization.calibration import Inputs

# Rows between two updates of all that follow.
_BLOCK = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gptq:
  """A calibrated method of `rules.quantize`.

  Attributes:
    integers: How a row is rounded; per 'channel' or a number of rows.
    damping: Of the diagonal of H, as a share of its mean.
  """

  integers: absmax.Integers
  damping: float = 0.01
  calibrated: bool = dataclasses.field(default=True, init=False)
  statistics: tuple[str, ...] = dataclasses.field(default=('gram',), init=False)

  def __post_init__(self):
    if self.integers.per == 'tensor':
      raise ValueError("GPTQ takes scales per 'channel' or group of rows.")
    if self.damping <= 0:
      raise ValueError(f'damping must be > 0, got {self.damping}.')

  @property
  def name(self) -> str:
    return f'GPTQ, {self.integers.name}'

  def __call__(self, matrix: jax.Array, inputs: Inputs) -> leaves.QTensor:
    """Stores a matrix [K, N].

    Raises:
      ValueError: The group does not divide K, or K does not fill bytes.
    """
    upper, dead = _factor(np.asarray(inputs.gram, np.float64), self.damping)
    w = np.array(matrix, np.float64)
    # Nothing ever reaches these rows.
    w[dead] = 0
    rows = w.shape[0]
    size = rows if self.integers.per == 'channel' else self.integers.per
    parts = []
    for begin in range(0, rows, _BLOCK):
      end = min(begin + _BLOCK, rows)
      lost = np.empty((end - begin, w.shape[1]))
      for k in range(begin, end):
        if k % size == 0:
          # What is still to be given to the rows of this group.
          ahead = w[k : k + size].copy()
          if k > begin:
            given = upper[begin:k, end : k + size].T @ lost[: k - begin]
            ahead[len(ahead) - len(given) :] -= given
          parts.append(_scales(ahead, self.integers))
        rounded = _rounded(w[k], *parts[-1], self.integers)
        lost[k - begin] = (w[k] - rounded) / upper[k, k]
        w[k] = rounded
        w[k + 1 : end] -= np.outer(upper[k, k + 1 : end], lost[k - begin])
      w[end:] -= upper[begin:end, end:].T @ lost
    return _stored(w, parts, self.integers, matrix.dtype)


def _factor(gram: np.ndarray, damping: float):
  """U of H^-1 = U' U, and which inputs are always zero."""
  h = 2 * gram
  dead = np.diag(h) == 0
  h[dead, dead] = 1
  h[np.diag_indices_from(h)] += damping * np.mean(np.diag(h))
  # H = R R' with R upper triangular, of the Cholesky factor of H turned around;
  # U is the inverse of R, which takes a third of the work of that of H.
  lower = scipy.linalg.cholesky(h[::-1, ::-1], lower=True)
  upper, _ = scipy.linalg.lapack.dtrtri(lower[::-1, ::-1])
  return upper, dead


def _scales(group: np.ndarray, how: absmax.Integers):
  """Scales [N] of rows, and offsets [N] or None."""
  rows = jnp.asarray(group, jnp.float32)
  # Only the scales are used, whose values need not fill bytes.
  scales, offsets, _ = absmax.quantized(rows[None], how)
  as_array = lambda x: None if x is None else np.asarray(x[0], np.float64)
  return as_array(scales), as_array(offsets)


def _rounded(row, scales, offsets, how: absmax.Integers) -> np.ndarray:
  half = 2 ** (how.bits - 1)
  if offsets is None:
    q = np.clip(np.round(row / scales), -half + 1, half - 1)
    return q * scales
  q = np.clip(np.round((row - offsets) / scales), -half, half - 1)
  return q * scales + offsets


def _stored(w, parts, how: absmax.Integers, dtype) -> leaves.QTensor:
  """The leaf whose values are exactly those that were rounded to."""
  scales = np.stack([scales for scales, _ in parts])
  offsets = None
  q = w.reshape(len(parts), -1, w.shape[1])
  if parts[0][1] is not None:
    offsets = np.stack([offset for _, offset in parts])
    q = q - offsets[:, None]
  q = np.round(q / scales[:, None]).reshape(w.shape).astype(np.int32)
  stored = lambda x: None if x is None else jnp.asarray(x, how.scale_dtype)
  return leaves.check(
    leaves.QTensor(
      values=leaves.pack(jnp.asarray(q), how.bits),
      scales=stored(scales),
      offsets=stored(offsets),
      bits=how.bits,
      dtype=dtype,
      activation=how.activation,
    )
  )
