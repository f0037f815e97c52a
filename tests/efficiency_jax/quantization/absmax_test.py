"""Integers with scales: the lecture's example, bounds, exact cases."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax.quantization import absmax
from efficiency_jax.quantization.absmax import Integers

pytestmark = pytest.mark.short

_MATRIX = jax.random.normal(jax.random.key(0), (64, 12)) + 0.3


def test_the_example_of_the_docstring():
  assert doctest.testmod(absmax).failed == 0
  assert doctest.testmod(absmax).attempted >= 4


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize(
  ('per', 'groups'), [('channel', 1), (8, 8), ('tensor', 1)]
)
@pytest.mark.parametrize('symmetric', [True, False])
def test_no_weight_is_off_by_more_than_half_a_step(
  bits, per, groups, symmetric
):
  q = Integers(bits=bits, per=per, symmetric=symmetric)(_MATRIX)
  assert q.scales.shape == (groups, 1 if per == 'tensor' else 12)
  steps = np.broadcast_to(np.asarray(q.scales), (groups, 12))
  steps = np.repeat(steps, 64 // groups, axis=0)
  error = np.abs(np.asarray(leaves.dequantize(q)) - np.asarray(_MATRIX))
  # A zero point is rounded as well, which may clip the ends of the range.
  assert (error <= steps * (0.5 if symmetric else 1) + 1e-6).all()
  integers = np.asarray(leaves.integers(q))
  bound = 2 ** (bits - 1)
  assert integers.min() >= (-bound + 1 if symmetric else -bound)
  assert integers.max() == bound - 1


def test_the_largest_weight_of_a_group_is_exact_and_so_is_zero():
  matrix = _MATRIX.at[3].set(0.0)
  for per in ('tensor', 'channel', 16):
    for symmetric in (True, False):
      q = Integers(bits=4, per=per, symmetric=symmetric)(
        jnp.concatenate([matrix] * 1)
      )
      np.testing.assert_array_equal(leaves.dequantize(q)[3], 0.0)
  restored = np.asarray(leaves.dequantize(Integers(per='channel')(matrix)))
  largest = np.abs(np.asarray(matrix)).argmax(0)
  np.testing.assert_allclose(
    restored[largest, np.arange(12)],
    np.asarray(matrix)[largest, np.arange(12)],
    rtol=1e-6,
  )


def test_a_zero_point_serves_a_range_of_one_sign():
  """All weights positive: half of the symmetric codes would be lost."""
  matrix = jnp.abs(_MATRIX)
  error = lambda q: np.abs(leaves.dequantize(q) - matrix).mean()
  one_sided = error(Integers(bits=4, symmetric=False)(matrix))
  assert one_sided < 0.6 * error(Integers(bits=4)(matrix))


def test_values_are_chosen_for_the_scale_as_it_is_stored():
  coarse = Integers(bits=8, scale_dtype=jnp.bfloat16)(_MATRIX)
  assert coarse.scales.dtype == jnp.bfloat16
  error = np.abs(leaves.dequantize(coarse) - _MATRIX)
  steps = np.asarray(coarse.scales, np.float32)
  # All but the clipped ends, by at most 2^-8 of 127 steps.
  assert (error <= 1.01 * steps).all()
  assert (error <= 0.501 * steps).mean() > 0.95


def test_a_group_of_zeros_stays_zeros():
  q = Integers(bits=4, per=32)(jnp.zeros((64, 3)))
  np.testing.assert_array_equal(leaves.dequantize(q), 0.0)
  q = Integers(bits=4, per=32, symmetric=False)(jnp.zeros((64, 3)))
  np.testing.assert_array_equal(leaves.dequantize(q), 0.0)


def test_clipping_narrows_the_steps():
  matrix = _MATRIX.at[0, 0].set(30.0)
  clipped = Integers(bits=4, per='tensor', clip=0.2)(matrix)
  plain = Integers(bits=4, per='tensor')(matrix)
  np.testing.assert_allclose(clipped.scales, plain.scales * 0.2, rtol=1e-6)
  np.testing.assert_allclose(leaves.dequantize(clipped)[0, 0], 6.0, rtol=1e-6)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bits': 1}, r'bits must be in 2\.\.8, got 1'),
    ({'per': 0}, 'per must be'),
    ({'per': 'row'}, "'tensor', 'channel' or a number"),
    ({'clip': 0.0}, 'clip must be in'),
  ],
)
def test_options_that_do_not_exist_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Integers(**options)


@pytest.mark.parametrize(
  ('options', 'rows', 'message'),
  [
    ({'per': 7}, 64, 'groups of 7 do not divide 64'),
    ({'bits': 4}, 48, 'a multiple of 32'),
    ({'bits': 3}, 12, 'a multiple of 8'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(options, rows, message):
  with pytest.raises(ValueError, match=message):
    Integers(**options)(_MATRIX[:rows])


@pytest.mark.peers
@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('per', ['channel', 16])
def test_integers_are_those_of_qwix_for_its_scales(bits, per):
  """qwix divides by 2^(b - 1) - 0.5 and not by 2^(b - 1) - 1."""
  from qwix._src.core import qarray

  theirs = qarray.quantize(
    _MATRIX,
    qarray.HowToQuantize(
      qtype=jnp.int4 if bits == 4 else jnp.int8,
      channelwise_axes=(1,),
      tiled_axes={} if per == 'channel' else {0: per},
    ),
  )
  ours = Integers(bits=bits, per=per)(_MATRIX)
  bound = 2 ** (bits - 1) - 0.5
  ratio = (2 ** (bits - 1) - 1) / bound
  np.testing.assert_allclose(theirs.scale, ours.scales * ratio, rtol=1e-5)
  scales = np.repeat(np.asarray(theirs.scale), 64 // len(ours.scales), axis=0)
  expected = np.round(np.asarray(_MATRIX) / scales)
  most = 2 ** (bits - 1)
  expected = np.clip(expected, -most, most - 1)
  # The largest of a group lies half way between two integers.
  off = np.abs(np.asarray(theirs.qvalue, int) - expected)
  assert off.max() <= 1
  assert off.mean() < 0.02
  error = lambda w: np.abs(np.asarray(w) - np.asarray(_MATRIX)).mean()
  assert error(leaves.dequantize(ours)) < 1.12 * error(
    qarray.dequantize(theirs)
  )
