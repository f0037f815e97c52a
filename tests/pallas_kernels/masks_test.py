"""Tiles and the range of keys; `attention_test` proves the mask itself."""

import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np

from pallas_kernels import masks


def test_tiles_are_the_matrix_they_were_made_of():
  matrix = np.random.default_rng(0).random((5, 7)) < 0.4
  tiles = masks.Tiles.of((4, 8), matrix)
  np.testing.assert_array_equal(tiles.as_array(7), matrix)
  assert tiles.density(7) == matrix.mean()
  assert hash(tiles) == hash(masks.Tiles.of((4, 8), matrix.copy()))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  causal=st.booleans(),
  window=st.one_of(st.none(), st.integers(1, 20)),
  offset=st.tuples(st.integers(-9, 30), st.integers(-9, 30)),
  kv_length=st.tuples(st.integers(0, 20), st.integers(0, 20)),
  first=st.integers(0, 12),
)
def test_no_key_outside_the_range_is_seen(
  causal, window, offset, kv_length, first
):
  rule = masks.Rule(scale=1.0, causal=causal, window=window)
  limits = masks.Limits(jnp.asarray(offset), jnp.asarray(kv_length), None, None)
  low, high = masks.key_range(rule, limits, jnp.int32(first), 4, 20)
  seen = masks.as_array(rule, limits, 16, 20)[:, first : first + 4]
  seen = np.asarray(seen).any((0, 1))
  assert not seen[: max(int(low), 0)].any()
  assert not seen[int(high) :].any()
  assert 0 <= int(high) <= 20
  # And the range is not loose: with one row its ends are seen, if any are.
  if offset[0] == offset[1] and kv_length[0] == kv_length[1] and seen.any():
    assert seen[int(high) - 1]
    assert seen[int(low)]
