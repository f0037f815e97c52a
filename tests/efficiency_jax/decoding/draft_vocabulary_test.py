"""Reduced vocabularies against lists of tokens and the whole head."""

import collections

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.models import transformer
from tests import fixtures

_SIZE = 9
_token = st.integers(0, _SIZE - 1)


@hypothesis.given(
  texts=st.lists(st.lists(_token, max_size=12), max_size=3),
  always=st.sets(_token, max_size=3),
  size=st.integers(3, _SIZE),
)
def test_the_most_frequent_tokens_are_kept(texts, always, size):
  arrays = [np.asarray(text, np.int32) for text in texts]
  got = draft_vocabulary.by_frequency(arrays, size, _SIZE, always)
  counts = collections.Counter(token for text in texts for token in text)
  counts.update(always)
  order = sorted(range(_SIZE), key=lambda token: (-counts[token], token))
  others = [token for token in order if token not in always]
  kept = always | set(others[: size - len(always)])
  assert got.tolist() == [token for token in order if token in kept]
  assert got.dtype == np.int32


def test_texts_of_any_shape_count():
  got = draft_vocabulary.by_frequency(
    iter([np.array([[5, 5], [2, 5]]), [2, 8]]), 3, _SIZE
  )
  assert got.tolist() == [5, 2, 8]


@pytest.mark.parametrize('every', [False, True])
def test_a_reduced_head_is_part_of_the_head(every):
  config = fixtures.every_option() if every else fixtures.config()
  params = fixtures.params(config)
  hidden = np.random.default_rng(0).standard_normal((2, 3, config.width))
  hidden = jnp.asarray(hidden, jnp.float32)
  vocabulary = jnp.asarray([7, 0, 9, 3], jnp.int32)
  scores = transformer.head_fn(config)
  whole = scores(params, hidden)
  table = draft_vocabulary.table(params)
  assert table is params['head' if every else 'embedding']['table']
  part = scores(draft_vocabulary.head(params, vocabulary), hidden)
  np.testing.assert_allclose(part, whole[..., vocabulary], atol=1e-5)
  alone = draft_vocabulary.head(params)
  assert alone.keys() == {'head' if every else 'embedding'}
  np.testing.assert_array_equal(scores(alone, hidden), whole)
  columns = draft_vocabulary.columns(vocabulary, config.vocab_size)
  spread = np.asarray(jax.jit(draft_vocabulary.spread)(part, columns))
  right = np.full(whole.shape, -np.inf)
  right[..., np.asarray(vocabulary)] = part
  np.testing.assert_array_equal(spread, right)


def test_the_best_tokens_come_with_their_log_probabilities():
  logits = np.random.default_rng(0).standard_normal((2, 3, 4))
  vocabulary = np.asarray([7, 0, 9, 3], np.int32)
  order = np.argsort(-logits, axis=-1)[..., :3]
  weights = np.exp(logits)
  law = np.log(weights / weights.sum(-1, keepdims=True))
  given = jnp.asarray(logits, jnp.float32)
  for right, chosen in ((order, None), (vocabulary[order], vocabulary)):
    tokens, gains = draft_vocabulary.best(given, 3, chosen)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, right)
    expected = np.take_along_axis(law, order, axis=-1)
    np.testing.assert_allclose(gains, expected, rtol=1e-5)


@pytest.mark.parametrize('rows', [3, 40])
def test_log_probabilities_of_many_tokens_whatever_their_height(rows):
  """Three rows are summed by a kernel, forty are not."""
  logits = np.random.default_rng(0).standard_normal((rows, 64)) + 1e4
  given = jnp.asarray(logits, jnp.float32)
  _, gains = draft_vocabulary.best(given, 2)
  expected = jax.nn.log_softmax(given - 1e4)
  expected = -np.sort(-expected, axis=-1)[:, :2]
  np.testing.assert_allclose(gains, expected, atol=1e-3)


def test_a_vocabulary_is_of_the_size_of_its_form():
  check = draft_vocabulary.check
  check(None, None)
  check(jnp.arange(4), 4)
  for vocabulary, size, found in ((None, 4, None), (np.arange(3), None, 3)):
    message = f'must have {size} tokens as the form says, got {found}'
    with pytest.raises(ValueError, match=message):
      check(vocabulary, size)


def test_wrong_sizes_and_tokens_are_refused():
  make = draft_vocabulary.by_frequency
  with pytest.raises(ValueError, match='size must be in 1..9, got 0'):
    make([], 0, _SIZE)
  with pytest.raises(ValueError, match='size must be in 2..9, got 1'):
    make([], 1, _SIZE, always=(3, 4))
  with pytest.raises(ValueError, match='tokens must be in 0..8, got 1..9'):
    make([np.array([1, 9])], 3, _SIZE)
  with pytest.raises(ValueError, match='tokens must be in 0..8, got -1'):
    make([], 3, _SIZE, always=(-1,))
