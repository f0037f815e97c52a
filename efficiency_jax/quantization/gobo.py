"""GOBO: a few values for most weights, and the others as they are.

(arXiv 2005.03842.) One Gaussian is fitted to a matrix. Weights that are
unlikely under it, log N(w) < threshold, stay float32 with their positions. The
rest share 2^bits values, which begin as the means of parts of equal population
and then, in turns, take every weight to the nearest of them and each to the
mean of its weights. That is k-means, but it stops as soon as sum |w - w'|
grows, which is soon, and keeps the best.

The threshold -4 counts in the units of w: how much it leaves out depends on
the standard deviation (0.1 % at 0.1), so the share is reported.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import leaves


class Fit(NamedTuple):
  """What clustering found.

  Attributes:
    centroids: [2^bits] float32, increasing.
    iterations: Of assignment and mean, until it stopped.
    mean_error: Mean |w - w'| of the weights that were clustered.
  """

  centroids: np.ndarray
  iterations: int
  mean_error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gobo:
  """A method of `rules.quantize`.

  Attributes:
    bits: Of a code, 2 to 7; the paper has 3 and 4.
    threshold: Log-density below which a weight stays as it is.
    until: When to stop: 'l1' grows, as the paper has it, or 'converged', which
      is k-means.
  """

  bits: int = 3
  threshold: float = -4.0
  until: str = 'l1'

  def __post_init__(self):
    if not 2 <= self.bits <= 7:
      raise ValueError(f'bits must be in 2..7, got {self.bits}.')
    if self.until not in ('l1', 'converged'):
      raise ValueError(
        f"until must be 'l1' or 'converged', got {self.until!r}."
      )

  @property
  def name(self) -> str:
    kind = 'GOBO' if self.until == 'l1' else 'k-means'
    return f'{kind}, {self.bits} bits'

  def __call__(self, matrix: jax.Array) -> leaves.QTensor:
    """Stores a matrix [K, N]; see the head of the module.

    Raises:
      ValueError: K does not fill bytes.
    """
    weights = np.asarray(matrix, np.float32)
    outside = outliers(weights, self.threshold)
    centroids = cluster(weights[~outside], self.bits, self.until).centroids
    middles = (centroids[1:] + centroids[:-1]) / 2
    codes = jnp.asarray(np.searchsorted(middles, weights).astype(np.int32))
    positions = np.flatnonzero(outside).astype(np.int32)
    kept = leaves.Outliers(
      jnp.asarray(positions), jnp.asarray(weights.reshape(-1)[positions])
    )
    return leaves.check(
      leaves.QTensor(
        values=leaves.pack(codes, self.bits),
        codebook=jnp.asarray(centroids),
        outliers=kept,
        bits=self.bits,
        dtype=matrix.dtype,
      )
    )


def outliers(weights: np.ndarray, threshold: float = -4.0) -> np.ndarray:
  """Which weights are unlikely under a Gaussian fitted to all: bool."""
  mean, variance = weights.mean(dtype=np.float64), weights.var(dtype=np.float64)
  if variance == 0:
    return np.zeros(weights.shape, bool)
  squares = (weights.astype(np.float64) - mean) ** 2 / variance
  log_density = -0.5 * (squares + math.log(2 * math.pi * variance))
  return log_density < threshold


def cluster(
  weights: np.ndarray, bits: int, until: str = 'l1', most: int = 1000
) -> Fit:
  """Shares 2^bits values among weights of any shape.

  Weights are sorted once; a part is then a range, and its sums are differences
  of running sums.

  Args:
    weights: At least one.
    bits: Of a code.
    until: 'l1' or 'converged'.
    most: Iterations, at most.
  """
  x = np.sort(weights, axis=None).astype(np.float64)
  if not x.size:
    raise ValueError('no weight is left to cluster: raise the threshold.')
  sums = np.concatenate([[0.0], np.cumsum(x)])
  edges = np.linspace(0, x.size, 2**bits + 1).round().astype(int)
  centroids = _means(sums, edges, np.full(2**bits, x.mean()))
  best, kept, iterations = math.inf, centroids, 0
  while iterations < most:
    iterations += 1
    middles = (centroids[1:] + centroids[:-1]) / 2
    edges = np.concatenate([[0], np.searchsorted(x, middles), [x.size]])
    error = _l1(x, sums, edges, centroids)
    if error >= best and until == 'l1':
      break
    if error < best or until == 'converged':
      best, kept = error, centroids
    moved = _means(sums, edges, centroids)
    if np.array_equal(moved, centroids):
      break
    centroids = moved
  return Fit(kept.astype(np.float32), iterations, best / x.size)


def _means(sums, edges, otherwise) -> np.ndarray:
  """The mean of every part; an empty part keeps its value."""
  counts = np.diff(edges)
  means = np.diff(sums[edges]) / np.maximum(counts, 1)
  return np.sort(np.where(counts > 0, means, otherwise))


def _l1(x, sums, edges, centroids) -> float:
  """sum |x - centroid|, each part cut at its centroid."""
  cut = np.clip(np.searchsorted(x, centroids), edges[:-1], edges[1:])
  below = centroids * (cut - edges[:-1]) - (sums[cut] - sums[edges[:-1]])
  above = (sums[edges[1:]] - sums[cut]) - centroids * (edges[1:] - cut)
  return float((below + above).sum())
