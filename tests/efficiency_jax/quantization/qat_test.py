"""Training sees the integers that inference computes with."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax import leaves
from efficiency_jax import linear
from efficiency_jax.models import transformer
from efficiency_jax.quantization import calibration
from efficiency_jax.quantization import qat
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.gptq import Gptq
from tests import fixtures

pytestmark = pytest.mark.short

_CONFIG = fixtures.config(width=32, ffn_width=64, head_dim=8)
_PARAMS = fixtures.params(_CONFIG)
_W4A8 = Integers(bits=4, activation=leaves.Activation())
_STATIC = Integers(bits=8, activation=leaves.Activation(bits=4, per='tensor'))


_linear = jax.jit(linear.linear)


def _normal(seed, *shape):
  return np.float32(np.random.default_rng(seed).standard_normal(shape))


def _kernel(method, x_scale=None):
  weight = jnp.asarray(_normal(0, 32, 16))
  return leaves.FakeTensor(weight=weight, x_scale=x_scale, method=method)


@pytest.mark.parametrize('method', [_W4A8, _STATIC, Integers(bits=3, per=8)])
@pytest.mark.parametrize('learnt', [False, True])
def test_frozen_integers_are_those_of_training_to_the_last_bit(method, learnt):
  scale = jnp.float32(0.13) if learnt and method.activation else None
  fake = _kernel(method, scale)
  x = _normal(1, 5, 32)
  frozen = qat.freeze({'kernel': fake})['kernel']
  trained = _linear(x, fake)
  np.testing.assert_allclose(_linear(x, frozen), trained, rtol=1e-5, atol=1e-5)
  if method.activation is None or method.per != 'channel':
    return
  q_x, s_x = linear.quantized_activations(x, method.activation, scale)
  exact = np.asarray(q_x, np.int64) @ np.asarray(leaves.integers(frozen))
  scales = np.asarray(s_x)[:, None] * np.asarray(frozen.scales)
  np.testing.assert_array_equal(np.round(trained / scales), exact)


def test_gradients_pass_through_the_rounding_of_weights():
  fake = _kernel(Integers(bits=2))
  x = _normal(1, 5, 32)
  pull = _normal(2, 5, 16)
  loss = lambda fake: jnp.sum(linear.linear(x, fake) * pull)
  grad = jax.jit(jax.grad(loss))(fake)
  np.testing.assert_allclose(grad.weight, x.T @ pull, rtol=1e-4, atol=1e-5)


def test_gradients_of_activations_stop_where_they_are_clipped():
  how = leaves.Activation(bits=4, per='tensor')
  x = jnp.array([[0.3, -5.0, 0.68, 2.0]])
  grad = jax.grad(lambda x: linear.fake_quantized(x, how, 0.1).sum())(x)
  # The bound is 7 x 0.1.
  np.testing.assert_array_equal(grad, [[1, 0, 1, 0]])


def test_the_gradient_of_a_learnt_scale_is_that_of_lsq():
  how = leaves.Activation(bits=4, per='tensor')
  x = np.array([0.33, -5.0, 0.68, 2.0], np.float32)
  s = 0.1
  grad = jax.grad(
    lambda s: linear.fake_quantized(jnp.asarray(x)[None], how, s).sum()
  )(s)
  v = x / s
  inside = np.round(v) - v
  expected = np.where(v < -7, -7, np.where(v > 7, 7, inside)).sum()
  np.testing.assert_allclose(grad, expected, rtol=1e-4)


def _loss(params, tokens):
  output, _ = transformer.apply_fn(_CONFIG)(params, tokens)
  return optax.softmax_cross_entropy_with_integer_labels(
    output.logits[:, :-1], tokens[:, 1:]
  ).mean()


@pytest.mark.slow
def test_training_recovers_what_rounding_lost():
  """A model is fitted to a text, rounded to 2 bits, and trained on."""
  rule = [('(kernel|table)$', Integers(bits=2))]
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 12)))
  step = jax.jit(lambda params, state: _step(params, state, tokens, optimizer))
  optimizer = optax.adam(1e-2)
  params, state = _PARAMS, optimizer.init(_PARAMS)
  for _ in range(60):
    params, state, _ = step(params, state)
  rounded = _loss(qat.prepare(params, rule), tokens)
  trained = qat.prepare(params, rule)
  state = optimizer.init(trained)
  for _ in range(60):
    trained, state, _ = step(trained, state)
  after = _loss(qat.freeze(trained), tokens)
  assert after < 0.5 * rounded
  assert isinstance(
    trained['layers_0']['ffn']['down']['kernel'], leaves.FakeTensor
  )


def _step(params, state, tokens, optimizer):
  value, grads = jax.value_and_grad(_loss)(params, tokens)
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state, value


def test_without_rules_that_apply_nothing_is_changed():
  params = qat.prepare(_PARAMS, [('down', _W4A8)])
  chex.assert_trees_all_equal(qat.latent(params), _PARAMS)
  chex.assert_trees_all_equal(
    params['layers_0']['attention'], _PARAMS['layers_0']['attention']
  )


def test_running_scales_move_towards_what_is_seen():
  path = 'layers_0/ffn/down/kernel'
  params = qat.prepare(
    _PARAMS, [('layers_0/ffn/down', _STATIC)], {path: jnp.float32(1.0)}
  )
  apply = transformer.apply_fn(_CONFIG)
  see = calibration.captured(apply, lambda x: jnp.abs(x).max())
  seen = jax.jit(see)(params, np.zeros((1, 4), np.int32))
  moved = qat.with_running_scales(params, seen, decay=0.9)
  scale = moved['layers_0']['ffn']['down']['kernel'].x_scale
  np.testing.assert_allclose(scale, 0.9 + 0.1 * seen[path] / 7, rtol=1e-6)


@pytest.mark.parametrize(
  ('rules', 'scales', 'message'),
  [
    ([('nothing', _W4A8)], {}, 'applies to nothing'),
    ([('down', Gptq(integers=Integers()))], {}, 'is not for training'),
    ([('down', _STATIC)], {'x': jnp.ones(())}, "x_scales has 'x'"),
  ],
)
def test_what_cannot_be_prepared_is_refused(rules, scales, message):
  with pytest.raises(ValueError, match=message):
    qat.prepare(_PARAMS, rules, scales)
