"""Both attentions against loops in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.models import attention
from pallas_kernels.decode_attention import blockwise as decode_attention

_BATCH, _TIME, _HEADS, _KV_HEADS, _DIM = 2, 9, 4, 2, 4


def _inputs(seed=0, scale=2.0):
  rng = np.random.default_rng(seed)
  shape = lambda heads: (_BATCH, _TIME, heads, _DIM)
  make = lambda heads: rng.normal(size=shape(heads)).astype(np.float32) * scale
  return make(_HEADS), make(_KV_HEADS), make(_KV_HEADS)


def _naive(queries, keys, values, window, softcap):
  out = np.zeros(queries.shape)
  for b, t, h in itertools.product(*map(range, queries.shape[:3])):
    group = h // (_HEADS // _KV_HEADS)
    first = 0 if window is None else max(0, t - window + 1)
    scores = keys[b, first : t + 1, group].astype(np.float64) @ queries[b, t, h]
    if softcap is not None:
      scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights / weights.sum() @ values[b, first : t + 1, group]
  return out


_CASES = pytest.mark.parametrize(
  ('window', 'softcap'), [(None, None), (3, None), (None, 2.0), (1, 5.0)]
)


@_CASES
def test_full_attention_is_the_formula(window, softcap):
  inputs = _inputs()
  attend = jax.jit(
    lambda *x: attention.full_attention(*x, window=window, softcap=softcap)
  )
  np.testing.assert_allclose(
    attend(*inputs), _naive(*inputs, window, softcap), atol=2e-5
  )


@_CASES
@pytest.mark.parametrize('few', [2, 3])
def test_cached_attention_is_the_formula(monkeypatch, window, softcap, few):
  """Ragged rows, several blocks, and noise in the slots that nobody sees; three
  queries are few, or many."""
  monkeypatch.setattr(decode_attention, 'BLOCK', 4)
  monkeypatch.setattr(attention, 'FEW_QUERIES', few)
  queries, keys, values = _inputs()
  expected = _naive(queries, keys, values, window, softcap)
  # Row 1 stands two tokens behind row 0.
  positions = np.asarray([[6, 7, 8], [4, 5, 6]])
  slots = np.random.default_rng(1).normal(size=(2, _BATCH, _KV_HEADS, 12, _DIM))
  slots = (slots * 1e3).astype(np.float32)
  for row in range(_BATCH):
    live = positions[row].max() + 1
    slots[0, row, :, :live] = keys[row, :live].swapaxes(0, 1)
    slots[1, row, :, :live] = values[row, :live].swapaxes(0, 1)
  new = np.stack([queries[row, positions[row]] for row in range(_BATCH)])
  got = jax.jit(
    lambda *x: attention.cached_attention(*x, window=window, softcap=softcap)
  )(new, *map(jnp.asarray, slots), jnp.asarray(positions[:, 0]))
  assert np.isfinite(got).all()
  for row in range(_BATCH):
    np.testing.assert_allclose(
      got[row], expected[row, positions[row]], atol=2e-5
    )


def test_a_block_whose_keys_are_all_masked_leaves_no_trace(monkeypatch):
  """The first block of a row whose window begins behind it."""
  monkeypatch.setattr(decode_attention, 'BLOCK', 2)
  queries, keys, values = _inputs(scale=1.0)
  expected = _naive(queries, keys, values, 2, None)
  slots = [
    np.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))).swapaxes(1, 2)
    for x in (keys, values)
  ]
  # Row 0 needs block 0, where row 1 sees nothing.
  positions = jnp.asarray([[1], [8]])
  slots[0][1, :, :6], slots[1][1, :, :6] = 1e4, 1e4
  new = np.stack([queries[0, 1:2], queries[1, 8:9]])
  got = attention.cached_attention(
    jnp.asarray(new), *map(jnp.asarray, slots), positions[:, 0], window=2
  )
  np.testing.assert_allclose(got[0, 0], expected[0, 1], atol=2e-5)
  np.testing.assert_allclose(got[1, 0], expected[1, 8], atol=2e-5)
