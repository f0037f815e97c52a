"""Ternary weights: values, bits, and a decoder that is trained with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax import leaves
from efficiency_jax import linear
from efficiency_jax.binarization import ternary
from efficiency_jax.evaluation import scoring
from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from efficiency_jax.quantization import qat


def test_weights_are_rounded_by_their_mean_size():
  w = jnp.array([[0.1, -2.0], [1.5, 0.4]] * 4)  # mean |w| is 1
  q = ternary.Ternary()(w)
  np.testing.assert_array_equal(
    leaves.dequantize(leaves.check(q)), [[0, -1], [1, 0]] * 4
  )
  # Half rounds to even, which is 0.
  again = ternary.Ternary()(jnp.array([[0.5], [1.5]] * 4))
  np.testing.assert_array_equal(
    leaves.dequantize(again)[:2, 0], np.array([0, 1], np.float32)
  )


def test_two_bits_a_weight():
  q = ternary.Ternary()(jax.random.normal(jax.random.key(0), (64, 96)))
  assert q.values.nbytes == 64 * 96 * 2 / 8
  assert q.num_bytes == q.values.nbytes + 4


def test_zeros_stay_zeros():
  q = ternary.Ternary()(jnp.zeros((8, 3)))
  np.testing.assert_array_equal(leaves.dequantize(q), 0)


def test_rows_that_do_not_fill_bytes():
  with pytest.raises(ValueError, match='7 rows do not fill bytes'):
    ternary.Ternary()(jnp.ones((7, 3)))


def test_a_product_is_one_of_integers():
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
  x = jnp.asarray(rng.normal(size=(5, 64)), jnp.float32)
  q = ternary.Ternary()(w)
  scale = np.abs(np.asarray(x)).max(1, keepdims=True) / 127
  rows = np.round(np.asarray(x) / scale)
  signs = np.clip(np.round(np.asarray(w) / np.abs(w).mean()), -1, 1)
  expected = rows @ signs * scale * float(np.abs(w).mean())
  np.testing.assert_allclose(
    linear.linear(x, q), expected, rtol=2e-5, atol=1e-5
  )


@pytest.mark.slow
def test_a_decoder_learns_with_ternary_weights_and_is_frozen_as_trained():
  lm = untrained.language_model()
  params = qat.prepare(lm.params, [('kernel$', ternary.Ternary())])
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
  assert kernel.bits == 2
  values = set(np.unique(leaves.integers(kernel)))
  assert values <= {-1, 0, 1}
  run = jax.jit(transformer.apply_fn(lm.config))
  np.testing.assert_allclose(
    run(frozen, tokens)[0].logits, run(params, tokens)[0].logits, atol=1e-3
  )
