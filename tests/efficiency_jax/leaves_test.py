"""Typed leaves: packing, the formula, the invariants."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from pallas_kernels.dequant_matmul import formats

pytestmark = pytest.mark.short


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('signed', [True, False])
def test_packing_keeps_every_value_in_exactly_its_bits(bits, signed):
  rng = np.random.default_rng(bits)
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
  values = rng.integers(low, high, (64, 5))
  values[0, :2] = low, high - 1
  packed = leaves.pack(jnp.asarray(values), bits)
  assert 8 * packed.size * packed.dtype.itemsize == bits * values.size
  codebook = None if signed else jnp.zeros(2**bits)
  q = leaves.QTensor(
    values=packed, codebook=codebook, bits=bits, dtype=jnp.dtype('float32')
  )
  np.testing.assert_array_equal(leaves.integers(q), values)
  assert q.matrix_shape == (64, 5)
  assert q.num_bytes == bits * values.size // 8 + (0 if signed else 4 * 2**bits)


def test_the_layout_of_planes_is_the_one_that_is_stated():
  """Bit i of byte j of plane p is bit p of the value of row 8 j + i."""
  values = np.random.default_rng(0).integers(0, 8, (16, 3))
  planes = np.asarray(leaves.pack(jnp.asarray(values), 3))
  for row in range(16):
    for plane in range(3):
      bit = planes[plane, row // 8] >> (row % 8) & 1
      np.testing.assert_array_equal(bit, values[row] >> plane & 1)


def _q(**fields) -> leaves.QTensor:
  values = np.random.default_rng(1).integers(-7, 8, (64, 6))
  plain = {
    'values': leaves.pack(jnp.asarray(values), 4),
    'scales': jnp.asarray(np.linspace(0.1, 1.2, 12).reshape(2, 6), jnp.float32),
    'bits': 4,
    'dtype': jnp.dtype('float32'),
  }
  return leaves.QTensor(**{**plain, **fields})


def test_a_weight_is_value_times_scale_plus_offset_and_then_outliers():
  offsets = jnp.arange(6.0)[None]
  kept = leaves.Outliers(jnp.array([0, 6 * 63 + 5]), jnp.array([9.0, -8.0]))
  code = jnp.linspace(-1, 1, 16) ** 3
  q = _q(offsets=offsets, codebook=code, outliers=kept)
  codes = np.asarray(formats.unpack_int4(q.values, signed=False))
  scales = np.repeat(np.asarray(q.scales), 32, axis=0)
  expected = np.asarray(code)[codes] * scales + np.arange(6.0)
  expected[0, 0], expected[63, 5] = 9, -8
  np.testing.assert_allclose(leaves.dequantize(q), expected, rtol=1e-6)
  table = dataclasses.replace(q, transposed=True)
  assert table.shape == (6, 64)
  np.testing.assert_array_equal(
    leaves.dequantize(table), leaves.dequantize(q).T
  )


@pytest.mark.parametrize(
  'fields',
  [
    {},
    {'offsets': jnp.ones((2, 6))},
    {'outliers': leaves.Outliers(jnp.array([7]), jnp.array([3.0]))},
    {'scales': jnp.full((1, 1), 0.3)},
    {'scales': formats.quantize_scales(jnp.abs(jnp.sin(jnp.ones((2, 6)))))},
  ],
)
def test_columns_are_rows_of_the_table(fields):
  q = _q(**fields, transposed=True)
  index = jnp.array([[3, 0], [5, 3]])
  rows = leaves.columns(q, index)
  chex.assert_shape(rows, (2, 2, 64))
  np.testing.assert_array_equal(rows, leaves.dequantize(q)[index])


def test_bits_a_weight_count_all_arrays():
  # Four bits, and a scale of 32 bits for 32 weights.
  assert _q().bits_per_weight == 5
  assert _q(scales=_q().scales.astype(jnp.float16)).bits_per_weight == 4.5


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'bits': 9}, 'bits must be in 1..8'),
    ({'bits': 3}, 'values of 3 bits cannot be uint8'),
    ({'bits': 8}, 'values of 8 bits cannot be uint8'),
    ({'scales': jnp.ones((3, 6))}, 'groups that divide 64'),
    ({'scales': jnp.ones((2, 5))}, r'scales must be \[groups, 6\]'),
    ({'offsets': jnp.ones((5, 6))}, 'offsets must be'),
    ({'codebook': jnp.ones(8)}, 'codebook must have 16 values'),
    ({'input_scales': jnp.ones(6)}, r'input_scales must be \[64\]'),
    (
      {'codebook': jnp.ones(16), 'activation': leaves.Activation()},
      'only integers without outliers',
    ),
  ],
)
def test_what_does_not_fit_is_said(fields, message):
  leaves.check(_q())
  with pytest.raises(ValueError, match=message):
    leaves.check(_q(**fields))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bits': 1}, 'activation bits must be in 2..8'),
    ({'per': 'column'}, "per 'row' or 'tensor'"),
    ({'bits': 4, 'threshold': 6.0}, 'a threshold for outliers'),
  ],
)
def test_activations_that_do_not_exist_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    leaves.Activation(**options)


def test_a_leaf_is_a_pytree_of_its_arrays():
  q = _q()
  doubled = jax.jit(lambda q: jax.tree.map(lambda x: x, q))(q)
  assert isinstance(doubled, leaves.QTensor)
  chex.assert_trees_all_equal(doubled, q)
