"""Rotary positions against complex numbers and the formulas of the papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.models import config as config_lib
from efficiency_jax.models import rope


def test_a_pair_is_turned_by_its_angle():
  x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
  positions = jnp.asarray([[0, 1, 2, 3, 4], [100, 7, 9, 1000, 0]])
  turn = rope.rotation(positions, rope.frequencies(8, 100.0))
  got = np.asarray(rope.rotate(x, turn))
  for i in range(4):
    pair = np.asarray(x[..., i]) + 1j * np.asarray(x[..., i + 4])
    angle = np.asarray(positions)[..., None] * 100.0 ** (-2 * i / 8)
    turned = pair * np.exp(1j * angle)
    np.testing.assert_allclose(got[..., i], turned.real, atol=3e-4)
    np.testing.assert_allclose(got[..., i + 4], turned.imag, atol=3e-4)
  assert rope.rotate(x.astype(jnp.bfloat16), turn).dtype == jnp.bfloat16


def test_scores_depend_on_the_distance_alone():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  inverse = rope.frequencies(8, 10_000.0)

  def score(at, behind):
    turn = lambda p: rope.rotation(jnp.asarray([[p]]), inverse)
    return float(
      (rope.rotate(q, turn(at)) * rope.rotate(k, turn(behind))).sum()
    )

  np.testing.assert_allclose(score(9, 4), score(25, 20), rtol=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_linear_scaling_divides():
  scaling = config_lib.RopeScaling(kind='linear', factor=8.0)
  np.testing.assert_allclose(
    rope.frequencies(16, 1e4, scaling), rope.frequencies(16, 1e4) / 8, rtol=1e-6
  )


def test_llama3_scaling_is_the_formula_of_its_release():
  scaling = config_lib.RopeScaling(
    kind='llama3',
    factor=32.0,
    low_frequency_factor=1.0,
    high_frequency_factor=4.0,
    original_context=8192,
  )
  got = rope.frequencies(64, 500_000.0, scaling)
  kinds = set()
  for i, value in enumerate(got):
    frequency = 500_000.0 ** (-2 * i / 64)
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
      kind, expected = 'kept', frequency
    elif wavelength > 8192 / 1:
      kind, expected = 'divided', frequency / 32
    else:
      smooth = (8192 / wavelength - 1) / (4 - 1)
      kind = 'blended'
      expected = (1 - smooth) * frequency / 32 + smooth * frequency
    kinds.add(kind)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert kinds == {'kept', 'divided', 'blended'}
