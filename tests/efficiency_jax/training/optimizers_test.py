"""Tests of optimizers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax import trees
from efficiency_jax.training import optimizers

pytestmark = pytest.mark.short

CONFIG = optimizers.OptimizerConfig(learning_rate=0.5, steps=20, warmup_steps=4)


def test_rates_rise_over_the_warm_up_and_end_at_their_share():
  rates = [float(optimizers.learning_rate(CONFIG)(step)) for step in range(21)]
  np.testing.assert_allclose(rates[:5], [0.125, 0.25, 0.375, 0.5, 0.5])
  assert rates[4:] == sorted(rates[4:], reverse=True)
  np.testing.assert_allclose(rates[-1], 0, atol=1e-7)
  np.testing.assert_allclose(rates[12], 0.25, rtol=1e-5)  # half a cosine
  linear = dataclasses.replace(CONFIG, schedule='linear', end_share=0.1)
  np.testing.assert_allclose(
    optimizers.learning_rate(linear)(20), 0.05, rtol=1e-5
  )
  constant = dataclasses.replace(CONFIG, schedule='constant')
  assert optimizers.learning_rate(constant)(1000) == 0.5


def test_decay_spares_vectors_and_gradients_are_clipped():
  config = optimizers.OptimizerConfig(
    learning_rate=1.0, steps=2, schedule='constant', weight_decay=0.25
  )
  optimizer = optimizers.make(config)
  params = {'matrix': jnp.ones((2, 2)), 'vector': jnp.ones(2)}
  zero = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zero, optimizer.init(params), params)
  np.testing.assert_allclose(updates['matrix'], -0.25 * np.ones((2, 2)))
  np.testing.assert_allclose(updates['vector'], np.zeros(2))
  # Clipping shows in the moments: Adam's step does not see the scale.
  large = {'matrix': jnp.full((2, 2), 50.0), 'vector': jnp.zeros(2)}
  _, state = optimizer.update(large, optimizer.init(params), params)
  np.testing.assert_allclose(state[1].mu['matrix'], 0.1 * 0.5, rtol=1e-5)


def test_the_state_may_wait_on_the_host():
  config = dataclasses.replace(CONFIG, state_memory='host')
  state = optimizers.make(config).init({'w': jnp.ones((2, 2))})
  arrays = [x for x in jax.tree.leaves(state) if jnp.ndim(x)]
  assert {x.sharding.memory_kind for x in arrays} == {'pinned_host'}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'learning_rate': 0.0}, 'learning_rate must be > 0, got 0.0'),
    ({'learning_rate': float('nan')}, 'learning_rate must be > 0'),
    (
      {'warmup_steps': 20},
      r'warmup_steps must be in 0..steps - 1 = 19, got 20',
    ),
    ({'schedule': 'step'}, "one of constant, cosine, linear, got 'step'"),
    ({'state_bits': 4}, 'state_bits must be 8 or 32, got 4'),
    ({'state_memory': 'disk'}, "must be 'device' or 'host', got 'disk'"),
    ({'beta2': 1.0}, r'beta2 must be in \[0, 1\), got 1.0'),
  ],
)
def test_wrong_settings_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)


@pytest.mark.parametrize('signed', [True, False])
def test_the_code_has_256_values_that_are_finer_near_zero(signed):
  code = optimizers.dynamic_code(signed=signed)
  assert code.shape == (256,)
  assert (np.diff(code) > 0).all()
  assert code.max() == 1
  assert 0 in code
  lowest = -0.993 if signed else 0.0
  assert code.min() == pytest.approx(lowest, abs=1e-3)
  positive = code[code > 0]
  # Seven decades, and the largest tenth is cut the finest relative to its size.
  assert positive.min() < 1e-6 * 6
  gaps = np.diff(positive) / positive[1:]
  assert gaps[-2] < gaps[len(gaps) // 2] < gaps[1]


def test_quantized_moments_are_the_nearest_values():
  x = jax.random.normal(jax.random.key(0), (33, 100))
  code = optimizers.dynamic_code(signed=True)
  packed = optimizers.quantize(x, code, 64)
  assert packed.codes.dtype == jnp.uint8
  back = optimizers.dequantize(packed, code, x.shape)
  flat = np.pad(np.asarray(x).ravel(), (0, -x.size % 64)).reshape(-1, 64)
  scales = np.abs(flat).max(1, keepdims=True)
  values = scales[..., None] * code
  best = np.abs(values - flat[..., None]).min(-1).ravel()[: x.size]
  error = np.abs(np.asarray(back) - np.asarray(x)).ravel()
  np.testing.assert_allclose(error, best, atol=1e-6)
  zeros = optimizers.quantize(jnp.zeros((2, 64)), code, 64)
  assert not optimizers.dequantize(zeros, code, (2, 64)).any()


def test_eight_bits_train_like_thirty_two():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(256, 96)), jnp.float32)
  y = x @ jnp.asarray(rng.normal(size=(96, 64)), jnp.float32)
  loss = lambda w: jnp.mean((x @ w - y) ** 2)
  ends = {}
  for bits in (32, 8):
    config = optimizers.OptimizerConfig(
      learning_rate=0.05, steps=150, state_bits=bits
    )
    optimizer = optimizers.make(config)
    w = jnp.zeros((96, 64))
    state = optimizer.init(w)

    @jax.jit
    def step(w, state, optimizer=optimizer):
      updates, state = optimizer.update(jax.grad(loss)(w), state, w)
      return optax.apply_updates(w, updates), state

    for _ in range(150):
      w, state = step(w, state)
    ends[bits] = float(loss(w)), trees.count_bytes(state)
  assert ends[32][0] < 0.02 * loss(jnp.zeros((96, 64)))
  assert ends[8][0] < 1.3 * ends[32][0] + 1e-3
  assert ends[8][1] < 0.27 * ends[32][1]


def test_small_arrays_keep_full_precision_and_equal_optax():
  params = {'w': jnp.ones((8, 8))}
  ours = optimizers.scale_by_adam8bit(b2=0.95)
  theirs = optax.scale_by_adam(b2=0.95)
  a, b = ours.init(params), theirs.init(params)
  for seed in range(3):
    g = {'w': jax.random.normal(jax.random.key(seed), (8, 8))}
    mine, a = ours.update(g, a)
    expected, b = theirs.update(g, b)
    np.testing.assert_allclose(mine['w'], expected['w'], rtol=1e-4)


def test_groups_of_parameters_have_rates_of_their_own():
  config = dataclasses.replace(CONFIG, shares={'slow': 0.25})
  params = {'slow': {'w': jnp.ones((2, 2))}, 'fast': {'w': jnp.ones((2, 2))}}
  gradient = jax.tree.map(lambda x: 0.3 * x, params)
  together = optimizers.make(dataclasses.replace(config, shares={}))
  apart = optimizers.make(config)
  a, b = together.init(params), apart.init(params)
  for _ in range(3):
    plain, a = together.update(gradient, a, params)
    scaled, b = apart.update(gradient, b, params)
    np.testing.assert_array_equal(scaled['fast']['w'], plain['fast']['w'])
    expected = 0.25 * plain['slow']['w']
    np.testing.assert_allclose(scaled['slow']['w'], expected, rtol=1e-6)
  with pytest.raises(ValueError, match=r"names \['slow'\], .* \['w'\]"):
    apart.init({'w': jnp.ones(2)})
