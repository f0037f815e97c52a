"""Layouts of floats against numpy's own, and casts that report their loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax.quantization import number_formats
from efficiency_jax.quantization.number_formats import FORMATS
from efficiency_jax.quantization.number_formats import Floats

pytestmark = pytest.mark.short

_MATRIX = jax.random.normal(jax.random.key(0), (64, 12))


@pytest.mark.parametrize(
  ('name', 'bits', 'bias', 'largest'),
  [
    ('fp32', 32, 127, 3.4028234663852886e38),
    ('fp16', 16, 15, 65504.0),
    ('bf16', 16, 127, 3.3895313892515355e38),
    ('fp8 e4m3', 8, 7, 448.0),
    ('fp8 e5m2', 8, 15, 57344.0),
  ],
)
def test_formats_are_those_that_are_known(name, bits, bias, largest):
  fmt = FORMATS[name]
  assert (fmt.bits, fmt.bias, fmt.largest) == (bits, bias, largest)
  assert fmt.smallest_normal == 2.0 ** (1 - bias)
  one = np.float32(1).astype(fmt.dtype)
  after = one.view(f'u{bits // 8}') + 1
  step = np.asarray(after, f'u{bits // 8}').view(fmt.dtype)
  assert float(step) - 1 == fmt.epsilon


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('number', [1.5, -0.15625, 3.0, 0.0, 2.0**-6])
def test_the_fields_are_the_number(name, number):
  fmt, f = FORMATS[name], number_formats.fields(number, name)
  size = f.fraction / 2**fmt.fraction_bits
  exponent = (f.exponent or 1) - fmt.bias
  value = (-1) ** f.sign * 2.0**exponent * (size + (f.exponent > 0))
  # These numbers are exact in every format but for the shortest fraction.
  assert value == float(np.float32(number).astype(fmt.dtype))


def test_bits_are_drawn_in_their_order():
  assert number_formats.drawn(1.5, 'fp16') == '0 01111 1000000000'
  assert number_formats.drawn(-2.0, 'bf16') == '1 10000000 0000000'


def test_a_cast_reports_what_it_lost():
  x = jnp.array([1.0, 70000.0, 1e-9, 0.0])
  y, report = number_formats.cast(x, 'fp16')
  assert y.dtype == jnp.float16
  assert (report.overflowed, report.underflowed) == (0.25, 0.25)
  assert report.largest == 70000
  _, report = number_formats.cast(x, 'bf16')
  assert (report.overflowed, report.underflowed) == (0, 0)


def test_bf16_errs_eight_times_as_much_as_fp16():
  """Three bits of fraction fewer: 64 times the variance."""
  errors = [
    number_formats.cast(_MATRIX, name)[1].relative_error
    for name in ('fp16', 'bf16')
  ]
  assert 7 < errors[1] / errors[0] < 9


def test_sixteen_bits_have_no_scales_and_keep_the_dtype_of_the_model():
  q = Floats(format='bf16')(_MATRIX)
  assert q.bits_per_weight == 16
  np.testing.assert_array_equal(q.values, _MATRIX.astype(jnp.bfloat16))
  assert leaves.dequantize(q).dtype == jnp.float32


def test_eight_bits_have_scales_that_use_the_whole_range():
  q = Floats(format='fp8 e4m3', per='channel')(1000 * _MATRIX)
  assert q.values.dtype == jnp.float8_e4m3fn
  assert (jnp.abs(q.values.astype(jnp.float32)).max(0) == 448).all()
  restored = leaves.dequantize(q)
  # Half a step of three bits of fraction, and of the smallest numbers.
  bound = np.abs(1000 * _MATRIX) * 2**-4 + np.asarray(q.scales) * 2**-10
  assert (np.abs(restored - 1000 * _MATRIX) <= bound).all()


@pytest.mark.parametrize('name', ['fp16', 'fp8 e4m3'])
def test_what_is_too_large_is_refused(name):
  with pytest.raises(ValueError, match='beyond .* take scales or a wider'):
    Floats(format=name)(1e6 * _MATRIX)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'format': 'fp6'}, "format must be of fp16, .*, got 'fp6'"),
    ({'format': 'fp16', 'per': 'channel'}, 'fp16 takes no scales'),
  ],
)
def test_options_that_do_not_exist_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    Floats(**options)
