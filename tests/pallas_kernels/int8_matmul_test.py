"""Products in int8: every implementation against integers of numpy."""

import functools
import re

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int8_matmul import api
from pallas_kernels.int8_matmul import mosaic_tpu
from pallas_kernels.int8_matmul import reference

# Small tiles, so that small shapes have several and hang over the edges.
SMALL = mosaic_tpu.Tiles(32, 128, 128)


def _interpreted(x, w, w_scales, *, x_scales=None, interpret=True, **options):
  return mosaic_tpu.int8_matmul(
    x, w, w_scales, x_scales, tiles=SMALL, interpret=interpret, **options
  )


IMPLEMENTATIONS = {
  'none': api.int8_matmul,
  'reference': functools.partial(api.int8_matmul, implementation='reference'),
  'blockwise': functools.partial(api.int8_matmul, implementation='blockwise'),
  'mosaic_tpu': _interpreted,
}
# A TPU will not run what LLVM makes of its kernel here: no effort on it.
NO_EFFORT = {'xla_backend_optimization_level': 0}
COMPILED = {
  name: jax.jit(
    function,
    static_argnames='out_dtype',
    compiler_options=NO_EFFORT if name == 'mosaic_tpu' else None,
  )
  for name, function in IMPLEMENTATIONS.items()
}
every = pytest.mark.parametrize('name', IMPLEMENTATIONS)
# M, K, N
SHAPES = [
  (1, 1, 1),
  (1, 72, 40),
  (2, 127, 33),
  (33, 129, 257),
  (5, 300, 128),
  (65, 256, 130),
]


def _arrays(m, k, n, seed=0):
  """x float32 with a row of zeros, w int8 and its scales, as numpy."""
  random = np.random.default_rng(seed)
  x = random.standard_normal((m, k)) * 10.0 ** random.integers(-3, 3, (m, 1))
  if m > 2:
    x[1] = 0
  w = random.integers(-127, 128, (k, n), np.int8)
  return (
    x.astype(np.float32),
    w,
    random.uniform(1e-4, 1e-2, n).astype(np.float32),
  )


def _int8(m, k, seed=1):
  random = np.random.default_rng(seed)
  values = random.integers(-127, 128, (m, k), np.int8)
  return values, random.uniform(1e-3, 1, m).astype(np.float32)


def _numpy_quantize(x):
  """The definition, in float32 as the library has it."""
  x = np.asarray(x, np.float32)
  scales = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
  scales[scales < np.finfo(np.float32).tiny] = 1
  values = np.round(x * (np.float32(1) / scales))
  return values.astype(np.int64), scales[..., 0]


def _numpy_product(values, x_scales, w, w_scales):
  """Integers in int64, then two products in float32."""
  product = np.asarray(values, np.int64) @ np.asarray(w, np.int64)
  assert np.abs(product).max(initial=0) < 2**31
  return product.astype(np.float32) * w_scales * x_scales[..., None]


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@every
def test_int8_rows_give_the_integers_of_numpy(name, shape):
  m, k, n = shape
  values, x_scales = _int8(m, k)
  _, w, w_scales = _arrays(m, k, n)
  got = COMPILED[name](values, w, w_scales, x_scales=x_scales)
  assert got.shape == (m, n)
  assert got.dtype == jnp.float32
  want = _numpy_product(values, x_scales, w, w_scales)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@every
def test_float_rows_are_quantized_one_by_one(name, shape):
  x, w, w_scales = _arrays(*shape)
  got = COMPILED[name](x, w, w_scales)
  want = _numpy_product(*_numpy_quantize(x), w, w_scales)
  np.testing.assert_array_equal(got, want)
  if len(x) > 2:
    np.testing.assert_array_equal(np.asarray(got)[1], 0)


@hypothesis.given(
  m=st.integers(0, 5), k=st.integers(0, 40), n=st.integers(0, 40)
)
@hypothesis.settings(max_examples=10)
def test_any_sizes_even_none(m, k, n):
  values, x_scales = _int8(m, k)
  _, w, w_scales = _arrays(m, k, n)
  want = _numpy_product(values, x_scales, w, w_scales)
  got = COMPILED['none'](values, w, w_scales, x_scales=x_scales)
  np.testing.assert_array_equal(got, want)


