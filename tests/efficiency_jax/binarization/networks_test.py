"""Binarized networks: against plain numpy, and what training may draw."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.binarization import networks

SMALL = networks.Config(image=(4, 4, 1), hidden=(24, 24), classes=3)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8)


_init = jax.jit(networks.init, static_argnums=0)


def _by_hand(config, params, pixels):
  """The dense network in float64, normalized by the batch."""
  x = (2.0 * pixels.reshape(len(pixels), -1) - 255) / 255
  sign = lambda v: np.where(v >= 0, 1.0, -1.0)
  for layer in range(len(config.kernels)):
    leaf = {
      k: np.asarray(v, np.float64) for k, v in params[f'layer_{layer}'].items()
    }
    y = x @ sign(leaf['kernel'])
    z = (y - y.mean(0)) / np.sqrt(y.var(0) + config.epsilon)
    x = z * leaf['scale'] + leaf['bias']
    if layer < len(config.kernels) - 1:
      x = sign(x)
  return x


def test_scores_against_numpy():
  params = _init(SMALL, jax.random.key(0))
  for seed, layer in enumerate(params.values()):
    # Away from ties, which float64 would decide otherwise.
    shape = layer['bias'].shape
    noise = np.random.default_rng(seed).standard_normal(shape)
    layer['bias'] = jnp.asarray(0.37 + 0.2 * noise, jnp.float32)
  scores = networks.apply(SMALL, params, PIXELS).scores
  chex.assert_shape(scores, (16, 3))
  np.testing.assert_allclose(
    scores, _by_hand(SMALL, params, PIXELS), rtol=1e-4, atol=1e-4
  )


def test_a_convolution_has_zeros_around():
  config = networks.Config(
    image=(3, 4, 2), convolutions=((1, False),), hidden=(), classes=2
  )
  rng = np.random.default_rng(0)
  x = rng.integers(-5, 6, (1, 3, 4, 2)).astype(np.float32)
  kernel = rng.choice([-1.0, 1.0], (3, 3, 2, 1)).astype(np.float32)
  around = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  expected = np.zeros((3, 4))
  for row in range(3):
    for column in range(4):
      seen = around[0, row : row + 3, column : column + 3]
      expected[row, column] = (seen * kernel[..., 0]).sum()
  y = networks.product(config, 0, jnp.asarray(x), jnp.asarray(kernel))
  np.testing.assert_array_equal(y[0, ..., 0], expected)


def test_kernels_follow_the_image():
  config = networks.Config(
    image=(8, 12, 3),
    convolutions=((16, False), (32, True), (8, True)),
    hidden=(100,),
  )
  assert config.kernels == (
    (3, 3, 3, 16),
    (3, 3, 16, 32),
    (3, 3, 32, 8),
    (2 * 3 * 8, 100),
    (100, 10),
  )
  pixels = np.zeros((2, 8, 12, 3), np.uint8)
  run = lambda key: networks.apply(config, networks.init(config, key), pixels)
  found = jax.eval_shape(run, jax.random.key(0))
  chex.assert_shape(found.scores, (2, 10))


def test_statistics_of_one_batch_give_its_scores():
  params = _init(SMALL, jax.random.key(0))
  found = networks.statistics(SMALL, params, [PIXELS])
  by_batch = networks.apply(SMALL, params, PIXELS).scores
  by_statistics = networks.apply(SMALL, params, PIXELS, found).scores
  np.testing.assert_allclose(by_statistics, by_batch, rtol=1e-4, atol=1e-5)
  # And one image alone has a score.
  alone = networks.apply(SMALL, params, PIXELS[:1], found).scores
  np.testing.assert_array_equal(alone, by_statistics[:1])


def test_statistics_are_those_of_all_batches_together():
  params = _init(SMALL, jax.random.key(0))
  parts = networks.statistics(SMALL, params, [PIXELS[:8], PIXELS[8:]])
  whole = networks.statistics(SMALL, params, [PIXELS])
  # Exactly so for the first layer, which sees no normalized numbers.
  for part, one in zip(parts['layer_0'], whole['layer_0'], strict=True):
    np.testing.assert_allclose(part, one, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match='at least one batch'):
    networks.statistics(SMALL, params, [])


def _drawn(**choices):
  """Scores with the key of each seed, and without one."""
  config = dataclasses.replace(SMALL, **choices)
  params = _init(config, jax.random.key(0))
  run = lambda key: np.asarray(
    networks.apply(config, params, PIXELS, key=key).scores
  )
  return [run(jax.random.key(seed)) for seed in (0, 0, 1)], run(None)


@pytest.mark.parametrize(
  'choices',
  [
    {'weights': 'stochastic'},
    {'activations': 'stochastic'},
    {'dropout': (0.2, 0.0)},
    {'dropout': (0.0, 0.5)},
  ],
  ids=str,
)
def test_a_key_draws_signs_and_dropout(choices):
  (one, again, other), still = _drawn(**choices)
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  assert (one != still).any()
  # Without one nothing is drawn; drawn weights are then the real ones.
  plain = networks.apply(
    dataclasses.replace(
      SMALL, weights='float' if 'weights' in choices else 'sign'
    ),
    _init(SMALL, jax.random.key(0)),
    PIXELS,
  ).scores
  np.testing.assert_array_equal(still, plain)


def test_a_key_changes_nothing_where_nothing_is_drawn():
  (one, _, other), still = _drawn()
  np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(one, still)


def test_dropout_leaves_out_its_share_and_keeps_the_mean():
  x = jnp.ones((200, 500))
  dropped = networks._dropped(x, 0.2, jax.random.key(0))
  zero = float((dropped == 0).mean())
  assert abs(zero - 0.2) < 4 * (0.2 * 0.8 / x.size) ** 0.5
  np.testing.assert_allclose(np.unique(dropped), [0, 1.25])


@functools.partial(jax.jit, static_argnums=0)
def _gradient(config, params):
  loss = lambda p: (networks.apply(config, p, PIXELS).scores ** 3).sum()
  return jax.grad(loss)(params)


def _slopes(config, params):
  return jax.tree.map(np.asarray, _gradient(config, params))


def test_each_estimator_has_its_own_gradient():
  slopes = {}
  for name in networks.ESTIMATORS:
    config = dataclasses.replace(SMALL, estimator=name)
    params = _init(config, jax.random.key(0))
    slopes[name] = _slopes(config, params)['layer_0']['kernel']
  names = list(slopes)
  for place, one in enumerate(names):
    for other in names[place + 1 :]:
      assert (slopes[one] != slopes[other]).any()


def test_a_pool_is_the_maximum():
  y = jnp.arange(16.0).reshape(1, 4, 4, 1)
  np.testing.assert_array_equal(networks.pool(y)[0, ..., 0], [[5, 7], [13, 15]])


def test_real_weights_begin_as_glorot_has_them():
  config = dataclasses.replace(SMALL, weights='float')
  kernel = _init(config, jax.random.key(0))['layer_1']['kernel']
  bound = (6 / (24 + 24)) ** 0.5
  assert 0.9 * bound < float(jnp.abs(kernel).max()) <= bound
  binary = _init(SMALL, jax.random.key(0))['layer_1']['kernel']
  assert 0.9 < float(jnp.abs(binary).max()) <= 1


def test_the_variance_of_a_shift_norm_is_a_mean_of_shifts():
  config = dataclasses.replace(SMALL, norm='shift')
  y = jnp.array([[0.0], [1.0], [5.0]])  # centred: -2, -1, 3
  mean, variance = networks._moments(config, y)
  np.testing.assert_allclose(mean, [2])
  # 3 to the nearest power of two in logarithms is 4.
  np.testing.assert_allclose(variance, [(2 * 2 + 1 * 1 + 3 * 4) / 3], rtol=1e-6)
  exact = networks._moments(SMALL, y).variance
  np.testing.assert_allclose(exact, [(4 + 1 + 9) / 3], rtol=1e-6)


# Weights know nothing of norms: every one of each is enough.
@pytest.mark.parametrize(
  ('weights', 'norm'),
  [
    (weights, norm)
    if weights == 'sign' or norm == 'batch'
    else pytest.param(weights, norm, marks=pytest.mark.slow)
    for weights in networks.WEIGHTS
    for norm in networks.NORMS
  ],
)
def test_every_latent_weight_and_norm_gets_a_gradient(weights, norm):
  config = dataclasses.replace(SMALL, norm=norm, weights=weights)
  params = _init(config, jax.random.key(0))
  slopes = _slopes(config, params)
  chex.assert_tree_all_finite(slopes)
  for layer in slopes.values():
    for slope in layer.values():
      assert np.abs(slope).max() > 0


def test_real_ends_are_not_binarized():
  config = dataclasses.replace(SMALL, real_ends=True)
  params = _init(config, jax.random.key(0))
  moved = jax.tree.map(lambda x: x, params)
  middle = jax.tree.map(lambda x: x, params)
  moved['layer_0']['kernel'] = 0.5 * params['layer_0']['kernel'] + 0.01
  middle['layer_1']['kernel'] = 0.5 * params['layer_1']['kernel']
  scores = [
    np.asarray(networks.apply(config, p, PIXELS).scores)
    for p in (params, moved, middle)
  ]
  assert (scores[0] != scores[1]).any()
  np.testing.assert_array_equal(scores[0], scores[2])


def test_a_shift_norm_multiplies_by_powers_of_two():
  config = dataclasses.replace(SMALL, norm='shift', epsilon=0.0)
  params = {'scale': jnp.array([0.7]), 'bias': jnp.array([0.25])}
  moments = networks.Moments(jnp.array([1.0]), jnp.array([1 / 9]))
  y = jnp.array([[2.0]])
  # 1 / sqrt(1/9) = 3, to 4 (log2 3 = 1.58); 0.7 to 0.5 (log2 = -0.51).
  z = networks.normalized(config, 1, params, y, moments)
  np.testing.assert_allclose(z, [[(2 - 1) * 4 * 0.5 + 0.25]], rtol=1e-6)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'weights': 'int8'}, "weights must be one of float, .* got 'int8'"),
    ({'estimator': 'none'}, 'estimator must be one of'),
    ({'convolutions': ((4, True), (4, True), (4, True))}, 'cannot be halved'),
    ({'dropout': (0.0, 1.0)}, r'dropout must be in \[0, 1\)'),
  ],
)
def test_impossible_networks(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(SMALL, **change)


def test_images_of_another_size_or_type():
  params = _init(SMALL, jax.random.key(0))
  for wrong in (PIXELS[:, :3], PIXELS.astype(np.float32)):
    with pytest.raises(
      ValueError, match=r'pixels must be uint8 \[B, 4, 4, 1\]'
    ):
      networks.apply(SMALL, params, wrong)
