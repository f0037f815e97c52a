"""GPTQ: a larger error of the weight, a smaller one of the product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax.quantization import calibration
from efficiency_jax.quantization import rules
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.gptq import Gptq

pytestmark = pytest.mark.short


_dequantize = jax.jit(leaves.dequantize)
_inputs = jax.jit(calibration.inputs)


@functools.cache
def _problem(rows=192, columns=24):
  """A weight, and correlated rows that it multiplies."""
  rng = np.random.default_rng(0)
  mix = rng.standard_normal((rows, rows)) / np.sqrt(rows)
  x = rng.standard_normal((1000, rows)) @ (mix + 0.3 * mix[:, :1])
  w = rng.standard_normal((rows, columns))
  return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize('bits', [3, 4])
@pytest.mark.parametrize('per', ['channel', 32, 192, 64])
@pytest.mark.parametrize('symmetric', [True, False])
def test_the_product_gains_what_the_weight_loses(bits, per, symmetric):
  w, x = _problem()
  how = Integers(bits=bits, per=per, symmetric=symmetric)
  plain = _dequantize(jax.jit(how.__call__)(w))
  tuned = _dequantize(Gptq(integers=how)(w, _inputs(x)))
  w, x, plain, tuned = map(np.asarray, (w, x, plain, tuned))
  weight_error = lambda v: np.square(v - w).mean()
  output_error = lambda v: np.square(x @ (v - w)).mean()
  assert weight_error(tuned) > weight_error(plain)
  assert output_error(tuned) < 0.8 * output_error(plain)


def test_it_is_the_greedy_least_squares_solution():
  """Row by row: after row k is fixed, the others solve what is left exactly."""
  w, x = _problem(rows=8, columns=3)
  how = Integers(bits=3)
  damping = 1e-6
  got = _dequantize(Gptq(integers=how, damping=damping)(w, _inputs(x)))
  gram = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
  gram[np.diag_indices(8)] += damping * np.mean(np.diag(gram))
  scales = np.asarray(how(w).scales, np.float64)[0]
  left, fixed = np.array(w, np.float64), np.zeros((8, 3))
  target = np.array(w, np.float64)
  for k in range(8):
    fixed[k] = np.clip(np.round(left[k] / scales), -3, 3) * scales
    # min over the later rows of |x (W - fixed - later)|^2
    lost = gram[k + 1 :, : k + 1] @ (target - fixed)[: k + 1]
    rest = gram[k + 1 :, k + 1 :]
    left[k + 1 :] = target[k + 1 :] + np.linalg.solve(rest, lost)
  np.testing.assert_allclose(got, fixed, rtol=1e-4, atol=1e-4)


def test_inputs_that_do_not_correlate_leave_plain_rounding():
  w, _ = _problem(rows=64)
  how = Integers(bits=4, per=32)
  gram = _inputs(jnp.eye(64))
  np.testing.assert_array_equal(
    _dequantize(Gptq(integers=how)(w, gram)), _dequantize(how(w))
  )


def test_calibration_changes_the_answer():
  """A hook that never fires would leave plain rounding, unnoticed."""
  w, x = _problem()
  how = Gptq(integers=Integers(bits=4, per=32))
  one = how(w, _inputs(x))
  other = how(w, _inputs(x[:, ::-1]))
  one, other = np.asarray(one.values), np.asarray(other.values)
  assert (one != other).mean() > 0.05


def test_rows_that_nothing_reaches_are_zero():
  w, x = _problem()
  q = Gptq(integers=Integers(bits=4, per=32))(w, _inputs(x.at[:, 5].set(0)))
  np.testing.assert_array_equal(np.asarray(_dequantize(q))[5], 0)


def test_it_is_a_method_of_rules():
  w, x = _problem()
  how = Gptq(integers=Integers(bits=4, per=32))
  given = {'down/kernel': _inputs(x)}
  params, report = rules.quantize(
    {'down': {'kernel': w}}, [('kernel', how)], given
  )
  assert report.leaves[0].method == 'GPTQ, W4 absmax, group 32'
  assert params['down']['kernel'].bits_per_weight == 5
  y = jax.jit(lambda x, q: x @ leaves.dequantize(q))(
    x, params['down']['kernel']
  )
  assert np.isfinite(y).all()


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'integers': Integers(per='tensor')}, "per 'channel' or group"),
    ({'integers': Integers(), 'damping': 0.0}, 'damping must be > 0'),
  ],
)
def test_options_that_cannot_work_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Gptq(**options)
