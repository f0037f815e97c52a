"""Tests of the int8 product on a CPU: all bits are those of the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu as cpu
from pallas_kernels import llvm_ir
from pallas_kernels.dequant_matmul import formats
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
  w = np.int8(rng.integers(lowest, 128, (inner, columns)))
  return w, np.float32(rng.random(columns))


@functools.cache
def _product(name):
  return jax.jit(functools.partial(api.int8_matmul, implementation=name))


def _equal(x, w, w_scales, **options):
  found, expected = (
    _product(name)(x, w, w_scales, **options)
    for name in ('llvm_cpu', 'reference')
  )
  np.testing.assert_array_equal(found, expected)


_pack = jax.jit(formats.pack_int4)


def _grouped(inner, columns, groups, packed, ends=None):
  """A weight of integers between two ends, or of all, scales and offsets."""
  rng = np.random.default_rng(inner + columns)
  low, high = ends or ((-8, 7) if packed else (-128, 127))
  values = rng.integers(low, high + 1, (inner, columns))
  w = _pack(values) if packed else values.astype(np.int8)
  draw = lambda: np.float32(rng.normal(size=(groups, columns)))
  return w, draw(), draw()


@pytest.mark.parametrize('rows', [1, 6, 7, 16, 70])
@pytest.mark.parametrize(('inner', 'columns'), SIZES)
def test_float_rows(rows, inner, columns):
  x = np.random.default_rng(rows).normal(size=(rows, inner)) * 10
  _equal(np.float32(x), *_weights(inner, columns))


@pytest.mark.parametrize('rows', [1, 5, 41])
@pytest.mark.parametrize(('inner', 'columns'), SIZES)
def test_int8_rows_down_to_the_lowest_number(rows, inner, columns):
  rng = np.random.default_rng(rows)
  x = np.int8(rng.integers(-128, 128, (rows, inner)))
  scales = np.float32(rng.random(rows))
  _equal(x, *_weights(inner, columns, lowest=-128), x_scales=scales)


def test_the_largest_sums_are_exact():
  """255 * 127 * K passes 2^31 on the way, and the sum does not."""
  inner = 2**18 // 2
  x = np.full((3, inner), 127, np.int8)
  x[1] = -127
  w = np.full((inner, 64), 127, np.int8)
  _equal(x, w, np.ones(64, np.float32), x_scales=np.ones(3, np.float32))


def test_rows_of_zeros_ties_and_tiny_numbers():
  x = np.zeros((4, 64), np.float32)
  x[1] = np.linspace(-127, 127, 64).round() + 0.5  # half to even
  x[1, 0] = 127
  x[2] = 1e-37
  x[3, 5] = 3e38
  _equal(x, *_weights(64, 64))


@pytest.mark.parametrize('rows', [1, 2, 6, 7, 13, 35])
def test_groups_of_every_number_of_rows(rows):
  w, scales, offsets = _grouped(192, 1216, 3, True)
  x = np.random.default_rng(rows).normal(size=(rows, 192))
  _equal(np.float32(x), w, scales, w_offsets=offsets)


@pytest.mark.parametrize('packed', [False, True])
def test_rows_of_int8_in_groups_take_turns(packed):
  rng = np.random.default_rng(0)
  x = np.int8(rng.integers(-128, 128, (41, 96)))
  w, scales, offsets = _grouped(96, 128, 3, packed)
  x_scales = np.float32(rng.random(41))
  _equal(x, w, scales, w_offsets=offsets, x_scales=x_scales)


@pytest.mark.parametrize(
  ('rows', 'groups', 'packed'),
  [(1, 1, True), (7, 1, False), (1, 3, False), (7, 3, True)],
)
def test_groups_with_and_without_offsets(rows, groups, packed):
  w, scales, offsets = _grouped(96, 192, groups, packed)
  x = np.random.default_rng(rows).normal(size=(rows, 96))
  for some in (None, offsets):
    _equal(np.float32(x), w, scales, w_offsets=some)


@pytest.mark.parametrize('packed', [False, True], ids=['int8', 'int4'])
@pytest.mark.parametrize(
  ('inner', 'columns', 'groups'),
  [
    (32, 64, 1),
    (96, 64, 1),
    (640, 64, 1),
    (64, 4544, 2),
    (576, 192, 18),
    (1536, 128, 12),
  ],
)
def test_groups_of_every_size(inner, columns, groups, packed):
  w, scales, _ = _grouped(inner, columns, groups, packed)
  rng = np.random.default_rng(groups)
  x = np.int8(rng.integers(-128, 128, (8, inner)))
  if packed:
    _equal(x.astype(jnp.bfloat16), w, scales)
  else:
    _equal(x, w, scales, x_scales=np.float32(rng.random(8)))


@pytest.mark.parametrize('x', [-128, -127, 0, 127])
@pytest.mark.parametrize(
  ('packed', 'value'),
  [(True, -8), (True, 7), (False, -128), (False, 127)],
)
def test_the_ends_of_the_range(packed, value, x):
  w, scales, offsets = _grouped(256, 64, 2, packed, (value, value))
  x = np.full((7, 256), x, np.int8)
  x[3] = 0
  x_scales = np.arange(7, dtype=np.float32) - 3
  _equal(x, w, scales, w_offsets=offsets, x_scales=x_scales)


def test_scales_are_read_as_they_are_stored():
  w, *factors = _grouped(128, 128, 4, True)
  x = np.float32(np.random.default_rng(0).normal(size=(3, 128)))
  for types in ((jnp.float16, jnp.float16), (jnp.float32, jnp.float16)):
    scales, offsets = (a.astype(t) for a, t in zip(factors, types, strict=True))
    _equal(x, w, scales, w_offsets=offsets)
  text = jax.jit(api.int8_matmul).lower(x, w, factors[0].astype(jnp.float16))
  assert 'xf16>' in text.as_text()
  assert 'stablehlo.convert' not in text.as_text()


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad):
  x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
  run = lambda: np.asarray(_product('llvm_cpu')(x, *_weights(64, 64)))
  good = run()
  x[1, 7] = bad
  found = run()
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
    (0, 16, 64, '0 rows of 16 are none'),
    (2, 2**18 + 16, 64, 'are none, or longer than 262144'),
    (2, 24, 64, r'\[24, 64\] in 1 groups is not of multiples of 16 and 64'),
    (2, 16, 96, r'\[16, 96\] in 1 groups is not of multiples'),
  ],
)
def test_what_the_kernel_does_not_take(rows, inner, columns, message):
  w, scales = _weights(inner, columns)
  with pytest.raises(NotImplementedError, match=message):
    llvm_cpu.int8_matmul(np.ones((rows, inner), np.float32), w, scales)


def test_a_long_group_of_several():
  w = np.zeros((2**14 + 64, 64), np.int8)
  with pytest.raises(NotImplementedError, match='rows share groups of 8224'):
    llvm_cpu.int8_matmul(jnp.ones((7, len(w))), w, jnp.ones((2, 64)))


def test_other_processors_leave_it_to_the_next(monkeypatch):
  monkeypatch.setattr(llvm_ir, 'has', lambda feature: False)
  with pytest.raises(NotImplementedError, match='no AVX-512 VNNI'):
    llvm_cpu.int8_matmul(jnp.ones((5, 64)), *_weights(64, 64))
