"""BitNet weights: values, bits, and a decoder that is trained with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax import leaves
from efficiency_jax import linear
from efficiency_jax.binarization import bitnet
from efficiency_jax.evaluation import scoring
from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from efficiency_jax.quantization import qat


def test_weights_are_rounded_by_their_mean_size():
  w = jnp.array([[0.1, -2.0], [1.5, 0.4]] * 4)  # mean |w| is 1
  q = bitnet.Ternary()(w)
  np.testing.assert_array_equal(
    leaves.dequantize(leaves.check(q)), [[0, -1], [1, 0]] * 4
  )
  # Half rounds to even, which is 0.
  again = bitnet.Ternary()(jnp.array([[0.5], [1.5]] * 4))
  np.testing.assert_array_equal(
    leaves.dequantize(again)[:2, 0], np.array([0, 1], np.float32)
  )


def test_signs_are_those_around_the_mean():
  w = jnp.array([[0.0, -2.0], [3.0, 1.0]] * 4)  # mean 0.5, mean |w| 1.5
  q = bitnet.Binary()(w)
  np.testing.assert_array_equal(
    leaves.dequantize(leaves.check(q)), [[-1.5, -1.5], [1.5, 1.5]] * 4
  )
  # What is the mean itself is +1.
  np.testing.assert_array_equal(
    leaves.integers(bitnet.Binary()(jnp.full((8, 2), -3.0))), 1
  )


@pytest.mark.parametrize(
  ('method', 'bits'), [(bitnet.Binary(), 1), (bitnet.Ternary(), 2)]
)
def test_so_many_bits_a_weight(method, bits):
  q = method(jax.random.normal(jax.random.key(0), (64, 96)))
  assert q.values.nbytes == 64 * 96 * bits / 8
  assert q.num_bytes == q.values.nbytes + 4


@pytest.mark.parametrize('method', [bitnet.Binary(), bitnet.Ternary()])
def test_zeros_stay_zeros(method):
  q = method(jnp.zeros((8, 3)))
  np.testing.assert_array_equal(leaves.dequantize(q), 0)


def test_rows_that_do_not_fill_bytes():
  with pytest.raises(ValueError, match='7 rows do not fill bytes'):
    bitnet.Ternary()(jnp.ones((7, 3)))


@pytest.mark.parametrize('method', [bitnet.Binary(), bitnet.Ternary()])
def test_a_product_is_one_of_integers(method):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(64, 32)).astype(np.float32)
  x = rng.normal(size=(5, 64)).astype(np.float32)
  size = np.abs(w).mean()
  codes = {
    'binary': np.where(w >= w.mean(), 1, -1),
    'ternary': np.clip(np.round(w / size), -1, 1),
  }[method.name]
  scale = np.abs(x).max(1, keepdims=True) / 127
  expected = np.round(x / scale) @ codes * scale * size
  np.testing.assert_allclose(
    linear.linear(jnp.asarray(x), method(jnp.asarray(w))),
    expected,
    rtol=2e-5,
    atol=1e-5,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('method', 'allowed'),
  [(bitnet.Binary(), {-1, 1}), (bitnet.Ternary(), {-1, 0, 1})],
)
def test_a_decoder_learns_and_is_frozen_as_trained(method, allowed):
  lm = untrained.language_model()
  params = qat.prepare(lm.params, [('kernel$', method)])
  tokens = np.array([lm.tokenizer.encode('abcdefgh' * 8)] * 4, np.int32)
  apply, head = scoring.functions(lm)
  loss = functools.partial(scoring.token_losses, apply, head)
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(params, state):
    value, slope = jax.value_and_grad(lambda p: loss(p, tokens).mean())(params)
    updates, state = optimizer.update(slope, state, params)
    return optax.apply_updates(params, updates), state, value

  state, history = optimizer.init(params), []
  for _ in range(40):
    params, state, value = step(params, state)
    history.append(float(value))
  assert history[-1] < history[0] / 4
  frozen = qat.freeze(params)
  kernel = frozen['layers_0']['ffn']['down']['kernel']
  assert kernel.bits == {2: 1, 3: 2}[len(allowed)]
  assert set(np.unique(leaves.integers(kernel)).tolist()) <= allowed
  run = jax.jit(transformer.apply_fn(lm.config))
  # Where floats differ in their last bits, a rounding of an activation can turn
  # the other way: a step of 1 / 127 of it.
  np.testing.assert_allclose(
    run(frozen, tokens)[0].logits, run(params, tokens)[0].logits, atol=2e-2
  )
