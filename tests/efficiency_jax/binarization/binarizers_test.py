"""Binarizers: values, pseudo-gradients against their formulas, frequencies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.binarization import binarizers

X = np.linspace(-2, 2, 81, dtype=np.float32)  # has -1, 0, 1 exactly
SIGN = np.where(X >= 0, 1, -1)
CLIP = (np.abs(X) <= 1).astype(np.float32)


def _swish(x, beta=5.0):
  """What `swish_sign` pretends to be (its docstring)."""
  s = jax.nn.sigmoid(beta * x)
  return 2 * s * (1 + beta * x * (1 - s)) - 1


CASES = {
  'sign': (binarizers.sign, SIGN, CLIP),
  'unclipped': (binarizers.sign_unclipped, SIGN, np.ones_like(X)),
  'approx': (binarizers.approx_sign, SIGN, np.maximum(0, 2 - 2 * np.abs(X))),
  # Differentiating the surrogate itself, and not a formula of its slope.
  'swish': (binarizers.swish_sign, SIGN, jax.vmap(jax.grad(_swish))(X)),
  'ternary': (
    functools.partial(binarizers.ternary, threshold=0.5),
    np.where(X > 0.5, 1, np.where(X < -0.5, -1, 0)),
    CLIP,
  ),
  'dorefa 2': (
    functools.partial(binarizers.dorefa, bits=2),
    np.round(3 * np.clip(X, 0, 1)) / 3,
    ((X >= 0) & (X <= 1)).astype(np.float32),
  ),
}


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('jit', [False, True])
def test_values_and_pseudo_gradients(name, jit):
  function, values, slopes = CASES[name]
  gradient = np.random.default_rng(0).normal(size=X.shape).astype(np.float32)

  def both(x):
    y, pull = jax.vjp(function, x)
    return y, pull(jnp.asarray(gradient))[0]

  y, pulled = (jax.jit(both) if jit else both)(jnp.asarray(X))
  np.testing.assert_allclose(y, values, atol=1e-6)
  np.testing.assert_allclose(pulled, gradient * slopes, atol=2e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
  x = jnp.asarray([-0.5, 0.0, 0.5], dtype)
  for function, *_ in CASES.values():
    y, pull = jax.vjp(function, x)
    assert y.dtype == dtype
    assert pull(y)[0].dtype == dtype
  y, pull = jax.vjp(
    lambda x: binarizers.stochastic_sign(x, jax.random.key(0)), x
  )
  assert y.dtype == dtype
  assert pull(y)[0].dtype == dtype


def test_zero_of_either_sign_is_plus_one():
  zeros = jnp.array([0.0, -0.0])
  np.testing.assert_array_equal(binarizers.sign(zeros), [1, 1])


def test_far_from_the_step_swish_is_finite():
  far = jnp.array([-1e4, 1e4])
  slopes = jax.vmap(jax.grad(binarizers.swish_sign))(far)
  np.testing.assert_array_equal(slopes, [0, 0])


def test_the_threshold_of_ternary_is_a_share_of_the_mean_and_constant():
  x = jnp.array([0.1, -0.6, 0.5, 0.8])  # mean 0.5, so 0.35
  np.testing.assert_array_equal(binarizers.ternary(x), [0, -1, 1, 1])
  slopes = jax.grad(lambda x: (binarizers.ternary(x) * x.shape[0]).sum())(x)
  np.testing.assert_array_equal(slopes, [4, 4, 4, 4])


def test_a_drawn_sign_is_plus_one_as_often_as_it_should():
  count = 200_000
  for x, p in ((-1.0, 0), (-0.5, 0.25), (0.0, 0.5), (0.9, 0.95), (1.0, 1)):
    drawn = binarizers.stochastic_sign(
      jnp.full(count, x), jax.random.key(int(10 * x) + 20)
    )
    share = float((drawn > 0).mean())
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(share - p) <= 4 * deviation
    assert set(np.unique(drawn)) <= {-1, 1}


def test_a_key_draws_the_same_and_another_otherwise():
  x = jnp.zeros(1000)
  draw = lambda seed: np.asarray(
    binarizers.stochastic_sign(x, jax.random.key(seed))
  )
  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()


def test_a_drawn_sign_has_the_clipped_pseudo_gradient():
  key = jax.random.key(0)
  x = jnp.asarray(X)
  slopes = jax.grad(lambda x: binarizers.stochastic_sign(x, key).sum())(x)
  np.testing.assert_array_equal(slopes, CLIP)


def test_bits_out_of_range():
  with pytest.raises(ValueError, match='bits must be in 1..16, got 0'):
    binarizers.dorefa(jnp.zeros(1), 0)