@every
def test_bfloat16_rows_and_results(name):
  x, w, w_scales = _arrays(3, 40, 24)
  x = x.astype(jnp.bfloat16)
  got = COMPILED[name](x, w, w_scales)
  want = _numpy_product(*_numpy_quantize(x), w, w_scales)
  np.testing.assert_array_equal(got, want)
  rounded = COMPILED[name](x, w, w_scales, out_dtype=jnp.bfloat16)
  assert rounded.dtype == jnp.bfloat16
  np.testing.assert_array_equal(rounded, want.astype(jnp.bfloat16))


@pytest.mark.parametrize('name', ['reference', 'blockwise'])
def test_the_longest_sum_is_exact_and_a_longer_one_refused(name):
  """The bound: with one more, 127 * 127 * K exceeds an int32."""
  assert 127**2 * api.MAX_K < 2**31 <= 127**2 * (api.MAX_K + 1)
  product = COMPILED[name]
  for rows in (1, 2):
    x, w = np.full((rows, api.MAX_K), 127, np.int8), np.full(api.MAX_K, -127)
    w = w.astype(np.int8)[:, None]
    ones = np.ones(rows, np.float32)
    got = product(x, w, np.ones(1, np.float32), x_scales=ones)
    np.testing.assert_array_equal(got, np.float32(-(127**2) * api.MAX_K))
  x, w = np.zeros((1, api.MAX_K + 1), np.int8), np.zeros((api.MAX_K + 1, 1))
  with pytest.raises(ValueError, match='at most 133144.*got 133145') as error:
    product(x, w.astype(np.int8), ones[:1], x_scales=ones[:1])
  assert '\n' not in str(error.value)


_QUANTIZE = jax.jit(api.quantize_rows)


@hypothesis.given(
  arrays.arrays(
    np.float32,
    st.sampled_from([(3,), (4, 7), (2, 1, 5)]),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
  )
)
def test_quantized_rows_are_half_a_step_away_at_most(x):
  values, scales = (np.asarray(y) for y in _QUANTIZE(x))
  assert values.dtype == np.int8
  assert scales.shape == x.shape[:-1]
  assert values.min() >= -127
  assert (scales > 0).all()
  step = scales.astype(np.float64)[..., None]
  assert (np.abs(x - values * step) <= step * (0.5 + 1e-4)).all()
  absmax = np.abs(x).max(-1)
  empty = absmax < 1.4e-36
  np.testing.assert_array_equal(scales[empty], 1)
  full = absmax > 1.6e-36
  np.testing.assert_allclose(scales[full], absmax[full] / 127, rtol=1e-6)
  np.testing.assert_array_equal(np.abs(values).max(-1)[full], 127)


def test_rows_of_zeros_halves_and_lowest_numbers():
  x = jnp.asarray([[0, 0, 0, 0], [127, 0.5, 1.5, -2.5], [-128, 1, 2, 128]])
  values, scales = api.quantize_rows(x)
  np.testing.assert_array_equal(values[:2], [[0] * 4, [127, 0, 2, -2]])
  np.testing.assert_array_equal(values[2], [-127, 1, 2, 127])
  np.testing.assert_array_equal(scales[:2], [1, 1])
  # With any scale.
  np.testing.assert_array_equal(
    reference.quantize(jnp.asarray([300.0, -300.0]), jnp.float32(2)),
    [127, -127],
  )
  # Eager and compiled programs round alike.
  x = jax.random.normal(jax.random.key(0), (64, 1000))
  for eager, compiled in zip(
    api.quantize_rows(x), jax.jit(api.quantize_rows)(x), strict=True
  ):
    np.testing.assert_array_equal(eager, compiled)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@every
