"""Packed weights and their scales, against numpy and published numbers."""

import statistics

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant_matmul import formats
from pallas_kernels.dequant_matmul import reference


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@hypothesis.given(
  blocks=st.integers(0, 3), columns=st.integers(0, 5), seed=st.integers(0, 99)
)
@hypothesis.settings(max_examples=10)
def test_what_is_packed_is_unpacked(blocks, columns, seed):
  random = np.random.default_rng(seed)
  for low, signed in ((-8, True), (0, False)):
    values = random.integers(low, low + 16, (32 * blocks, columns))
    packed = formats.pack_int4(jnp.asarray(values))
    assert packed.dtype == jnp.uint8
    assert packed.shape == (16 * blocks, columns)
    got = formats.unpack_int4(packed, signed=signed)
    np.testing.assert_array_equal(got, values)


def test_byte_i_of_32_rows_holds_row_i_low_and_row_16_plus_i_high():
  values = np.random.default_rng(0).integers(0, 16, (96, 5))
  packed = np.asarray(formats.pack_int4(jnp.asarray(values)))
  for block in range(3):
    for i in range(16):
      low, high = values[32 * block + i], values[32 * block + 16 + i]
      np.testing.assert_array_equal(packed[16 * block + i], low + 16 * high)
  # So a slice of whole blocks is that slice of the weight.
  np.testing.assert_array_equal(
    formats.unpack_int4(jnp.asarray(packed[16:32]), signed=False), values[32:64]
  )
  # Negative numbers are in two's complement.
  minus = formats.pack_int4(jnp.full((32, 1), -1, jnp.int8))
  np.testing.assert_array_equal(minus, np.full((16, 1), 255))


