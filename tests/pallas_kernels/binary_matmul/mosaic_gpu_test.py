"""Products of signs on a Hopper GPU, interpreted and lowered.

See `attention/mosaic_gpu_test` for where the interpreter runs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.binary_matmul import api
from pallas_kernels.binary_matmul import mosaic_gpu
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.short


def _packed(rows, size, seed):
  x = np.random.default_rng(seed).standard_normal((rows, size))
  return np.where(x >= 0, 1, -1), api.pack_signs(jnp.asarray(x, jnp.float32))


@hopper.runs_the_kernel
@pytest.mark.parametrize('shape', [(56, 40, 300), (130, 1000, 5)], ids=str)
def test_it_is_the_product_of_integers(shape):
  m, k, n = shape
  (x, a), (y, b) = _packed(m, k, 0), _packed(n, k, 1)
  # What a word holds beyond K does not matter to the kernel either.
  if k % 32:
    a = a.at[:, -1].set(a[:, -1] | jnp.uint32(2**31))
  got = mosaic_gpu.binary_matmul(k, a, b, interpret=hopper.interpreter())
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, x @ y.T)


def test_it_lowers_for_cuda_with_the_kernel_from_enough_rows_on():
  def lowered(rows, implementation=None):
    run = functools.partial(
      api.binary_matmul, size=100, implementation=implementation
    )
    words = lambda rows: jax.ShapeDtypeStruct((rows, 4), jnp.uint32)
    return hopper.lower(run, words(rows), words(70))

  kernel = 'custom_call @mosaic_gpu'
  assert kernel in lowered(56)
  assert kernel in lowered(56, 'mosaic_gpu')
  assert kernel not in lowered(55)
  with pytest.raises(NotImplementedError, match='55 rows are too few'):
    lowered(55, 'mosaic_gpu')


def test_sums_that_float32_does_not_hold_are_refused():
  words = jnp.zeros((56, 2**19 + 1), jnp.uint32)
  with pytest.raises(NotImplementedError, match='16777217 signs are not exact'):
    jax.eval_shape(
      functools.partial(mosaic_gpu.binary_matmul, 2**24 + 1), words, words
    )
