"""Tests of the int8 product on a CPU: all bits are those of the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu as cpu
from pallas_kernels import llvm_ir
from pallas_kernels.int8_matmul import api
from pallas_kernels.int8_matmul import llvm_cpu

pytestmark = [
  pytest.mark.short,
  pytest.mark.skipif(
    bool(cpu.missing()) or not llvm_ir.has('avx512vnni'),
    reason='needs llvmlite and a processor with AVX-512 VNNI',
  ),
]
SIZES = [(16, 64), (48, 320), (576, 192)]


def _weights(inner, columns, lowest=-127):
  rng = np.random.default_rng(inner + columns)
  w = jnp.asarray(rng.integers(lowest, 128, (inner, columns)), jnp.int8)
  return w, jnp.asarray(rng.random(columns), jnp.float32)


def _equal(x, w, w_scales, **options):
  found, expected = (
    api.int8_matmul(x, w, w_scales, implementation=name, **options)
    for name in ('llvm_cpu', 'reference')
  )
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize('rows', [1, 2, 6, 7, 13, 16])
@pytest.mark.parametrize(('inner', 'columns'), SIZES)
def test_float_rows(rows, inner, columns):
  x = np.random.default_rng(rows).normal(size=(rows, inner)) * 10
  _equal(jnp.asarray(x, jnp.float32), *_weights(inner, columns))


@pytest.mark.parametrize('rows', [1, 5, 16])
@pytest.mark.parametrize(('inner', 'columns'), SIZES)
def test_int8_rows_down_to_the_lowest_number(rows, inner, columns):
  rng = np.random.default_rng(rows)
  x = jnp.asarray(rng.integers(-128, 128, (rows, inner)), jnp.int8)
  scales = jnp.asarray(rng.random(rows), jnp.float32)
  _equal(x, *_weights(inner, columns, lowest=-128), x_scales=scales)


def test_the_largest_sums_are_exact():
  """255 * 127 * K passes 2^31 on the way, and the sum does not."""
  inner = 2**18 // 2
  x = jnp.full((2, inner), 127, jnp.int8).at[1].set(-127)
  w = jnp.full((inner, 64), 127, jnp.int8)
  _equal(x, w, jnp.ones(64), x_scales=jnp.ones(2))


def test_rows_of_zeros_ties_and_tiny_numbers():
  x = np.zeros((4, 64), np.float32)
  x[1] = np.linspace(-127, 127, 64).round() + 0.5  # half to even
  x[1, 0] = 127
  x[2] = 1e-37
  x[3, 5] = 3e38
  _equal(jnp.asarray(x), *_weights(64, 64))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad):
  x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
  good = api.int8_matmul(x, *_weights(64, 64), implementation='llvm_cpu')
  x[1, 7] = bad
  found = api.int8_matmul(x, *_weights(64, 64), implementation='llvm_cpu')
  assert not np.isfinite(found[1]).any()
  np.testing.assert_array_equal(found[::2], good[::2])


def test_the_platform_chooses():
  w, scales = _weights(64, 64)
  product = jax.jit(api.int8_matmul).trace(jnp.ones((2, 64)), w, scales)
  assert 'llvm_cpu_' in product.lower(lowering_platforms=('cpu',)).as_text()
  assert 'llvm_cpu_' not in product.lower(lowering_platforms=('tpu',)).as_text()


@pytest.mark.parametrize(
  ('rows', 'inner', 'columns', 'message'),
  [
    (17, 16, 64, '17 rows of 16 are not 1 to 16 rows'),
    (2, 2**17 + 16, 64, '262144 numbers together'),
    (7, 2**13 + 16, 64, 'more than 6 rows of 8208 are longer than 8192'),
    (2, 24, 64, r'\[24, 64\] is not of multiples of 16 and 64'),
    (2, 16, 96, r'\[16, 96\] is not of multiples'),
  ],
)
def test_what_the_kernel_does_not_take(rows, inner, columns, message):
  w, scales = _weights(inner, columns)
  with pytest.raises(NotImplementedError, match=message):
    llvm_cpu.int8_matmul(jnp.ones((rows, inner)), w, scales)
