"""AWQ and SmoothQuant: exact without rounding, better with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax import linear
from efficiency_jax.quantization import calibration
from efficiency_jax.quantization import rules
from efficiency_jax.quantization import scaling
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.scaling import Awq
from efficiency_jax.quantization.scaling import SmoothQuant

pytestmark = pytest.mark.short

_W8A8 = Integers(activation=leaves.Activation())


_inputs = jax.jit(calibration.inputs)
_linear = jax.jit(linear.linear)


@functools.cache
def _problem():
  """A few features of x are thirty times as large as the others."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((400, 64))
  x[:, [3, 40]] *= 30
  w = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
  return w, jnp.asarray(x, jnp.float32)


def _error(w, x, q):
  x, w, product = map(np.asarray, (x, w, _linear(x, q)))
  return np.abs(product - x @ w).mean()


def test_awq_gives_large_inputs_finer_steps():
  w, x = _problem()
  how = Integers(bits=3, per=32)
  tuned = Awq(integers=how)(w, _inputs(x))
  assert _error(w, x, tuned) < 0.7 * _error(w, x, how(w))
  # Large features are divided by more.
  assert tuned.input_scales[3] < 0.5 * tuned.input_scales[4]


def test_awq_takes_the_best_of_its_choices():
  w, x = _problem()
  how, inputs = Integers(bits=3, per=32), _inputs(x)
  best = Awq(integers=how)(w, inputs)
  exact = np.asarray(x) @ np.asarray(w)
  squared = lambda q: np.square(np.asarray(_linear(x, q)) - exact).mean()
  sizes = inputs.sizes / inputs.rows
  for alpha in np.arange(20) / 20:
    other = scaling._scaled(w, sizes**alpha, how)
    assert squared(best) <= squared(other) * (1 + 1e-4)


def test_awq_of_equal_inputs_is_plain_rounding():
  w, _ = _problem()
  how = Integers(bits=4, per=32)
  tuned = Awq(integers=how)(w, _inputs(np.eye(64, dtype=np.float32)))
  np.testing.assert_array_equal(tuned.values, how(w).values)


def test_smoothquant_makes_activations_easier():
  w, x = _problem()
  smooth = SmoothQuant()(w, _inputs(x))
  assert _error(w, x, smooth) < 0.5 * _error(w, x, _W8A8(w))


def test_smoothquant_balances_the_ranges():
  """alpha 1/2: x / c and c W have equal largest values, feature by feature."""
  w, x = _problem()
  q = SmoothQuant()(w, _inputs(x))
  w, x = map(np.asarray, (w, x))
  of_x = np.abs(x * q.input_scales).max(0)
  of_w = np.abs(w / q.input_scales[:, None]).max(1)
  ratio = of_x / of_w
  np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


def test_an_alpha_out_of_range_is_refused():
  with pytest.raises(ValueError, match=r'alpha must be in \[0, 1\]'):
    SmoothQuant(alpha=1.5)


@pytest.mark.parametrize('path', ['a/kernel', 'a/table'])
def test_the_report_counts_input_scales_as_part_of_the_weight(path):
  w, x = _problem()
  method = SmoothQuant(integers=_W8A8)
  name, leaf = path.split('/')
  params = {name: {leaf: w.T if leaf == 'table' else w}}
  _, report = rules.quantize(params, [(path, method)], {path: _inputs(x)})
  # 8 bits lose about half a percent, whatever the scales.
  assert report.leaves[0].mean_error < 0.02
