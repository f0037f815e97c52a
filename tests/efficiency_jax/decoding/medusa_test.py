"""Medusa's heads are the formula of the papers."""

import os

import chex
import jax
import numpy as np
import pytest

from efficiency_jax.decoding import medusa
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.decoding import medusa_models

_TARGET = medusa_models.TARGET
_VOCAB = _TARGET.vocab_size
_HEADS = medusa_models.FORMS[0]
_SIZE = len(medusa_models.VOCABULARY)

_logits = jax.jit(medusa.logits, static_argnums=(0, 3))


@pytest.mark.short
@pytest.mark.parametrize(
  ('own', 'rank', 'blocks'), [(False, 0, 1), (False, 3, 2), (True, 0, 1)]
)
@pytest.mark.parametrize('every', [False, True])
def test_new_heads_guess_what_the_target_guesses(own, rank, blocks, every):
  config = fixtures.every_option() if every else _TARGET
  params = fixtures.params(config)
  tokens = np.asarray([[1, 5, 2, 2], [3, 3, 0, 9]], np.int32)
  output, _ = jax.jit(transformer.apply_fn(config))(params, tokens)
  form = medusa.Heads(count=3, blocks=blocks, own=own, rank=rank)
  name = 'embedding' if config.tie_embeddings else 'head'
  key, size = jax.random.key(0), config.vocab_size
  heads = medusa_models.init(
    form, key, config.width, size, {name: params[name]}
  )
  head = transformer.head_fn(config)
  got = np.asarray(_logits(form, heads, output.hidden, head, params))
  chex.assert_shape(got, (2, 4, 3, size))
  again = jax.jit(head)(params, output.hidden)
  # Of programs that users get, a soft-cap is one in all of them.
  little = every and 'JAX_DISABLE_MOST_OPTIMIZATIONS' in os.environ
  exact = {'rtol': 0, 'atol': 1e-6 if little else 0}
  np.testing.assert_allclose(again, output.logits, **exact)
  for k in range(3):
    np.testing.assert_allclose(got[:, :, k], output.logits, atol=1e-5)
    if own:
      # Exact where the products have one shape; three heads have another.
      np.testing.assert_allclose(got[:, :, k], output.logits, **exact)


@pytest.mark.parametrize('own', [False, True])
def test_new_heads_of_few_tokens_are_part_of_the_head(own):
  params = fixtures.params(_TARGET)
  form = medusa.Heads(
    count=2, own=own, rank=0 if own else 3, vocabulary=_SIZE, markov=2
  )
  key, width = jax.random.key(0), _TARGET.width
  head = medusa_models.table(form)
  heads = medusa_models.init(form, key, width, _VOCAB, head)
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((4, width)).astype(np.float32)
  previous = rng.standard_normal((4, 2, width)).astype(np.float32)
  score = transformer.head_fn(_TARGET)
  got = _logits(form, heads, hidden, score, head, previous)
  right = np.asarray(jax.jit(score)(params, hidden))
  right = right[:, None, medusa_models.VOCABULARY]
  np.testing.assert_allclose(got, right.repeat(2, axis=1), atol=1e-5)
  with pytest.raises(ValueError, match='previous must be given if and only if'):
    medusa.logits(form, heads, hidden, score, head)
  with pytest.raises(ValueError, match='see it, got some for .*markov=0'):
    medusa.logits(_HEADS, heads, hidden, score, head, previous)
  with pytest.raises(ValueError, match='token must be given if and only if'):
    medusa.logits(form, heads, hidden, score, head, previous, hidden)
  if own:
    with pytest.raises(ValueError, match='must have the 8 rows .* got 11'):
      medusa.init(form, key, width, _VOCAB, params)
  with pytest.raises(ValueError, match='vocabulary must be <= 7, got 8'):
    medusa.init(form, key, width, 7, head)


@pytest.mark.parametrize('heads', medusa_models.FORMS, ids=str)
def test_a_head_is_the_formula_of_the_papers(heads):
  weights = medusa_models.weights(heads)
  hidden = medusa_models.hidden_width(heads)
  hidden = np.random.default_rng(0).standard_normal(hidden)
  previous, token = np.arange(heads.count) + 4, 2
  table = np.asarray(weights.target['embedding']['table'])
  got = _logits(
    heads,
    weights.draft,
    hidden.astype(np.float32),
    transformer.head_fn(_TARGET),
    {**weights.target, **medusa_models.table(heads)},
    table[previous] if heads.markov else None,
    table[token] if heads.token else None,
  )
  for k in range(1, heads.count + 1):
    right = medusa_models.formula(heads, hidden, k, previous[k - 1], token)
    np.testing.assert_allclose(got[k - 1], right, rtol=2e-4, atol=2e-4)


def test_what_is_no_form_is_refused():
  with pytest.raises(ValueError, match='count and blocks must be >= 1'):
    medusa.Heads(count=0)
  with pytest.raises(ValueError, match='rank must be 0'):
    medusa.Heads(own=True, rank=1)
  with pytest.raises(ValueError, match='vocabulary must be >= 1 or None'):
    medusa.Heads(vocabulary=0)
  few = medusa.Heads(count=3, vocabulary=2)
  with pytest.raises(ValueError, match='must have 2 tokens as the form says'):
    medusa.TrainedHeads(form=few, params={}, trees=())
