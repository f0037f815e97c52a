"""GOBO: outliers by likelihood, centroids that stop early."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from efficiency_jax import leaves
from efficiency_jax.quantization import gobo
from efficiency_jax.quantization.gobo import Gobo

pytestmark = pytest.mark.short

_NORMAL = np.asarray(jax.random.normal(jax.random.key(0), (512, 256)) * 0.1)


def test_outliers_are_those_that_a_gaussian_finds_unlikely():
  log_density = stats.norm(_NORMAL.mean(), _NORMAL.std()).logpdf(_NORMAL)
  np.testing.assert_array_equal(gobo.outliers(_NORMAL), log_density < -4)


@pytest.mark.parametrize(
  ('sigma', 'z'), [(0.04, 3.55), (0.1, 3.28), (0.2, None), (0.4, None)]
)
def test_how_many_there_are_depends_on_the_scale_of_the_weights(sigma, z):
  """log N < -4 is |z| > sqrt(2 (4 - log(sigma sqrt(2 pi))))."""
  bound = np.sqrt(2 * (4 - np.log(sigma * np.sqrt(2 * np.pi))))
  if z is not None:
    assert abs(bound - z) < 0.01
  expected = 2 * stats.norm.sf(bound)
  weights = np.random.default_rng(0).standard_normal(10**6) * sigma
  found = gobo.outliers(weights).mean()
  assert abs(found - expected) < 5 * np.sqrt(expected / 10**6)


def test_clustering_matches_a_plain_loop():
  """The sums over ranges against assignment of every weight."""
  weights = np.random.default_rng(1).standard_normal(3000)
  edges = np.linspace(0, 3000, 9).round().astype(int)
  ordered = np.sort(weights)
  centroids = np.array(
    [ordered[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
  )
  best, kept, iterations = np.inf, None, 0
  while True:
    iterations += 1
    nearest = np.abs(weights[:, None] - centroids).argmin(1)
    error = np.abs(weights - centroids[nearest]).mean()
    if error >= best:
      break
    best, kept = error, centroids
    centroids = np.array([weights[nearest == c].mean() for c in range(8)])
  fit = gobo.cluster(weights, 3)
  assert fit.iterations == iterations
  np.testing.assert_allclose(fit.centroids, kept, rtol=1e-5)
  np.testing.assert_allclose(fit.mean_error, best, rtol=1e-6)


@pytest.mark.parametrize(('bits', 'most'), [(3, 12), (4, 40)])
def test_it_stops_long_before_k_means_and_errs_less_in_l1(bits, most):
  early = gobo.cluster(_NORMAL, bits)
  converged = gobo.cluster(_NORMAL, bits, 'converged')
  assert early.iterations <= most
  assert converged.iterations > 3 * early.iterations
  last = converged.centroids
  nearest = np.abs(_NORMAL.reshape(-1, 1) - last).argmin(1)
  l1 = np.abs(_NORMAL.reshape(-1) - last[nearest]).mean()
  assert early.mean_error <= 1.001 * l1


def test_a_leaf_restores_outliers_exactly_and_others_nearly():
  matrix = jnp.asarray(_NORMAL)
  q = Gobo(bits=3, threshold=-2.0)(matrix)
  outside = gobo.outliers(_NORMAL, -2.0)
  restored = np.asarray(leaves.dequantize(q))
  np.testing.assert_array_equal(restored[outside], _NORMAL[outside])
  assert set(np.unique(restored[~outside])) <= set(np.asarray(q.codebook))
  nearest = np.abs(_NORMAL[..., None] - np.asarray(q.codebook)).min(-1)
  np.testing.assert_allclose(
    np.abs(restored - _NORMAL)[~outside], nearest[~outside], atol=1e-7
  )
  # 3 bits a weight, 64 an outlier, and the table.
  bits = 3 * matrix.size + 64 * outside.sum() + 8 * 32
  np.testing.assert_allclose(q.bits_per_weight, bits / matrix.size)


def test_weights_that_are_all_alike():
  q = Gobo(bits=3)(jnp.full((8, 4), 0.25))
  np.testing.assert_array_equal(leaves.dequantize(q), 0.25)
  assert len(q.outliers.values) == 0


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bits': 8}, r'bits must be in 2\.\.7'),
    ({'until': 'l2'}, 'until must be'),
  ],
)
def test_options_that_do_not_exist_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Gobo(**options)


def test_a_threshold_that_leaves_nothing_is_refused():
  with pytest.raises(ValueError, match='no weight is left'):
    Gobo(threshold=100.0)(jnp.asarray(_NORMAL))


@pytest.mark.peers
def test_outliers_and_clusters_are_those_of_scikit_learn():
  from sklearn import cluster
  from sklearn import mixture

  flat = _NORMAL.reshape(-1, 1)[:20_000].astype(np.float64)
  model = mixture.GaussianMixture(n_components=1, reg_covar=0.0).fit(flat)
  np.testing.assert_array_equal(
    gobo.outliers(flat[:, 0]), model.score_samples(flat) < -4
  )
  edges = np.linspace(0, len(flat), 9).round().astype(int)
  ordered = np.sort(flat[:, 0])
  begin = [ordered[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
  theirs = cluster.KMeans(
    8, init=np.array(begin)[:, None], n_init=1, tol=0, max_iter=1000
  ).fit(flat)
  ours = gobo.cluster(flat, 3, 'converged')
  np.testing.assert_allclose(
    ours.centroids, np.sort(theirs.cluster_centers_[:, 0]), atol=1e-4
  )
