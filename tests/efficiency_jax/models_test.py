"""Every family gives the logits of transformers, with and without a cache.

The models are those of tests/golden; `peers` builds fresh ones as well.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from efficiency_jax.io import pretrained
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests.efficiency_jax.io import tiny_models
from tests.golden import make_families

pytestmark = pytest.mark.short

_FAMILIES = tuple(make_families.FAMILIES)
# Pieces of one token, of a draft, and of a prompt.
_PIECES = (32, 1, 5)


def _load(golden, directory):
  """Loads a golden model by the way of every checkpoint."""
  (directory / 'config.json').write_text(json.dumps(golden.config))
  safetensors.numpy.save_file(golden.weights, directory / 'model.safetensors')
  tokenizer = tiny_models.tokenizer().backend.to_str()
  (directory / 'tokenizer.json').write_text(tokenizer)
  return pretrained.load(directory)


def _at_once(lm, tokens):
  apply = jax.jit(transformer.apply_fn(lm.config))
  return np.asarray(apply(lm.params, jnp.asarray(tokens))[0].logits)


def _in_pieces(lm, tokens):
  """The same logits of two equal rows that grow at different speeds.

  The first row keeps every piece, the second rolls half of each back, as it
  would after a refused draft.
  """
  time = tokens.shape[1]
  apply = jax.jit(transformer.apply_fn(lm.config))
  # Rows at their end are fed token 0, which nothing sees.
  padded = np.zeros(time + max(_PIECES), np.int32)
  padded[:time] = tokens[0]
  cache = kv_cache.init(lm.config, 2, len(padded))
  found = np.full((2, len(padded), lm.config.vocab_size), np.nan)
  starts = np.zeros(2, np.int64)
  sizes = itertools.cycle(_PIECES)
  while starts.min() < time:
    size = next(sizes)
    places = starts[:, None] + np.arange(size)
    output, cache = apply(lm.params, jnp.asarray(padded[places]), cache)
    found[np.arange(2)[:, None], places] = output.logits
    np.testing.assert_array_equal(cache.length, starts + size)
    starts = np.minimum(starts + [size, (size + 1) // 2], time)
    cache = kv_cache.roll_back(cache, jnp.asarray(starts))
  return found[:, :time]


def _check(golden, directory):
  lm = _load(golden, directory)
  found = _at_once(lm, golden.tokens)
  np.testing.assert_allclose(found, golden.logits, rtol=0, atol=1e-4)
  found = _in_pieces(lm, golden.tokens)
  expected = np.concatenate([golden.logits] * 2)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', _FAMILIES)
def test_logits_are_those_of_transformers(tmp_path, name):
  path = make_families.DIRECTORY / f'{name}.safetensors'
  golden = make_families.read(path)
  # What the sequence must be longer than for the test to mean anything.
  assert golden.tokens.shape[1] > kv_cache.BLOCK
  assert golden.tokens.shape[1] > (golden.config.get('sliding_window') or 0)
  _check(golden, tmp_path)


@pytest.mark.peers
@pytest.mark.parametrize('seed', [101, 102, 103])
@pytest.mark.parametrize('name', _FAMILIES)
def test_logits_of_fresh_models(tmp_path, name, seed):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  _check(make_families.build(name, seed), tmp_path)
