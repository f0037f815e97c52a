"""Tests of products of a few rows and a quantized matrix on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu as cpu
from pallas_kernels import llvm_ir
from pallas_kernels.dequant_matmul import api
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.dequant_matmul import llvm_cpu
from pallas_kernels.dequant_matmul import reference

pytestmark = [
  pytest.mark.short,
  pytest.mark.skipif(
    bool(cpu.missing()) or not llvm_ir.has('avx512f'),
    reason='needs llvmlite and a processor with AVX-512',
  ),
]
QUANTIZE = {
  kind: jax.jit(getattr(formats, f'quantize_{kind}'), static_argnums=1)
  for kind in ('int8', 'int4', 'nf4')
}
kinds = pytest.mark.parametrize('kind', QUANTIZE)
_run = functools.partial(api.dequant_matmul, implementation='llvm_cpu')
_compiled = jax.jit(_run, static_argnames='out_dtype')
_dequantize = jax.jit(reference.dequantize)


def _normal(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


@functools.cache
def _quantized(kind, inner, columns, group):
  w = _normal(inner, columns, seed=1) * 10.0 ** (np.arange(columns) % 5 - 2)
  w[:group, 3] = 0
  return QUANTIZE[kind](w.astype(np.float32), group)


def _close(got, x, quantized, units=2):
  """Within some float32 epsilons of |x| @ |w|."""
  w = np.asarray(_dequantize(*quantized), np.float64)
  x = np.asarray(x, np.float64)
  size = np.abs(x) @ np.abs(w)
  limit = units * float(jnp.finfo(jnp.float32).eps) * size
  error = np.abs(np.asarray(got, np.float64) - x @ w)
  np.testing.assert_array_less(error, limit + 1e-30)


@pytest.mark.parametrize(
  ('kind', 'rows'),
  [*(('int4', rows) for rows in range(1, 17)), ('int8', 1), ('int8', 7)],
)
def test_every_number_of_rows(kind, rows):
  quantized = _quantized(kind, 128, 704, 64)
  x = _normal(rows, 128)
  _close(_compiled(x, *quantized), x, quantized)


@kinds
@pytest.mark.parametrize(
  ('inner', 'columns', 'group'),
  [(32, 64, 32), (96, 64, 96), (64, 4544, 32), (768, 192, 384)],
)
def test_groups_of_every_size(inner, columns, group, kind):
  quantized = _quantized(kind, inner, columns, group)
  x = _normal(7, inner)
  _close(_compiled(x, *quantized), x, quantized)


@pytest.mark.parametrize('kind', ['int4', 'nf4', 'any'])
def test_every_code_in_every_place(kind):
  """One x at a time: rows of the weight come back to the last bit."""
  codes = (np.arange(64)[:, None] + 7 * np.arange(64)) % 16
  codebook = {'int4': None, 'nf4': formats.NF4}.get(kind, _normal(16))
  scales = np.float32(2.0 ** (np.arange(128.0) - 64).reshape(2, 64))
  values = jax.jit(formats.pack_int4)(codes)
  w = np.asarray(_dequantize(values, scales, codebook))
  for start in range(0, 64, 16):
    x = np.eye(64, dtype=np.float32)[start : start + 16]
    got = _compiled(x, values, scales, codebook)
    np.testing.assert_array_equal(got, w[start : start + 16])


def test_every_int8_comes_back():
  values = np.arange(-128, 128).astype(np.int8).reshape(16, 16)
  values = np.tile(values, (1, 4))
  ones = np.ones((1, 64), np.float32)
  got = _compiled(np.eye(16, dtype=np.float32), values, ones)
  np.testing.assert_array_equal(got, values)


@kinds
def test_narrow_rows_and_scales_are_widened(kind):
  values, scales, codebook = _quantized(kind, 128, 64, 32)
  quantized = (values, np.asarray(scales).astype(np.float16), codebook)
  for dtype in (jnp.bfloat16, jnp.float16):
    x = _normal(3, 128).astype(dtype)
    got = _compiled(x, *quantized, out_dtype=jnp.float32)
    _close(got, x, quantized)
    narrow = _compiled(x, *quantized)
    np.testing.assert_array_equal(narrow, np.asarray(got).astype(dtype))


@kinds
def test_the_gradient_is_left_to_the_next(kind):
  quantized = _quantized(kind, 64, 128, 32)
  x, d_out = _normal(3, 64), _normal(3, 128, seed=2)

  def gradient(implementation):
    run = lambda x: api.dequant_matmul(
      x, *quantized, implementation=implementation
    )
    return jax.jit(lambda x: jax.vjp(run, x)[1](d_out)[0])(x)

  want = gradient('blockwise')
  for names in (None, ('llvm_cpu', 'blockwise')):
    np.testing.assert_array_equal(gradient(names), want)
  with pytest.raises(NotImplementedError, match='not with its transpose'):
    gradient('llvm_cpu')


def test_the_platform_chooses():
  quantized = _quantized('nf4', 64, 64, 64)
  product = jax.jit(api.dequant_matmul).trace(jnp.ones((2, 64)), *quantized)
  assert 'llvm_cpu_' in product.lower(lowering_platforms=('cpu',)).as_text()
  assert 'llvm_cpu_' not in product.lower(lowering_platforms=('tpu',)).as_text()


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad):
  quantized = _quantized('int4', 64, 64, 32)
  x = _normal(4, 64)
  right = np.asarray(_compiled(x, *quantized))
  x[2, 5] = bad
  got = np.asarray(_compiled(x, *quantized))
  rest = np.asarray([0, 1, 3])
  np.testing.assert_array_equal(got[rest], right[rest])
  assert not np.isfinite(got[2]).all()


@pytest.mark.parametrize(
  ('rows', 'inner', 'columns', 'group', 'message'),
  [
    (17, 64, 64, 64, '17 rows are not 1 to 16'),
    (2, 24, 64, 24, r'\[24, 64\] in groups of 24 is not of multiples'),
    (2, 64, 96, 64, r'\[64, 96\] in groups of 64 is not of multiples'),
  ],
)
def test_what_the_kernel_does_not_take(rows, inner, columns, group, message):
  quantized = QUANTIZE['int8'](np.ones((inner, columns), np.float32), group)
  x = np.ones((rows, inner), np.float32)
  with pytest.raises(NotImplementedError, match=message):
    _run(x, *quantized)


def test_other_processors_leave_it_to_the_next(monkeypatch):
  monkeypatch.setattr(llvm_cpu.ll, 'has', lambda feature: False)
  with pytest.raises(NotImplementedError, match='no AVX-512'):
    _run(jnp.ones((5, 64)), *_quantized('nf4', 64, 64, 64))
