"""Weights of 4 bits, scales of groups and offsets, against numpy.

See `int8_matmul_test` for int8 weights with a scale a column.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant_matmul import formats
from pallas_kernels.int8_matmul import api
from pallas_kernels.int8_matmul import reference

# Rows of x, K, N, groups.
SHAPES = [(1, 32, 24, 1), (5, 256, 33, 2), (20, 320, 64, 10)]
NAMES = [None, 'reference', 'blockwise']
packed_or_not = pytest.mark.parametrize(
  'packed', [False, True], ids=['int8', 'int4']
)


_quantize_rows = jax.jit(api.quantize_rows)
_pack = jax.jit(formats.pack_int4)
_rows_of = jax.jit(reference.rows_of)


@functools.cache
def _product(name, of=api.int8_matmul):
  return jax.jit(functools.partial(of, implementation=name))


def _rows(m, k, seed=1):
  """Rows of several sizes, one of zeros, and the same as integers."""
  random = np.random.default_rng(seed)
  x = random.standard_normal((m, k)) * 10.0 ** random.integers(-3, 3, (m, 1))
  if m > 2:
    x[1] = 0
  x = x.astype(np.float32)
  return x, *map(np.asarray, _quantize_rows(x))


def _weight(k, n, groups, packed, seed=0):
  """Integers [K, N], how they are stored, their scales and offsets."""
  random = np.random.default_rng(seed)
  values = random.integers(*((-8, 8) if packed else (-127, 128)), (k, n))
  w = _pack(values) if packed else np.int8(values)
  draw = lambda low: random.uniform(low, 1e-2, (groups, n)).astype(np.float32)
  return values, w, draw(1e-4), draw(-1e-2)


def _numpy_product(values, x_scales, w, w_scales, w_offsets=None):
  """The definition, one rounding after the other."""
  size = len(w) // len(w_scales)
  total = np.zeros((len(values), w.shape[1]), np.float32)
  for g, scales in enumerate(w_scales):
    own = values[:, g * size : (g + 1) * size].astype(np.int64)
    product = own @ w[g * size : (g + 1) * size]
    total = total + product.astype(np.float32) * scales
    if w_offsets is not None:
      sums = own.sum(1, keepdims=True)
      total = total + sums.astype(np.float32) * w_offsets[g]
  return total * x_scales[:, None]


@pytest.mark.parametrize('with_offsets', [False, True], ids=['', 'offsets'])
@packed_or_not
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('name', ['reference', 'blockwise'])
def test_groups_have_scales_and_offsets(name, shape, packed, with_offsets):
  m, k, n, groups = shape
  w, stored, scales, offsets = _weight(k, n, groups, packed)
  offsets = offsets if with_offsets else None
  x, values, x_scales = _rows(m, k)
  want = _numpy_product(values, x_scales, w, scales, offsets)
  run = functools.partial(_product(name), w_offsets=offsets)
  for got in (
    run(values, stored, scales, x_scales=x_scales),
    run(x, stored, scales),
  ):
    if name == 'reference':
      np.testing.assert_array_equal(got, want)
    else:  # may round a product and its addition at once
      size = np.abs(want).max(1, keepdims=True)
      assert (np.abs(got - want) <= 1e-6 * size).all()


@pytest.mark.parametrize('name', NAMES)
def test_one_group_is_a_scale_a_column(name):
  _, values, x_scales = _rows(3, 64)
  w, stored, scales, _ = _weight(64, 40, 1, True)
  want = _numpy_product(values, x_scales, w, scales)
  for form in (scales, scales[0]):
    got = _product(name)(values, stored, form, x_scales=x_scales)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('name', NAMES)
def test_scales_may_be_float16(name):
  x, _, _ = _rows(3, 64)
  _, stored, *factors = _weight(64, 64, 2, True)
  run = lambda scales, offsets: _product(name)(
    x, stored, scales, w_offsets=offsets
  )
  narrow = [part.astype(np.float16) for part in factors]
  wide = [part.astype(np.float32) for part in narrow]
  np.testing.assert_array_equal(run(*narrow), run(*wide))


@pytest.mark.parametrize(('m', 'n'), [(0, 9), (3, 0), (2, 5)])
def test_any_rows_and_columns_of_4_bits(m, n):
  x, values, x_scales = _rows(m, 64)
  w, stored, scales, offsets = _weight(64, n, 2, True)
  want = _numpy_product(values, x_scales, w, scales, offsets)
  got = _product(None)(x, stored, scales, w_offsets=offsets)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@packed_or_not
def test_rows_of_the_weight(packed):
  w, stored, scales, offsets = _weight(96, 5, 3, packed)
  index = np.asarray([95, 0, 15, 16, 31, 32, 64, 7])
  whole = w * np.repeat(scales, 32, 0)
  got = _rows_of(stored, scales, None, index)
  np.testing.assert_array_equal(got, whole[index].astype(np.float32))
  whole = whole.astype(np.float32) + np.repeat(offsets, 32, 0)
  got = _rows_of(stored, scales, offsets, index)
  np.testing.assert_allclose(got, whole[index], rtol=1e-6, atol=1e-8)


@packed_or_not
def test_outlier_features_meet_weights_of_groups(packed):
  w, stored, scales, offsets = _weight(128, 40, 4, packed)
  x = np.clip(np.random.default_rng(3).standard_normal((6, 128)), -3, 3)
  x = x.astype(np.float32)
  x[0, 7], x[3, 20], x[4, 84], x[5, 127] = 60, -45, 30, 6.5
  columns = [7, 20, 84, 127]
  rest = x.copy()
  rest[:, columns] = 0
  whole = w * np.repeat(scales, 32, 0) + np.repeat(offsets, 32, 0)
  want = x[:, columns].astype(np.float64) @ whole[columns]
  values, x_scales = map(np.asarray, _quantize_rows(rest))
  want += _numpy_product(values, x_scales, w, scales, offsets)
  run = _product(None, api.llm_int8_matmul)
  got = run(x, stored, scales, w_offsets=offsets)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_kernels_without_groups_leave_them_to_blockwise():
  x = np.ones((3, 64), np.float32)
  _, stored, scales, offsets = _weight(64, 8, 2, True)
  lowered = jax.jit(api.int8_matmul).trace(x, stored, scales)
  for platform in ('tpu', 'cuda'):
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert 'custom_call' not in text
  eight = np.ones((64, 8), np.int8)
  for name in ('mosaic_tpu', 'mosaic_gpu'):
    for w, w_scales, w_offsets, reason in (
      (stored, scales[0], None, r'uint8 with scales \(8,\) and no offsets'),
      (eight, scales, None, r'int8 with scales \(2, 8\) and no offsets'),
      (eight, scales[0], offsets[0], r'int8 with scales \(8,\) and offsets'),
    ):
      with pytest.raises(NotImplementedError, match=f'{name}: .*{reason}'):
        api.int8_matmul(
          x, w, w_scales, w_offsets=w_offsets, implementation=name
        )


def test_groups_that_do_not_fit_are_refused_in_one_line():
  x, eight = np.ones((3, 64), np.float32), np.ones((64, 8), np.int8)
  _, packed, scales, offsets = _weight(64, 8, 2, True)
  cases = [
    ((x, packed[:16], scales), None, r'w \[K / 2, N\], got .* \(16, 8\)'),
    ((x, packed, scales[:, :5]), None, r'or \[K / G, 8\], got \(2, 5\)'),
    ((x, packed, scales[:0]), None, '0 groups of scales must divide K = 64'),
    ((x, packed, np.ones((4, 8), np.float32)), None, 'into multiples of 32'),
    (
      (x, eight, np.ones((4, 8), np.float32)),
      None,
      '4 groups .* into multiples of 32',
    ),
    ((x[:, :48], packed[:24], scales[0]), None, '1 groups .* of 32'),
    ((x, packed, scales), offsets[0], r'w_offsets must be \(2, 8\) like'),
  ]
  for args, w_offsets, sentence in cases:
    with pytest.raises(ValueError, match=sentence) as error:
      api.int8_matmul(*args, w_offsets=w_offsets)
    assert '\n' not in str(error.value)


def test_a_gradient_of_offsets_is_refused():
  _, packed, scales, offsets = _weight(64, 8, 2, True)
  run = lambda offsets: api.int8_matmul(
    jnp.ones((3, 64)), packed, scales, w_offsets=offsets
  )
  with pytest.raises(NotImplementedError, match='has no gradient'):
    jax.grad(lambda offsets: run(offsets).sum())(offsets)
