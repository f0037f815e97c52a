"""Optimizers of latent weights: bounds, scales, flips, powers of two."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax.binarization import latent


def _step(transformation, params, updates):
  state = transformation.init(params)
  new, _ = transformation.update(updates, state, params)
  return optax.apply_updates(params, new)


def test_matrices_stay_within_the_bound_to_the_last_bit():
  rng = np.random.default_rng(0)
  params = {'w': jnp.asarray(rng.uniform(-1, 1, (400, 500)), jnp.float32)}
  updates = {'w': jnp.asarray(3 * rng.normal(size=(400, 500)), jnp.float32)}
  moved = _step(latent.clip(), params, updates)['w']
  assert float(jnp.abs(moved).max()) <= 1.0
  expected = np.clip(params['w'] + updates['w'], -1, 1)
  np.testing.assert_allclose(moved, expected, atol=3e-7)
  assert (np.abs(expected) == 1).mean() > 0.5


def test_vectors_are_not_clipped():
  moved = _step(latent.clip(), {'b': jnp.ones(3)}, {'b': jnp.ones(3)})
  np.testing.assert_array_equal(moved['b'], [2, 2, 2])


def test_updates_are_scaled_by_fans():
  updates = {
    'dense': jnp.ones((784, 1024)),
    'conv': jnp.ones((3, 3, 16, 32)),
    'b': jnp.ones(5),
  }
  scaled, _ = latent.scale_by_fans().update(updates, optax.EmptyState())
  # One over sqrt(1.5 / (fan_in + fan_out)).
  np.testing.assert_allclose(
    scaled['dense'], 1 / np.sqrt(1.5 / (784 + 1024)), rtol=1e-6
  )
  np.testing.assert_allclose(
    scaled['conv'], 1 / np.sqrt(1.5 / (9 * 16 + 9 * 32)), rtol=1e-6
  )
  np.testing.assert_array_equal(scaled['b'], 1)
  rounded, _ = latent.scale_by_fans(rounded=True).update(
    updates, optax.EmptyState()
  )
  np.testing.assert_array_equal(rounded['dense'], 32)  # of 34.7


def test_bop_turns_what_gradients_keep_pushing_against():
  params = {'w': jnp.array([[1.0, 1.0, -1.0, -1.0]]), 'b': jnp.ones(1)}
  gradient = {'w': jnp.array([[0.5, -0.5, 0.5, -0.5]]), 'b': jnp.ones(1)}
  bop = latent.bop(threshold=0.12, decay=0.1)
  state = bop.init(params)
  seen = []
  for _ in range(4):
    updates, state = bop.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(np.asarray(params['w'][0]))
  # m is 0.05, 0.095, 0.1355, ... of sign(g): past the threshold in step 3, and
  # then sign(m) is no longer sign(w).
  np.testing.assert_array_equal(seen[1], [1, 1, -1, -1])
  np.testing.assert_array_equal(seen[2], [-1, 1, -1, 1])
  np.testing.assert_array_equal(seen[3], [-1, 1, -1, 1])
  np.testing.assert_array_equal(params['b'], 1)


def test_powers_of_two():
  x = jnp.array([0.0, 1.0, -1.0, 1.4, 1.5, -3.0, 0.3, 2.0**-20, 100.0])
  np.testing.assert_array_equal(
    latent.power_of_two(x), [0, 1, -1, 1, 2, -4, 0.25, 2.0**-20, 128]
  )


def test_shift_adamax_is_adamax_within_a_power_of_two_each():
  rng = np.random.default_rng(0)
  params = {'w': jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)}
  rate, b1, b2 = 2.0**-10, 1 - 2.0**-3, 1 - 2.0**-10
  ours = latent.shift_adamax()
  theirs = optax.chain(
    optax.scale_by_adamax(b1, b2, eps=0.0), optax.scale(-rate)
  )
  states = ours.init(params), theirs.init(params)
  for _ in range(5):
    g = {'w': jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)}
    mine, first = ours.update(g, states[0], params)
    other, second = theirs.update(g, states[1], params)
    states = first, second
    ratio = np.asarray(mine['w'] / other['w'])
    assert (ratio >= 0.5).all()
    assert (ratio <= 2).all()
  exact = np.log2(np.asarray(mine['w'] / -first.mean['w']))
  np.testing.assert_array_equal(exact, np.round(exact))


def test_shift_adamax_without_gradients_does_not_move():
  params = {'w': jnp.ones((2, 2))}
  updates, state = latent.shift_adamax().update(
    jax.tree.map(jnp.zeros_like, params),
    latent.shift_adamax().init(params),
  )
  np.testing.assert_array_equal(updates['w'], 0)
  chex.assert_tree_all_finite(state)


@pytest.mark.parametrize('make', [latent.clip, latent.bop])
def test_the_parameters_are_needed(make):
  transformation = make()
  state = transformation.init({'w': jnp.ones((1, 1))})
  with pytest.raises(ValueError, match='pass them to update'):
    transformation.update({'w': jnp.ones((1, 1))}, state)
