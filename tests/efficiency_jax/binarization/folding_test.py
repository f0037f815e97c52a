"""Folded networks predict what networks predict, ties and all."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.binarization import folding
from efficiency_jax.binarization import networks

DENSE = networks.Config(image=(5, 7, 1), hidden=(33, 20), classes=4)
# A convolution before, at and after a maximum, and one that begins with it.
CONV = networks.Config(
  image=(8, 8, 3),
  convolutions=((9, True), (16, False), (6, True)),
  hidden=(24,),
  classes=5,
)


_init = jax.jit(networks.init, static_argnums=0)


def _trained(config, seed=0):
  """Parameters as training may leave them: scales of both signs and zero."""
  rng = np.random.default_rng(seed)
  params = _init(config, jax.random.key(seed))
  for layer in params.values():
    size = layer['scale'].shape
    scale = rng.normal(size=size)
    scale[0] = 0.0
    layer['scale'] = jnp.asarray(scale, jnp.float32)
    layer['bias'] = jnp.asarray(rng.normal(size=size), jnp.float32)
  pixels = rng.integers(0, 256, (64, *config.image)).astype(np.uint8)
  found = networks.statistics(config, params, [pixels[:32], pixels[32:]])
  return params, found, pixels


@pytest.mark.parametrize(
  ('config', 'norm'),
  [
    *((DENSE, norm) for norm in networks.NORMS),
    (CONV, 'batch'),
    pytest.param(CONV, 'shift', marks=pytest.mark.slow),
    pytest.param(CONV, 'none', marks=pytest.mark.slow),
  ],
)
def test_scores_are_those_of_the_network(config, norm):
  config = dataclasses.replace(config, norm=norm)
  params, found, pixels = _trained(config)
  folded = folding.fold(config, params, found)
  expected = networks.apply(config, params, pixels, found).scores
  actual = folding.apply(config, folded, pixels)
  chex.assert_shape(actual, (64, config.classes))
  np.testing.assert_array_equal(actual, expected)


def test_every_whole_number_falls_on_its_side():
  config = networks.Config(image=(1, 9, 1), hidden=(60,), classes=2)
  params, found, _ = _trained(config)
  z = lambda y: folding._z(config, 0, params['layer_0'], found['layer_0'], y)
  threshold, flip = folding._threshold(z, 300, 60)
  y = jnp.arange(-300, 301)[:, None]
  np.testing.assert_array_equal((y >= threshold) ^ flip, z(y) >= 0)
  assert flip.any()
  assert not flip.all()


def test_a_tie_is_plus_one_on_either_slope():
  # z = gamma y exactly: the mean is 0, the variance makes the root 1.
  moments = networks.Moments(jnp.zeros(2), jnp.full(2, 1.0))
  config = dataclasses.replace(DENSE, epsilon=0.0)
  params = {'scale': jnp.array([1.0, -1.0]), 'bias': jnp.zeros(2)}
  z = lambda y: folding._z(config, 1, params, moments, y)
  threshold, flip = folding._threshold(z, 5, 2)
  np.testing.assert_array_equal(threshold, [0, 1])
  np.testing.assert_array_equal(flip, [False, True])
  at = lambda y: np.asarray((y >= threshold) ^ flip)
  np.testing.assert_array_equal(at(0), [True, True])
  np.testing.assert_array_equal(at(1), [True, False])
  np.testing.assert_array_equal(at(-1), [False, True])


def test_weights_take_a_bit():
  config = networks.Config(image=(8, 8, 1), hidden=(64, 64))
  params, found, _ = _trained(config)
  folded = folding.fold(config, params, found)
  weights = sum(int(np.prod(shape)) for shape in config.kernels)
  assert sum(layer.words.nbytes for layer in folded.layers) == weights / 8


def test_a_network_of_real_numbers_is_refused():
  params = _init(DENSE, jax.random.key(0))
  for change in (
    {'weights': 'float'},
    {'weights': 'ternary'},
    {'weights': 'stochastic'},
    {'activations': 'relu'},
    {'real_ends': True},
  ):
    config = dataclasses.replace(DENSE, **change)
    with pytest.raises(ValueError, match='only a network of signs'):
      folding.fold(config, params, {})


def test_images_of_another_size_or_type():
  params, found, pixels = _trained(DENSE)
  folded = folding.fold(DENSE, params, found)
  for wrong in (
    pixels.astype(np.int32) + 256,
    pixels.astype(np.float32),
    pixels[:, :, :-1],
  ):
    with pytest.raises(ValueError, match=r'uint8 \[B, 5, 7, 1\]'):
      folding.apply(DENSE, folded, wrong)