def test_a_row_that_is_not_finite_is_seen_and_spoils_no_other(name, bad):
  product = COMPILED[name]
  x, w, w_scales = _arrays(4, 24, 8)
  spoiled = x.copy()
  spoiled[2, 5] = bad
  got = np.asarray(product(spoiled, w, w_scales))
  assert not np.isfinite(got[2]).any()
  rest = np.asarray([0, 1, 3])
  np.testing.assert_array_equal(
    got[rest], np.asarray(product(x, w, w_scales))[rest]
  )


@every
def test_a_batch_is_its_elements(name):
  product = COMPILED[name]
  x, w, w_scales = _arrays(12, 40, 24)
  x = x.reshape(3, 4, 40)
  want = np.stack([product(row, w, w_scales) for row in x])
  batched = functools.partial(jax.vmap, IMPLEMENTATIONS[name])
  got = jax.jit(batched((0, None, None)))(x, w, w_scales)
  np.testing.assert_array_equal(got, want)
  if name != 'mosaic_tpu':
    np.testing.assert_array_equal(product(x, w, w_scales), want)
    np.testing.assert_array_equal(product(x[0, 0], w, w_scales), want[0, 0])
  w = np.stack([w, -w, w])
  got = jax.jit(batched((0, 0, None)))(x, w, w_scales)
  np.testing.assert_array_equal(got, want * [[[1]], [[-1]], [[1]]])


def test_one_row_widens_no_weight():
  """A product of one row would first convert w on a CPU."""
  x, w, w_scales = _arrays(1, 72, 40)
  program = jax.jit(api.int8_matmul).lower(x, w, w_scales).compile().as_text()
  assert 's8[72,40]' in program
  assert not re.search(r'(s32|f32)\[72,40\]', program)


@pytest.mark.parametrize('quantized', [True, False], ids=['int8', 'float'])
def test_the_kernel_has_no_races(quantized):
  """Two cores share the rows of tiles; scratch begins as anything."""
  x, w, w_scales = _arrays(40, 200, 140)
  parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  if quantized:
    values, x_scales = _int8(40, 200)
    want = _numpy_product(values, x_scales, w, w_scales)
    got = _interpreted(
      values, w, w_scales, x_scales=x_scales, interpret=parameters
    )
  else:
    want = _numpy_product(*_numpy_quantize(x), w, w_scales)
    got = _interpreted(x, w, w_scales, interpret=parameters)
  np.testing.assert_array_equal(got, want)
  assert interpret_pallas_call.races is not None
  assert not interpret_pallas_call.races.races_found


def test_rows_too_wide_for_memory_are_quantized_before(monkeypatch):
  x, w, w_scales = _arrays(3, 300, 24)
  monkeypatch.setattr(mosaic_tpu, 'ROW_BYTES', 1000)
  run = functools.partial(
    mosaic_tpu.int8_matmul.__wrapped__, tiles=SMALL, interpret=True
  )
  assert 'int8_matmul_from_int8' in str(jax.make_jaxpr(run)(x, w, w_scales))
  np.testing.assert_array_equal(
    jax.jit(run)(x, w, w_scales),
    _numpy_product(*_numpy_quantize(x), w, w_scales),
  )


def _tpu_text(function, *shapes):
  shapes = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  traced = jax.jit(function).trace(*shapes)
  return traced.lower(lowering_platforms=('tpu',)).as_text()


W_SHAPES = [((300, 700), jnp.int8), ((700,), jnp.float32)]


@pytest.mark.parametrize('rows', [1, 3, 300])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_tpu_gets_the_kernel(dtype, rows):
  for implementation in (None, 'mosaic_tpu', ('mosaic_tpu', 'blockwise')):
    product = functools.partial(api.int8_matmul, implementation=implementation)
    text = _tpu_text(product, ((rows, 300), dtype), *W_SHAPES)
    assert text.count('tpu_custom_call') == 1
    assert 'int8_matmul_from_floats' in text


