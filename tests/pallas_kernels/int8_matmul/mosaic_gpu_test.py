"""The Hopper kernel of the int8 product, interpreted and lowered.

See `attention.mosaic_gpu_test` for where the interpreter runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.int8_matmul import api
from pallas_kernels.int8_matmul import mosaic_gpu
from pallas_kernels.int8_matmul import reference
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.short


def _case(m, k, n, seed=0):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.standard_normal((m, k)), jnp.float32)
  w = jnp.asarray(rng.integers(-127, 128, (k, n)), jnp.int8)
  return x, w, jnp.asarray(rng.uniform(0.1, 2, n), jnp.float32)


@hopper.runs_the_kernel
@pytest.mark.parametrize('out_dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('shape', [(130, 200, 300), (1, 700, 10), (128, 1, 1)])
def test_it_is_the_reference_to_the_last_bit(shape, out_dtype):
  arrays = _case(*shape)
  got = mosaic_gpu.int8_matmul(
    *arrays, out_dtype=out_dtype, interpret=hopper.interpreter()
  )
  right = reference.int8_matmul(*arrays, out_dtype=out_dtype)
  assert got.dtype == out_dtype
  np.testing.assert_array_equal(got, right)


@hopper.runs_the_kernel
def test_rows_that_come_quantized_and_rows_of_zeros():
  x, w, w_scales = _case(5, 70, 9)
  x = x.at[2].set(0)
  values, scales = api.quantize_rows(x)
  got = mosaic_gpu.int8_matmul(
    values, w, w_scales, scales, interpret=hopper.interpreter()
  )
  right = reference.int8_matmul(x, w, w_scales)
  np.testing.assert_array_equal(got, right)
  assert (got[2] == 0).all()


@hopper.runs_the_kernel
def test_it_has_no_races():
  arrays = _case(128, 128 * (mosaic_gpu.STEPS + 2), 256)
  got = mosaic_gpu.int8_matmul(
    *arrays, interpret=hopper.interpreter(detect_races=True)
  )
  assert not hopper.races_found()
  np.testing.assert_array_equal(got, reference.int8_matmul(*arrays))


@pytest.mark.parametrize('implementation', [None, 'mosaic_gpu'])
def test_it_lowers_for_cuda_with_the_kernel(implementation):
  shapes = (
    jax.ShapeDtypeStruct((33, 100), jnp.bfloat16),
    jax.ShapeDtypeStruct((100, 70), jnp.int8),
    jax.ShapeDtypeStruct((70,), jnp.float32),
  )
  run = lambda *arrays: api.int8_matmul(*arrays, implementation=implementation)
  assert 'custom_call @mosaic_gpu' in hopper.lower(run, *shapes)
  for platform in ('cpu', 'tpu'):
    if implementation is None:
      traced = jax.jit(run).trace(*shapes)
      lowered = traced.lower(lowering_platforms=(platform,)).as_text()
      assert 'mosaic_gpu' not in lowered


def test_what_it_does_not_take_is_said():
  x, w, w_scales = _case(2, 3, 4)
  with pytest.raises(NotImplementedError, match='got float64'):
    mosaic_gpu.int8_matmul(x, w, w_scales, out_dtype=np.float64)
  with pytest.raises(NotImplementedError, match='an axis is empty'):
    mosaic_gpu.int8_matmul(x[:0], w, w_scales)
