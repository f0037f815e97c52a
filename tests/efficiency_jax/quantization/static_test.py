"""Static scales are those of calibration, and clip."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax import linear
from efficiency_jax.quantization import calibration
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.static import Static

pytestmark = pytest.mark.short

_W8A8 = Integers(activation=leaves.Activation())


def _problem():
  rng = np.random.default_rng(0)
  w, x = rng.standard_normal((64, 32)), rng.standard_normal((400, 64))
  return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


def test_static_keeps_the_scale_of_its_mode():
  w, x = _problem()
  inputs = calibration.inputs(x)
  for mode in ('absmax', 'percentile', 'moving average', 'mse'):
    q = Static(mode=mode)(w, inputs)
    assert q.x_scale == calibration.activation_scale(inputs, mode)
  # Static as dynamic where the text is the calibration text.
  dynamic = dataclasses.replace(
    _W8A8, activation=leaves.Activation(per='tensor')
  )(w)
  static = Static()(w, inputs)
  np.testing.assert_allclose(
    jax.jit(linear.linear)(x, static),
    linear.linear(x, dynamic),
    rtol=1e-4,
    atol=1e-3,
  )


def test_rows_beyond_the_calibration_text_are_clipped():
  w, x = _problem()
  q = Static()(w, calibration.inputs(x))
  far = linear.linear(1000 * x[:1], q)
  at_most = 127 * q.x_scale * jnp.abs(leaves.dequantize(q)).sum(0)
  assert (jnp.abs(far[0]) <= at_most * (1 + 1e-5)).all()


def test_a_scale_a_row_cannot_be_static():
  with pytest.raises(ValueError, match='one scale of x'):
    Static(integers=_W8A8)