def test_a_tpu_gets_the_kernel_of_int8_rows():
  product = lambda x, x_scales, *w: api.int8_matmul(x, *w, x_scales=x_scales)
  rows = [((2, 5, 300), jnp.int8), ((2, 5), jnp.float32)]
  assert 'int8_matmul_from_int8' in _tpu_text(product, *rows, *W_SHAPES)
  # Rows of 64 KiB: their quantized values are what the kernel reads.
  wide = [((16384, 128), jnp.int8), ((128,), jnp.float32)]
  text = _tpu_text(api.int8_matmul, ((256, 16384), jnp.float32), *wide)
  assert 'int8_matmul_from_int8' in text
  batched = jax.vmap(api.int8_matmul, (0, None, None))
  text = _tpu_text(batched, ((4, 3, 300), jnp.float32), *W_SHAPES)
  assert 'int8_matmul_from_floats' in text
  text = _tpu_text(api.llm_int8_matmul, ((3, 300), jnp.float32), *W_SHAPES)
  assert 'int8_matmul_from_floats' in text


def test_what_the_kernel_does_not_take_is_left_to_others():
  shapes = [((3, 300), jnp.float16), *W_SHAPES]
  assert 'tpu_custom_call' not in _tpu_text(api.int8_matmul, *shapes)
  x, w, w_scales = _arrays(3, 8, 4)
  sentence = 'mosaic_tpu: x must be float32, bfloat16 or int8, got float16'
  with pytest.raises(NotImplementedError, match=sentence):
    api.int8_matmul(
      x.astype(np.float16), w, w_scales, implementation='mosaic_tpu'
    )
  with pytest.raises(NotImplementedError, match='out_dtype must be'):
    api.int8_matmul(
      x, w, w_scales, out_dtype=jnp.float16, implementation='mosaic_tpu'
    )
  with pytest.raises(NotImplementedError, match='an axis is empty'):
    api.int8_matmul(x[:0], w, w_scales, implementation='mosaic_tpu')


def test_the_kernel_is_for_tpu_and_names_are_known():
  x, w, w_scales = _arrays(3, 8, 4)
  product = functools.partial(api.int8_matmul, implementation='mosaic_tpu')
  sentence = 'mosaic_tpu is a kernel for tpu and this program is compiled for'
  for run in (product, jax.jit(product)):
    with pytest.raises(NotImplementedError, match=sentence):
      run(x, w, w_scales)
  with pytest.raises(ValueError, match="int8_matmul has no implementation 'x'"):
    api.int8_matmul(x, w, w_scales, implementation='x')


def test_what_does_not_fit_is_refused_in_one_line():
  x, w, w_scales = _arrays(3, 8, 4)
  values, x_scales = _int8(3, 8)
  cases = [
    ((x[:, :7], w, w_scales), {}, r'\(3, 7\) and \(8, 4\)'),
    (
      (x, w.astype(np.int32), w_scales),
      {},
      'w must be int8, or uint8 .* got int32',
    ),
    ((x, w, w_scales[:3]), {}, r'w_scales must be \(4,\)'),
    ((values, w, w_scales), {}, 'x is int8 and x_scales missing'),
    ((x, w, w_scales), {'x_scales': x_scales}, 'x_scales given'),
    (
      (values, w, w_scales),
      {'x_scales': x_scales[:2]},
      r'be \(3,\), one a row',
    ),
    ((x.astype(np.int32), w, w_scales), {}, 'float dtype or int8, got int32'),
  ]
  for args, options, sentence in cases:
    with pytest.raises(ValueError, match=sentence) as error:
      api.int8_matmul(*args, **options)
    assert '\n' not in str(error.value)
  with pytest.raises(ValueError, match='float dtype, got int8'):
    api.quantize_rows(values)
  with pytest.raises(ValueError, match='float dtype, got int8'):
    api.llm_int8_matmul(values, w, w_scales)
  with pytest.raises(ValueError, match='>= 0, got 6.0 and -1'):
    api.llm_int8_matmul(x, w, w_scales, max_outliers=-1)
  with pytest.raises(ValueError, match=r'w_outlier must be \(8, 4\)'):
    api.llm_int8_matmul(x, w, w_scales, w[:, :3])


def test_a_gradient_is_refused_and_not_zero():
  x, w, w_scales = _arrays(3, 8, 4)
  loss = lambda x, w_scales: api.int8_matmul(x, w, w_scales).sum()
  for argument in (0, 1):
    with pytest.raises(NotImplementedError, match='has no gradient'):
      jax.grad(loss, argument)(x, w_scales)


