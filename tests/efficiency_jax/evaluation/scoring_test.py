"""Losses are -log p of the token that comes, whatever the chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.evaluation import scoring
from efficiency_jax.evaluation import speed
from efficiency_jax.models import transformer
from efficiency_jax.types import ModelOutput
from tests import fixtures


def _bigrams(params, tokens, cache=None, *, ancestors=None, segments=None):
  """A model that looks at one token: its logits are a row of a table."""
  del ancestors, segments
  logits = params[tokens]
  return ModelOutput(logits, logits), cache


def _identity(params, hidden):
  del params
  return hidden


def _expected(logits, tokens):
  """-log p [B, T] of all but the first token, in float64."""
  logits = np.asarray(logits, np.float64)[:, :-1]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  found = np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1)
  return np.pad(-found[..., 0], ((0, 0), (1, 0)))


def _tokens(shape, size=11, seed=0):
  return jnp.asarray(np.random.default_rng(seed).integers(0, size, shape))


def test_losses_of_a_model_of_pairs():
  table = jax.random.normal(jax.random.key(0), (11, 11)) * 2
  tokens = _tokens((3, 7))
  found = scoring.token_losses(_bigrams, _identity, table, tokens)
  assert found.dtype == jnp.float32
  expected = _expected(table[tokens], tokens)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_equal_logits_cost_the_log_of_the_vocabulary():
  tokens = _tokens((2, 5))
  found = scoring.token_losses(_bigrams, _identity, jnp.ones((11, 11)), tokens)
  np.testing.assert_allclose(found[:, 1:], np.log(11), rtol=1e-6)


def test_tokens_that_are_masked_do_not_count():
  table = jax.random.normal(jax.random.key(0), (11, 11))
  tokens = _tokens((2, 6))
  mask = jnp.asarray(np.random.default_rng(1).random((2, 6)) < 0.5)
  some = scoring.token_losses(_bigrams, _identity, table, tokens, mask)
  every = scoring.token_losses(_bigrams, _identity, table, tokens)
  np.testing.assert_array_equal(some, jnp.where(mask, every, 0))
  # Not even where they have no probability at all.
  table = table.at[:, 3].set(-jnp.inf)
  found = scoring.token_losses(_bigrams, _identity, table, tokens, tokens != 3)
  assert jnp.isfinite(found).all()


@pytest.mark.parametrize('chunk', [1, 7, 16, 4096])
def test_chunks_of_the_head_give_what_all_at_once_gives(monkeypatch, chunk):
  monkeypatch.setattr(scoring, 'CHUNK', chunk)
  config = fixtures.every_option()  # With a head of its own, and a soft-cap.
  head = transformer.head_fn(config)
  hidden_key, table_key = jax.random.split(jax.random.key(0))
  params = {'head': {'table': jax.random.normal(table_key, (11, config.width))}}
  hidden = jax.random.normal(hidden_key, (3, 17, config.width))
  tokens = _tokens((3, 17))
  losses, likeliest = jax.jit(
    lambda *rows: scoring.target_losses(head, params, *rows)
  )(hidden[:, :-1], tokens[:, 1:])
  logits = head(params, hidden)
  expected = _expected(logits, tokens)[:, 1:]
  np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-5)
  best = logits[:, :-1].argmax(-1)
  np.testing.assert_array_equal(likeliest, best == tokens[:, 1:])


def test_sequences_of_a_row_are_apart():
  config = fixtures.config(num_layers=1)
  params = fixtures.params(config)
  apply, head = transformer.apply_fn(config), transformer.head_fn(config)
  rows = _tokens((2, 5))
  one = rows.reshape(1, 10)
  segments = jnp.repeat(jnp.array([[1, 2]]), 5, axis=1)
  mask = jnp.arange(10)[None] != 5
  found = scoring.token_losses(apply, head, params, one, mask, segments)
  expected = scoring.token_losses(apply, head, params, rows)
  np.testing.assert_allclose(
    found.reshape(2, 5), expected, rtol=1e-5, atol=1e-5
  )


def test_logits_are_never_kept():
  config = fixtures.config(vocab_size=8192, num_layers=1)
  params = jax.eval_shape(
    lambda key: transformer.init(config, key), jax.random.key(0)
  )
  apply, head = transformer.apply_fn(config), transformer.head_fn(config)
  tokens = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
  run = jax.jit(lambda *rows: scoring.token_losses(apply, head, *rows))
  plan = speed.compiled_bytes(run, params, tokens)
  logits = 4 * 1024 * config.vocab_size * 4
  assert plan.temporary < logits / 2


@pytest.mark.parametrize('batch', [0, -1])
def test_a_batch_holds_something(batch):
  with pytest.raises(ValueError, match='batch must be at least 1'):
    scoring.check_batch(batch)
