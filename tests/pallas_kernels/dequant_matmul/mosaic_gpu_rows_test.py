"""The Hopper kernel of a few rows, interpreted and lowered.

The interpreter looks codes up in another way than a GPU, which has a table in
shared memory (`make test-gpu`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant_matmul import api
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.dequant_matmul import mosaic_gpu_rows
from pallas_kernels.dequant_matmul import reference
from tests.pallas_kernels import dequant_cases
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.short

# Format, group, sizes m, k, n, and parts of K. None is one scale a column.
CASES = {
  'int8, a scale a column': ('int8', None, (1, 100, 270), None),
  'int8, odd sizes': ('int8', None, (2, 77, 65), 1),
  'int8, two groups a tile': ('int8', 16, (4, 64, 16), 1),
  'int8, groups of four tiles': ('int8', 128, (3, 256, 16), 5),
  'int4, two groups a tile': ('int4', 32, (2, 96, 40), 1),
  'int4, more columns than a block has': ('int4', 64, (1, 64, 530), 1),
  'int4, a scale a column': ('int4', 288, (2, 288, 16), 2),
  'NF4': ('nf4', 64, (1, 192, 130), 1),
  'NF4, groups of two tiles': ('nf4', 128, (4, 256, 16), 3),
}


def _exact(x, weight):
  w = reference.dequantize(*weight)
  return np.asarray(x, np.float64) @ np.asarray(w, np.float64)


def _on_gpu():
  return jax.default_backend() == 'gpu'


@hopper.runs_the_kernel
@pytest.mark.parametrize('case', CASES)
def test_it_rounds_no_weights(case):
  kind, group, sizes, splits = CASES[case]
  x, weight = dequant_cases.case(kind, group, sizes)
  got = dequant_cases.run(x, weight, splits=splits)
  assert got.dtype == jnp.float32
  exact = _exact(x, weight)
  # Codes alone, and on a GPU, are rounded to float16: 11 bits.
  rounded = 2**-12 if kind == 'nf4' and _on_gpu() else 5e-7
  np.testing.assert_allclose(
    got, exact, rtol=0, atol=rounded * np.abs(exact).max()
  )


@hopper.runs_the_kernel
@pytest.mark.parametrize('splits', [1, 2])
def test_the_result_is_rounded_once(splits):
  x, weight = dequant_cases.case('int8', None, (3, 128, 20))
  got = dequant_cases.run(x, weight, out_dtype=jnp.bfloat16, splits=splits)
  assert got.dtype == jnp.bfloat16
  unit = float(jnp.finfo(jnp.bfloat16).eps) / 2
  np.testing.assert_allclose(
    got.astype(jnp.float32), _exact(x, weight), rtol=1.01 * unit, atol=1e-5
  )


@hopper.runs_the_kernel
@pytest.mark.parametrize('half', ['', 'low', 'high'])
def test_every_integer_is_itself(half):
  """-128 and -8 too, which quantizing never makes."""
  integers = jnp.arange(-8, 8) if half else jnp.arange(-128, 128)
  row = formats.HALF if half == 'high' else 0
  values = jnp.zeros((32, len(integers)), jnp.int32).at[row].set(integers)
  values = formats.pack_int4(values) if half else values.astype(jnp.int8)
  x = jnp.zeros((1, 32), jnp.bfloat16).at[0, row].set(1)
  got = dequant_cases.run(x, (values, jnp.ones((1, len(integers)))))
  np.testing.assert_array_equal(got[0], integers)


@hopper.runs_the_kernel
@pytest.mark.parametrize(('kind', 'bad'), [('int8', np.nan), ('nf4', np.inf)])
def test_what_is_not_finite_stays_in_its_row_and_column(kind, bad):
  """Beyond the edges too, where tiles of zeros are codes of something."""
  x, weight = dequant_cases.case(kind, 64, (2, 64, 20))
  clean = dequant_cases.run(x, weight)
  scales = weight.scales.at[-1, -1].set(bad)
  got = dequant_cases.run(x.at[1, 0].set(bad), weight._replace(scales=scales))
  kept = np.ix_([0], range(19))
  np.testing.assert_array_equal(np.asarray(got)[kept], np.asarray(clean)[kept])
  assert not np.isfinite(got[1]).any()
  assert not np.isfinite(got[:, -1]).any()


@hopper.runs_the_kernel
@pytest.mark.parametrize('factor', [1e-9, 1e9])
def test_codebooks_may_be_of_any_size(factor):
  x, weight = dequant_cases.case('nf4', 64, (1, 64, 16))
  weight = weight._replace(codebook=weight.codebook * factor)
  got, exact = dequant_cases.run(x, weight), _exact(x, weight)
  np.testing.assert_allclose(
    got, exact, rtol=0, atol=2**-12 * np.abs(exact).max()
  )


@hopper.runs_the_kernel
@pytest.mark.parametrize('kind', ['int8', 'nf4'])
def test_it_has_no_races(kind):
  # More tiles than the ring has slots.
  x, weight = dequant_cases.case(
    kind, 64, (1, 128 if kind == 'int8' else 256, 16)
  )
  got = dequant_cases.run(x, weight, splits=1, detect_races=True)
  assert not hopper.races_found()
  exact = _exact(x, weight)
  np.testing.assert_allclose(got, exact, rtol=0, atol=2**-12 * abs(exact).max())


@pytest.mark.parametrize('m', [1, 4])
@pytest.mark.parametrize('kind', dequant_cases.QUANTIZE)
def test_few_rows_lower_to_it_and_more_to_the_other(kind, m, monkeypatch):
  called = []
  few = mosaic_gpu_rows.dequant_matmul
  monkeypatch.setattr(
    mosaic_gpu_rows,
    'dequant_matmul',
    lambda *a, **k: called.append(1) or few(*a, **k),
  )
  run = functools.partial(api.dequant_matmul, implementation='mosaic_gpu')
  jax.clear_caches()
  text = hopper.lower(run, *dequant_cases.shapes(kind, m))
  assert 'custom_call @mosaic_gpu' in text
  assert called
  called.clear()
  hopper.lower(run, *dequant_cases.shapes(kind, mosaic_gpu_rows.MOST_ROWS + 1))
  assert not called
  jax.clear_caches()


def test_vmap_lowers_for_cuda_with_the_kernel():
  x, *weight = dequant_cases.shapes('nf4', 1)
  run = jax.vmap(api.dequant_matmul, (0, None, None, None))
  several = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
  assert 'custom_call @mosaic_gpu' in hopper.lower(run, several, *weight)


def test_codes_are_looked_up_in_pairs():
  pairs = np.asarray(mosaic_gpu_rows._pairs(jnp.asarray(formats.NF4)))
  assert (pairs == pairs[:, :1]).all()
  low = (pairs[:, 0] & 0xFFFF).astype(np.uint16).view(np.float16)
  high = (pairs[:, 0] >> 16).astype(np.uint16).view(np.float16)
  code = formats.NF4.astype(np.float16)
  np.testing.assert_array_equal(low, np.tile(code, 16))
  np.testing.assert_array_equal(high, np.repeat(code, 16))