# Outlier features.


def _model_weight(k=96, n=40):
  """A weight, its int8 values and scales, and rows with three outliers."""
  random = np.random.default_rng(5)
  weight = random.standard_normal((k, n)).astype(np.float32)
  values, w_scales = _numpy_quantize(weight.T)
  x = np.clip(random.standard_normal((6, k)), -3, 3).astype(np.float32)
  x[0, 7], x[3, 20], x[4, 20], x[5, 90] = 60, -45, 30, 6.5
  return weight, values.T.astype(np.int8), w_scales, x


_llm_int8_matmul = jax.jit(
  api.llm_int8_matmul,
  static_argnames=('threshold', 'max_outliers', 'out_dtype'),
)


def _numpy_llm_int8(x, w, w_scales, weight, columns):
  """The decomposition with given columns, column by column in float64."""
  total = np.zeros((len(x), w.shape[1]))
  rest = x.copy()
  for j in columns:
    total += np.outer(x[:, j].astype(np.float64), weight[j])
    rest[:, j] = 0
  values, x_scales = _numpy_quantize(rest)
  return total + (values @ w.astype(np.int64)) * x_scales[:, None] * w_scales


@pytest.mark.parametrize('original', [True, False])
def test_outlier_features_are_kept_in_float(original):
  weight, w, w_scales, x = _model_weight()
  kept = weight if original else w * w_scales
  args = (x, w, w_scales, weight if original else None)
  got = np.asarray(_llm_int8_matmul(*args))
  want = _numpy_llm_int8(x, w, w_scales, kept, [7, 20, 90])
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
  exact = x.astype(np.float64) @ (w * w_scales).astype(np.float64)
  error = lambda y: np.abs(y - exact)[[0, 3, 4]].mean()
  if not original:
    assert error(got) < error(np.asarray(COMPILED['none'](x, w, w_scales))) / 5


def test_without_outliers_it_is_the_int8_product():
  weight, w, w_scales, x = _model_weight()
  x = np.clip(x, -5.9, 5.9)
  np.testing.assert_array_equal(
    _llm_int8_matmul(x, w, w_scales, weight),
    COMPILED['none'](x, w, w_scales),
  )
  # At the threshold exactly, a feature is an outlier.
  x[2, 11] = 6
  want = _numpy_llm_int8(x, w, w_scales, weight, [11])
  got = _llm_int8_matmul(x, w, w_scales, weight)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
  ('most', 'columns'), [(0, []), (1, [7]), (2, [7, 20]), (500, [7, 20, 90])]
)
def test_more_outliers_than_allowed_keeps_the_largest(most, columns):
  weight, w, w_scales, x = _model_weight()
  got = _llm_int8_matmul(x, w, w_scales, weight, max_outliers=most)
  want = _numpy_llm_int8(x, w, w_scales, weight, columns)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_the_threshold_and_the_batch_choose_the_outliers():
  weight, w, w_scales, x = _model_weight()
  product = functools.partial(
    _llm_int8_matmul, threshold=40.0, out_dtype=jnp.float32
  )
  want = _numpy_llm_int8(x, w, w_scales, weight, [7, 20])
  got = product(x.reshape(2, 3, -1), w, w_scales, weight)
  got = np.asarray(got).reshape(6, -1)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
  # Each element of vmap looks at its own rows.
  got = jax.vmap(product, (0, None, None, None))(
    x.reshape(2, 3, -1), w, w_scales, weight
  )
  for part, y, own in zip((x[:3], x[3:]), got, ([7], [20]), strict=True):
    want = _numpy_llm_int8(part, w, w_scales, weight, own)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)


def test_a_second_call_compiles_nothing():
  weight, w, w_scales, x = _model_weight()
  run = jax.jit(api.llm_int8_matmul)
  run(x, w, w_scales, weight)
  compiled = run._cache_size()
  run(-x, w, w_scales, weight)
  assert run._cache_size() == compiled
