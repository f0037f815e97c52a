"""Prefill leaves the cache that feeding the prompt at once leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import prefill
from efficiency_jax.models import attention
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures


def test_slots_are_whole_chunks():
  chunk = prefill.CHUNK
  assert prefill.slots_for(1) == chunk
  assert prefill.slots_for(chunk) == chunk
  assert prefill.slots_for(chunk + 1) == 2 * chunk


@pytest.mark.parametrize(('chunk', 'wide'), [(4, 100), (2, 4)])
@pytest.mark.parametrize('longest', [1, 4, 5, 9, 10])
def test_the_cache_holds_all_but_the_last_token(
  monkeypatch, longest, chunk, wide
):
  monkeypatch.setattr(prefill, 'CHUNK', chunk)
  monkeypatch.setattr(prefill, 'WIDE', wide)
  monkeypatch.setattr(attention, 'FEW_QUERIES', 2)
  config = fixtures.every_option()
  params, apply = fixtures.params(config), transformer.apply_fn(config)
  rng = np.random.default_rng(0)
  lengths = np.asarray([longest, 1, (longest + 1) // 2])
  tokens = jnp.asarray(rng.integers(0, 11, (3, 10)), jnp.int32)
  cache, _ = prefill.prefill(
    apply, params, tokens, jnp.asarray(lengths), kv_cache.init(config, 3, 16)
  )
  assert cache.length.tolist() == (lengths - 1).tolist()
  whole, apply = kv_cache.init(config, 3, 16), jax.jit(apply)
  _, whole = apply(params, tokens, whole)
  for row, length in enumerate(lengths - 1):
    for got, expected in zip(
      (*cache.keys, *cache.values), (*whole.keys, *whole.values), strict=True
    ):
      np.testing.assert_allclose(
        got[row, :, :length], expected[row, :, :length], atol=1e-5
      )
  # What stands behind the cursor is finite and does not count.
  following = jnp.take_along_axis(
    tokens, jnp.asarray(lengths)[:, None] - 1, axis=1
  )
  got, _ = apply(params, following, cache)
  expected, _ = apply(params, tokens, None)
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(
      got.logits[row, 0], expected.logits[row, length - 1], atol=1e-5
    )
