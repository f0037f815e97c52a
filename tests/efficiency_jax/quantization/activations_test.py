"""Integers that multiply integers, with the weights that they were."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax import linear
from efficiency_jax.quantization import activations
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.codebooks import Codes

pytestmark = pytest.mark.short

_MATRIX = jax.random.normal(jax.random.key(0), (64, 64))


def _counting() -> leaves.QTensor:
  """A weight as Q4_1 stores it: codes 0 .. 15, a scale and a minimum."""
  q = Integers(bits=4, per=32, symmetric=False, scale_dtype=jnp.float16)(
    _MATRIX
  )
  codes = leaves.integers(q) + 8
  return dataclasses.replace(
    q,
    values=leaves.pack(codes, 4),
    offsets=(q.offsets - 8 * q.scales).astype(jnp.float16),
    codebook=jnp.arange(16.0),
  )


def test_weights_stay_what_they_are():
  given = {'a': Integers(bits=4, per=32)(_MATRIX), 'b': _counting()}
  changed = activations.in_integers(given)
  for name, before in given.items():
    after = changed[name]
    assert after.activation == leaves.Activation()
    assert after.codebook is None
    np.testing.assert_allclose(
      leaves.dequantize(after), leaves.dequantize(before), rtol=0, atol=2e-6
    )
  x = jax.random.normal(jax.random.key(1), (3, 64))
  q_x, s_x = linear.quantized_activations(x, leaves.Activation())
  rounded = np.asarray(q_x) * np.asarray(s_x)[:, None]
  np.testing.assert_allclose(
    linear.linear(x, changed['b']),
    rounded @ np.asarray(leaves.dequantize(given['b'])),
    atol=1e-4,
  )


def test_others_stay_as_they_are():
  norm = jnp.ones(3)
  given = {'nf4': Codes()(_MATRIX), 'int': Integers()(_MATRIX), 'norm': norm}
  changed = activations.in_integers(given)
  assert changed['nf4'] is given['nf4']
  assert changed['norm'] is norm
  assert changed['int'].activation is not None


def test_a_model_without_integers_is_refused():
  with pytest.raises(ValueError, match='no weight is stored as integers'):
    activations.in_integers({'kernel': _MATRIX, 'nf4': Codes()(_MATRIX)})
