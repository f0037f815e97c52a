"""The Hopper kernel of quantized weights, interpreted and lowered.

See `attention.mosaic_gpu_test` for where the interpreter runs.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant_matmul import api
from pallas_kernels.dequant_matmul import mosaic_gpu
from pallas_kernels.dequant_matmul import reference
from tests.pallas_kernels import dequant_cases
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.short

# Format, group, sizes m, k, n, and options. None is one scale a column.
CASES = {
  'int8, a scale a column': ('int8', None, (5, 200, 300), {}),
  'int8, odd sizes': ('int8', None, (6, 77, 65), {}),
  'int8, groups of half a tile': ('int8', 32, (9, 224, 20), {'splits': 2}),
  'int8, groups of two tiles': ('int8', 128, (7, 384, 16), {'splits': 5}),
  'int4, four groups a tile': ('int4', 32, (5, 96, 40), {}),
  'int4, two blocks of rows': ('int4', 64, (70, 192, 272), {}),
  'int4, a scale a column': ('int4', 288, (8, 288, 16), {'splits': 1}),
  'NF4': ('nf4', 64, (5, 320, 130), {'splits': 1}),
  'NF4, groups of two tiles': ('nf4', 256, (17, 512, 16), {'splits': 3}),
  'NF4, float16': ('nf4', 64, (40, 128, 50), {'dtype': jnp.float16}),
}


def _plain(x, weight, out_dtype=jnp.float32):
  return reference.dequant_matmul(
    x, *weight, transposed=False, out_dtype=out_dtype
  )


def _error(got, x, weight):
  """The largest one, over the largest number."""
  exact = np.asarray(x, np.float64) @ np.asarray(
    reference.dequantize(*weight), np.float64
  )
  return np.abs(np.asarray(got, np.float64) - exact).max() / np.abs(exact).max()


@hopper.runs_the_kernel
@pytest.mark.parametrize('case', CASES)
def test_it_is_as_exact_as_the_reference(case):
  kind, group, sizes, options = CASES[case]
  x, weight = dequant_cases.case(
    kind, group, sizes, dtype=options.get('dtype', jnp.bfloat16)
  )
  got = dequant_cases.run(x, weight, splits=options.get('splits'))
  assert got.dtype == jnp.float32
  assert got.shape == (sizes[0], sizes[2])
  # The same numbers are multiplied, and summed in another order.
  plain = _plain(x, weight)
  largest = np.abs(plain).max()
  np.testing.assert_allclose(got, plain, rtol=0, atol=1e-5 * largest)
  assert _error(got, x, weight) <= 2 * _error(plain, x, weight)


@hopper.runs_the_kernel
@pytest.mark.parametrize('splits', [1, 2])
@pytest.mark.parametrize(
  ('m', 'out_dtype'), [(5, jnp.bfloat16), (33, jnp.bfloat16), (9, jnp.float16)]
)
def test_the_result_is_rounded_once(m, out_dtype, splits):
  x, weight = dequant_cases.case('int8', None, (m, 128, 20))
  got = dequant_cases.run(x, weight, out_dtype=out_dtype, splits=splits)
  assert got.dtype == out_dtype
  wide = _plain(x, weight)
  unit = float(jnp.finfo(out_dtype).eps) / 2
  np.testing.assert_allclose(
    got.astype(jnp.float32), wide, rtol=1.01 * unit, atol=1e-5
  )


@hopper.runs_the_kernel
@pytest.mark.parametrize('kind', dequant_cases.QUANTIZE)
def test_groups_of_zeros_add_nothing(kind):
  x, (values, scales, *codebook) = dequant_cases.case(kind, 64, (5, 128, 24))
  w = jnp.ones((128, 24)).at[:64].set(0).at[:, 5].set(0)
  weight = dequant_cases.QUANTIZE[kind](w, 64)
  got = dequant_cases.run(x, weight)
  assert (weight.scales[0] == 1).all()
  assert (got[:, 5] == 0).all()
  right = np.asarray(x[:, 64:], np.float64).sum(1)
  np.testing.assert_allclose(got[:, 0], right, rtol=1e-5, atol=1e-4)


@hopper.runs_the_kernel
@pytest.mark.parametrize('kind', ['int8', 'nf4'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(kind, bad):
  """Beyond the edges too, where tiles of zeros are codes of something."""
  x, weight = dequant_cases.case(kind, 64, (5, 192, 20))
  clean = dequant_cases.run(x, weight)
  scales = weight.scales.at[-1, -1].set(bad)
  got = dequant_cases.run(x.at[1, 0].set(bad), weight._replace(scales=scales))
  kept = np.ix_([0, 2, 3, 4], range(19))
  np.testing.assert_array_equal(np.asarray(got)[kept], np.asarray(clean)[kept])
  assert not np.isfinite(got[1]).any()
  assert not np.isfinite(got[:, -1]).any()


@hopper.runs_the_kernel
@pytest.mark.parametrize('kind', ['int8', 'int4'])
def test_it_has_no_races(kind, monkeypatch):
  # More tiles than the ring has slots.
  monkeypatch.setattr(mosaic_gpu, 'MOST_STEPS', 2)
  x, weight = dequant_cases.case(
    kind, 64, (5, 320 if kind == 'int8' else 640, 256)
  )
  got = dequant_cases.run(x, weight, splits=1, detect_races=True)
  assert not hopper.races_found()
  plain = _plain(x, weight)
  np.testing.assert_allclose(got, plain, rtol=0, atol=1e-5 * abs(plain).max())


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('m', [5, 200])
@pytest.mark.parametrize('kind', dequant_cases.QUANTIZE)
def test_it_lowers_for_cuda_with_the_kernel(kind, m, dtype):
  shapes = dequant_cases.shapes(kind, m, dtype)
  for implementation in (None, 'mosaic_gpu'):
    run = functools.partial(api.dequant_matmul, implementation=implementation)
    assert 'custom_call @mosaic_gpu' in hopper.lower(run, *shapes)
  for platform in ('cpu', 'tpu'):
    traced = jax.jit(api.dequant_matmul).trace(*shapes)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert 'mosaic_gpu' not in lowered


@pytest.mark.parametrize('kind', dequant_cases.QUANTIZE)
@pytest.mark.parametrize('sizes', [(192, 64), (96, 130), (1024, 576)])
def test_weights_are_padded_only_where_sizes_ask_for_it(kind, sizes):
  k, n = sizes
  shapes = dequant_cases.shapes(kind, 5, k=k, n=n, group=32)
  run = functools.partial(api.dequant_matmul, implementation='mosaic_gpu')
  text = hopper.lower(run, *shapes)
  assert 'custom_call @mosaic_gpu' in text
  weight = r'tensor<(\w+)xu?i8>'
  pads = re.findall(rf'pad .*\({weight}.* -> {weight}', text)
  assert pads
  assert any(old != new for old, new in pads) == (n % 64 != 0)


def test_rows_that_are_not_whole_tiles_lower():
  shapes = dequant_cases.shapes('int8', 5, k=1003, n=64, group=1003)
  run = functools.partial(api.dequant_matmul, implementation='mosaic_gpu')
  assert 'custom_call @mosaic_gpu' in hopper.lower(run, *shapes)


def test_its_gradient_is_left_to_another():
  def gradient(x, *weight):
    loss = lambda x: api.dequant_matmul(x, *weight).astype(jnp.float32).sum()
    return jax.value_and_grad(loss)(x)

  lowered = hopper.lower(gradient, *dequant_cases.shapes('nf4', 5))
  assert lowered.count('custom_call @mosaic_gpu') == 1


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'dtype': jnp.float32}, 'x must be bfloat16 or float16, got float32'),
    ({'group': 96}, r'parts of 128 rows and at least 32, got 96'),
    ({'kind': 'int8', 'group': 96}, 'parts of 64 rows and at least 16, got 96'),
    ({'kind': 'int8', 'group': 8}, 'parts of 64 rows and at least 16, got 8'),
    ({'out_dtype': np.float64}, 'out_dtype must be float32.*, got float64'),
    ({'transposed': True}, "a product with w' is not in this kernel"),
  ],
)
def test_what_it_does_not_take_is_said(change, message):
  options = {'kind': 'nf4', 'm': 5, 'transposed': False} | change
  options.setdefault('out_dtype', jnp.float32)
  how = {name: options.pop(name) for name in ('transposed', 'out_dtype')}
  run = functools.partial(mosaic_gpu.dequant_matmul, **how)
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(run, *dequant_cases.shapes(**options))


@pytest.mark.parametrize('cut', ['rows', 'columns'])
def test_devices_may_hold_parts_where_others_choose(cut):
  """Tracing must go through on any platform, as None traces all kernels."""
  x, weight = dequant_cases.case('nf4', 64, (16, 64, 80))
  mesh = jax.make_mesh((8,), ('d',), (jax.sharding.AxisType.Auto,))
  none, first, last = (
    jax.sharding.PartitionSpec(*axes) for axes in ((), ('d',), (None, 'd'))
  )
  specs = {'rows': (first, none, first), 'columns': (none, last, last)}
  x_spec, w_spec, out_spec = specs[cut]
  run = jax.shard_map(
    api.dequant_matmul,
    mesh=mesh,
    in_specs=(x_spec, w_spec, w_spec, none),
    out_specs=out_spec,
  )
  got = jax.jit(run)(x, *weight).astype(jnp.float32)
  plain = _plain(x, weight)
  np.testing.assert_allclose(
    got, plain, rtol=0.01, atol=0.01 * abs(plain).max()
  )


def test_vmap_lowers_for_cuda_with_the_kernel():
  x, *weight = dequant_cases.shapes('int4', 5)
  run = jax.vmap(api.dequant_matmul, (0, None, None))
  several = jax.ShapeDtypeStruct((4, *x.shape), x.dtype)
  assert 'custom_call @mosaic_gpu' in hopper.lower(run, several, *weight)