@pytest.mark.parametrize(
  ('quantize', 'largest', 'group'),
  [
    (formats.quantize_int8, 127, 24),
    (formats.quantize_int8, 127, None),
    (formats.quantize_int4, 7, 32),
  ],
)
def test_integers_are_half_a_step_away_at_most(quantize, largest, group):
  w = _normal(96, 40) * 10.0 ** np.arange(-20, 20)
  w[32:64, 3] = 0
  w[:, 5] = 0
  quantized = jax.jit(quantize, static_argnums=1)(w.astype(np.float32), group)
  size = group or 96
  assert quantized.scales.shape == (96 // size, 40)
  steps = np.repeat(np.asarray(quantized.scales, np.float64), size, 0)
  restored = np.asarray(reference.dequantize(*quantized), np.float64)
  assert (np.abs(w - restored) <= steps * (0.5 + 1e-4)).all()
  values = np.round(restored / steps).reshape(-1, size, 40)
  absmax = np.abs(w).reshape(-1, size, 40).max(1)
  np.testing.assert_array_equal(
    np.abs(values).max(1), np.where(absmax > 0, largest, 0)
  )
  np.testing.assert_array_equal(quantized.scales[:, 5], 1)
  np.testing.assert_allclose(
    np.asarray(quantized.scales),
    np.where(absmax > 0, absmax / largest, 1),
    rtol=1e-6,
  )


def test_the_codebook_is_quantiles_of_a_normal_distribution():
  """The construction of QLoRA's authors, with their offset."""
  quantile = np.vectorize(statistics.NormalDist().inv_cdf)
  offset = 0.9677083
  above = quantile(np.linspace(offset, 0.5, 9)[:-1])
  below = -quantile(np.linspace(offset, 0.5, 8)[:-1])
  codebook = np.sort([*above, 0, *below]) / above.max()
  np.testing.assert_allclose(formats.NF4, codebook, atol=2e-7)


def test_nf4_takes_the_nearest_value():
  w = _normal(128, 30)
  w[64:, 2] = 0
  quantized = formats.quantize_nf4(jnp.asarray(w))
  blocks = w.reshape(2, 64, 30)
  absmax = np.abs(blocks).max(1, keepdims=True)
  absmax[absmax == 0] = 1
  np.testing.assert_array_equal(quantized.scales, absmax[:, 0])
  ratio = (blocks / absmax)[..., None].astype(np.float64)
  least = np.abs(ratio - formats.NF4).min(-1) * absmax
  error = np.abs(reference.dequantize(*quantized) - w).reshape(blocks.shape)
  np.testing.assert_allclose(error, least, atol=1e-6)
  np.testing.assert_array_equal(error[1, :, 2], 0)


def test_nf4_of_normal_numbers_has_the_error_that_bitsandbytes_has():
  """Its tests expect a mean of 0.072798, and 0.203339 relative, over 1024^2."""
  w = _normal(1024, 1024)
  quantized = jax.jit(formats.quantize_nf4)(w)
  error = np.abs(np.asarray(reference.dequantize(*quantized)) - w)
  # One sigma of the mean of a million numbers is below 1e-4.
  assert abs(error.mean() - 0.072798) < 2e-4
  relative = error / np.maximum(np.abs(w), 1e-8)
  assert abs(relative.mean() - 0.203339) < 1e-3


def test_the_dynamic_map_is_that_of_bitsandbytes():
  """Seven decades of 1, 2, .. 64 values, both signs, 0 and 1."""
  values = formats.DYNAMIC_MAP
  assert len(np.unique(values)) == 256
  assert (np.diff(values) > 0).all()
  for decade in range(7):
    inside = (values < 10.0 ** (decade - 6)) & (values > 10.0 ** (decade - 7))
    assert inside.sum() == 2**decade
  np.testing.assert_allclose(values[:2], [-0.99296875, -0.97890625], rtol=1e-6)
  np.testing.assert_allclose(values[126:129], [-5.5e-7, 0, 5.5e-7], rtol=1e-6)
  assert values[-1] == 1


def test_scales_in_8_bits_cost_an_eighth_of_a_bit_and_little_precision():
  w = _normal(1024, 1024)
  values, scales, codebook = jax.jit(formats.quantize_nf4)(w)
  double = jax.jit(formats.quantize_scales)(scales)
  nbytes = values.nbytes + sum(part.nbytes for part in double)
  assert nbytes * 8 / w.size == pytest.approx(4.127, abs=1e-3)
  restored = formats.dequantize_scales(double)
  assert restored.dtype == jnp.float32
  # A step is 1/64 of the largest deviation from the mean.
  steps = np.repeat(np.asarray(double.steps), 256).reshape(1024, 16).T
  assert (np.abs(restored - scales) <= steps * 0.9 / 128 + 1e-6).all()
  error = lambda s: np.abs(reference.dequantize(values, s, codebook) - w).mean()
  assert error(restored) < error(scales) * 1.01


def test_256_consecutive_groups_share_a_step_column_by_column():
  scales = np.abs(_normal(3, 100)) + 1
  double = formats.quantize_scales(jnp.asarray(scales))
  assert double.codes.shape == (100, 3)
  assert double.codes.dtype == jnp.uint8
  deviations = (scales - scales.mean()).T.reshape(-1)
  largest = [
    np.abs(part).max() for part in (deviations[:256], deviations[256:])
  ]
  np.testing.assert_allclose(double.steps, largest, rtol=1e-5)
  np.testing.assert_allclose(double.offset, scales.mean(), rtol=1e-6)
  nearest = np.abs(
    deviations[:, None] / np.repeat(largest, 256)[:300, None]
    - formats.DYNAMIC_MAP
  ).argmin(1)
  np.testing.assert_array_equal(double.codes.reshape(-1), nearest)
  same = formats.quantize_scales(jnp.full((2, 7), 0.3))
  np.testing.assert_allclose(formats.dequantize_scales(same), 0.3, rtol=1e-6)


def test_what_does_not_fit_is_refused_in_one_line():
  cases = [
    (lambda: formats.pack_int4(jnp.zeros((48, 2), jnp.int8)), '48 rows; right'),
    (lambda: formats.quantize_nf4(jnp.zeros((96, 2))), 'group is 64, and does'),
    (lambda: formats.quantize_int4(jnp.zeros((96, 2)), 0), 'group is 0, and'),
  ]
  for run, sentence in cases:
    with pytest.raises(ValueError, match=sentence) as error:
      run()
    assert '\n' not in str(error.value)
