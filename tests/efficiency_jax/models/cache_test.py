"""The cache is written row by row where its cursors stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.models import cache as kv_cache
from tests import fixtures


def test_an_empty_cache_has_whole_blocks():
  config = fixtures.config()
  cache = kv_cache.init(config, 3, 130, jnp.bfloat16)
  assert len(cache.keys) == len(cache.values) == 2
  assert cache.keys[0].shape == cache.values[1].shape == (3, 2, 256, 4)
  assert cache.keys[0].dtype == jnp.bfloat16
  assert cache.length.tolist() == [0, 0, 0]
  assert kv_cache.capacity(128) == 128
  with pytest.raises(ValueError, match='slots must be >= 1, got 0'):
    kv_cache.init(config, 3, 0)


def test_rows_are_written_at_their_own_cursor():
  rng = np.random.default_rng(0)
  buffer = rng.normal(size=(3, 2, 9, 4)).astype(np.float32)
  new = rng.normal(size=(3, 2, 4, 4)).astype(np.float32)
  start = [0, 5, 2]
  expected = buffer.copy()
  for row, first in enumerate(start):
    expected[row, :, first : first + 4] = new[row]
  got = jax.jit(kv_cache.write)(
    jnp.asarray(buffer), jnp.asarray(new), jnp.asarray(start)
  )
  np.testing.assert_array_equal(got, expected)
  # New entries take the dtype of the cache.
  narrow = kv_cache.write(
    jnp.asarray(buffer, jnp.bfloat16), jnp.asarray(new), jnp.asarray(start)
  )
  assert narrow.dtype == jnp.bfloat16


def test_rolling_back_moves_no_data():
  cache = kv_cache.init(fixtures.config(), 2, 8)
  back = kv_cache.roll_back(cache, jnp.asarray([3, 1]))
  assert back.keys[0] is cache.keys[0]
  assert back.length.tolist() == [3, 1]


def test_initializers_of_equal_configs_are_one_object():
  one = kv_cache.initializer(fixtures.config(), jnp.bfloat16)
  assert one is kv_cache.initializer(fixtures.config(), jnp.bfloat16)
  assert one(2, 10).keys[0].shape == (2, 2, 128, 4)


def test_an_accepted_path_is_moved_to_where_a_text_stands():
  rng = np.random.default_rng(0)
  config = fixtures.config()
  cache = kv_cache.init(config, 2, 16)
  full = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), cache
  )._replace(length=jnp.asarray([9, 12]))
  start, path = np.array([3, 5]), np.array([[0, 2, 5], [0, 1, 6]])
  kept = kv_cache.keep(full, jnp.asarray(start), jnp.asarray(path))
  assert kept.length.tolist() == [9, 12]
  for got, old in zip(
    kept.keys + kept.values, full.keys + full.values, strict=True
  ):
    right = np.array(old)
    for row in range(2):
      right[row, :, start[row] + np.arange(3)] = np.asarray(old)[
        row, :, start[row] + path[row]
      ]
    np.testing.assert_array_equal(got, right)


def test_a_cache_in_8_bits_holds_rows_with_their_own_scale():
  cache = kv_cache.init(fixtures.config(), 2, 16, jnp.int8)
  keys = cache.keys[0]
  assert isinstance(keys, kv_cache.Int8Slots)
  assert keys.values.shape == (2, 2, 128, 4)
  assert keys.values.dtype == jnp.int8
  assert keys.scales.shape == (2, 2, 128)
  rng = np.random.default_rng(0)
  new = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
  new[0, 0, 1] *= 100
  start = jnp.asarray([0, 5])
  keys = jax.jit(kv_cache.write)(keys, jnp.asarray(new), start)
  back = np.asarray(keys.dequantize(jnp.float32))
  for row, first in enumerate([0, 5]):
    found = back[row, :, first : first + 3]
    step = np.abs(new[row]).max(-1, keepdims=True) / 127
    assert (np.abs(found - new[row]) <= 0.501 * step).all()
  assert (back[1, :, :5] == 0).all()


def test_an_accepted_path_moves_scales_and_values_alike():
  rng = np.random.default_rng(0)
  cache = kv_cache.init(fixtures.config(), 2, 16, jnp.int8)
  full = jax.tree.map(
    lambda x: jnp.asarray(rng.integers(1, 100, x.shape)).astype(x.dtype), cache
  )
  start, path = jnp.asarray([3, 7]), jnp.asarray([[0, 2, 5], [0, 1, 4]])
  moved = kv_cache.keep(full, start, path)
  for row in range(2):
    for i in range(3):
      to, source = int(start[row]) + i, int(start[row] + path[row, i])
      for after, before in zip(moved.keys[1], full.keys[1], strict=True):
        np.testing.assert_array_equal(after[row, :, to], before[row, :, source])
