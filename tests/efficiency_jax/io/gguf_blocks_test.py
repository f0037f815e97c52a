"""Tests of the way from blocks to leaves and back, against `gguf`."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax.io import gguf_blocks
from pallas_kernels.dequant_matmul import formats

pytestmark = pytest.mark.short

_KINDS = list(gguf_blocks.KINDS)
# Zeros of both signs, the largest and smallest, negative and common numbers.
_SCALES = (0.0, -0.0, 65504.0, -65504.0, 6e-8, -6e-8, 0.0123, -3.7)


def _name(kind):
  return kind.name


def _random_bytes(kind, rows=5, blocks=4):
  """Every value, with scales and minima that are hard."""
  rng = np.random.default_rng(0)
  dtype = gguf_blocks.KINDS[kind]
  raw = rng.integers(0, 256, (rows, blocks * dtype.itemsize), np.uint8)
  view = raw.view(dtype)
  for name in set(dtype.names) - {'q'}:
    view[name] = rng.choice(np.asarray(_SCALES, np.float16), view.shape)
  return raw


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('kind', _KINDS, ids=_name)
def test_a_leaf_has_the_values_and_gives_the_bytes_back(kind, transposed):
  raw = _random_bytes(kind)
  blocks = gguf_blocks.view(raw, kind)
  leaf = leaves.check(gguf_blocks.to_qtensor(blocks, transposed=transposed))
  expected = gguf.quants.dequantize(raw, kind)
  assert gguf_blocks.shape(blocks) == expected.shape
  expected = expected if transposed else expected.T
  assert leaf.shape == expected.shape
  np.testing.assert_array_equal(leaves.dequantize(leaf), expected)

  data, stored_as = gguf_blocks.stored(gguf_blocks.from_qtensor(leaf))
  assert stored_as == kind
  np.testing.assert_array_equal(data, raw)
  # In memory no more than on disk, but for the sixteen codes of Q4_1.
  assert leaf.num_bytes == raw.size + 64 * (kind.name == 'Q4_1')


@pytest.mark.parametrize('kind', _KINDS, ids=_name)
def test_quantize_is_that_of_gguf(kind):
  weight = np.random.default_rng(1).normal(size=(64, 6)).astype(np.float32)
  weight[:32, 0], weight[:, 1] = 0, -np.abs(weight[:, 1])
  expected = gguf.quants.quantize(np.ascontiguousarray(weight.T), kind)
  for leaf in (
    gguf_blocks.quantize(jnp.asarray(weight), kind),
    gguf_blocks.quantize(jnp.asarray(weight.T), kind.name, transposed=True),
  ):
    data, _ = gguf_blocks.stored(gguf_blocks.from_qtensor(leaf))
    np.testing.assert_array_equal(data, expected)


def test_quantize_refuses_other_kinds_and_shapes():
  with pytest.raises(ValueError, match='Q8_0, Q4_0, Q4_1'):
    gguf_blocks.quantize(jnp.ones((32, 2)), 'F32')
  with pytest.raises(ValueError, match='multiple of 32'):
    gguf_blocks.quantize(jnp.ones((48, 2)), 'Q8_0')


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_floats_are_stored_as_they_are(dtype):
  values = np.asarray(jnp.linspace(-3, 3, 12, dtype=dtype).reshape(3, 4))
  data, kind = gguf_blocks.stored(values)
  assert kind.name == {'float32': 'F32', 'float16': 'F16'}.get(dtype, 'BF16')
  np.testing.assert_array_equal(
    gguf.quants.dequantize(data, kind), values.astype(np.float32)
  )
  with pytest.raises(ValueError, match='int32'):
    gguf_blocks.stored(np.zeros(3, np.int32))


def test_rows_of_blocks_move_like_rows_of_numbers():
  blocks = gguf_blocks.view(_random_bytes(_KINDS[0]), _KINDS[0])
  both = np.concatenate([blocks[3:], blocks[:3]])
  assert gguf_blocks.is_blocks(both)
  assert not gguf_blocks.is_blocks(np.zeros(3, np.float32))
  found = gguf_blocks.to_qtensor(both).values
  expected = gguf_blocks.to_qtensor(blocks).values
  np.testing.assert_array_equal(found, np.roll(expected, 2, axis=1))


def _leaf(bits=8, group=32, rows=64, **fields):
  """A leaf of integers with a scale for each group, [rows, 3]."""
  rng = np.random.default_rng(2)
  low = -(2 ** (bits - 1))
  values = jnp.asarray(rng.integers(low, -low, (rows, 3)), jnp.int32)
  scales = jnp.asarray(rng.normal(size=(rows // group, 3)), jnp.float16)
  return leaves.QTensor(
    **{
      'values': leaves.pack(values, bits),
      'scales': scales,
      'bits': bits,
      'dtype': jnp.dtype('float32'),
      **fields,
    }
  )


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize(
  'fields',
  [
    {'group': 64, 'rows': 128},
    {'scales': jnp.full((1, 1), 0.25)},
    {'scales': jnp.full((2, 3), -0.5)},
    {'scales': None},
  ],
  ids=['group of 64', 'one scale', 'float32', 'no scale'],
)
def test_larger_groups_give_blocks_of_the_same_values(bits, fields):
  leaf = _leaf(bits, **fields)
  again = gguf_blocks.to_qtensor(gguf_blocks.from_qtensor(leaf))
  assert again.scales.shape == (leaf.shape[0] // 32, 3)
  np.testing.assert_array_equal(
    leaves.dequantize(again), leaves.dequantize(leaf)
  )


_OFFSETS = jnp.ones((2, 3), jnp.float16)
_CODES = jnp.arange(16, dtype=jnp.float32)
MISFITS = {
  'inputs': ({'rows': 48, 'group': 48}, 'multiple of 32: dequantize it'),
  'groups': ({'group': 16}, 'groups must be a multiple of 32'),
  'bits': ({'bits': 3}, '3 bits'),
  'float8': (
    {'values': jnp.ones((64, 3), jnp.float8_e4m3fn)},
    'float8_e4m3fn',
  ),
  'codebook': (
    {'bits': 4, 'codebook': jnp.asarray(formats.NF4)},
    'codebook, no offsets',
  ),
  'other codes': (
    {'bits': 4, 'codebook': _CODES - 8, 'offsets': _OFFSETS},
    'codebook, offsets',
  ),
  'signed with offsets': (
    {'bits': 4, 'offsets': _OFFSETS},
    'no codebook, offsets',
  ),
  'int8 with offsets': ({'offsets': _OFFSETS}, '8 bits'),
  'outliers': (
    {'outliers': leaves.Outliers(jnp.zeros(1, jnp.int32), jnp.ones(1))},
    'no outliers',
  ),
  'input scales': ({'input_scales': jnp.ones(64)}, 'no input_scales'),
  'activation': ({'activation': leaves.Activation()}, 'no activation'),
  'fine scales': ({'scales': jnp.full((2, 3), 0.1)}, 'float16: round them'),
  'large scales': ({'scales': jnp.full((2, 3), 1e6)}, 'float16: round them'),
  'no number': ({'scales': jnp.full((2, 3), jnp.nan)}, 'float16: round them'),
  'infinite': ({'scales': jnp.full((2, 3), jnp.inf)}, 'float16: round them'),
  'fine offsets': (
    {'bits': 4, 'codebook': _CODES, 'offsets': jnp.full((2, 3), 0.1)},
    'offsets are not numbers of float16',
  ),
  'quantized scales': (
    {'scales': formats.quantize_scales(jnp.ones((2, 3)))},
    'scales are quantized themselves',
  ),
}


@pytest.mark.parametrize('name', MISFITS)
def test_a_leaf_that_does_not_fit_is_refused_with_a_remedy(name):
  fields, problem = MISFITS[name]
  with pytest.raises(ValueError, match=problem) as caught:
    gguf_blocks.from_qtensor(_leaf(**fields))
  assert 'dequantize' in str(caught.value) or 'replace' in str(caught.value)


def test_the_remedy_for_fine_scales_works():
  leaf = _leaf(scales=jnp.full((2, 3), 0.1))
  half = leaf.scales.astype(jnp.float16)
  leaf = dataclasses.replace(leaf, scales=half)
  again = gguf_blocks.to_qtensor(gguf_blocks.from_qtensor(leaf))
  np.testing.assert_array_equal(again.values, leaf.values)
  np.testing.assert_array_equal(again.scales, leaf.scales)
