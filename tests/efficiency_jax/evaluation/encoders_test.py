"""Fidelity and the sentiment head, against scipy and closed forms."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.stats

from efficiency_jax.evaluation import encoders
from efficiency_jax.io import pretrained_encoder
from efficiency_jax.models import encoder as encoder_lib
from tests.efficiency_jax.io import tiny_encoders

_TEXTS = ['good film', 'a bad film', 'films', 'good good good bad', 'a', 'bad']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return tiny_encoders.text_encoder(tmp_path_factory.mktemp('encoder'))


@pytest.mark.parametrize('batch_size', [1, 4, 32])
def test_embeddings_are_in_the_order_of_the_texts(model, batch_size):
  found = encoders.embed(model, _TEXTS, batch_size=batch_size)
  assert found.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
  apply = jax.jit(encoder_lib.apply_fn(model.config))
  tokens, mask = model.batch(_TEXTS)
  hidden = apply(model.params, tokens, mask)
  expected = encoder_lib.sentence_embedding(hidden, mask)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.model
def test_published_similarities():
  """Those that the documentation of the Hugging Face API shows for MiniLM."""
  texts = [
    'That is a happy person',
    'That is a happy dog',
    'That is a very happy person',
    'Today is a sunny day',
  ]
  found = encoders.embed(pretrained_encoder.load('minilm-l6'), texts)
  expected = [0.6945773, 0.9429151, 0.2568760]
  np.testing.assert_allclose(found[1:] @ found[0], expected, atol=1e-5)


def test_nothing_to_embed_is_refused(model):
  with pytest.raises(ValueError, match='at least one text'):
    encoders.embed(model, [])
  with pytest.raises(ValueError, match='batch_size must be >= 1'):
    encoders.embed(model, _TEXTS, batch_size=0)


def test_fidelity_of_a_model_with_itself_and_with_noise(model):
  reference = encoders.embed(model, _TEXTS)
  same = encoders.fidelity(reference, reference)
  assert dataclasses.astuple(same) == pytest.approx((1, 1, 1))
  rng = np.random.default_rng(0)
  noise = lambda leaf: leaf + 0.02 * rng.standard_normal(leaf.shape).astype('f')
  noisy = dataclasses.replace(model, params=jax.tree.map(noise, model.params))
  near = encoders.fidelity(reference, encoders.embed(noisy, _TEXTS))
  assert 0.9 < near.minimum_cosine < near.cosine < 1
  assert 0.5 < near.spearman <= 1


def test_fidelity_by_hand():
  reference = np.array([[1, 0], [0, 2], [1, 1]])
  other = np.array([[1, 0], [0, 1], [-1, 1]])
  found = encoders.fidelity(reference, other)
  assert found.cosine == pytest.approx(2 / 3)
  assert found.minimum_cosine == pytest.approx(0)
  # Similarities of the pairs are (0, .7, .7) and (0, -.7, .7).
  expected = scipy.stats.spearmanr([0, 1, 1], [0, -1, 1]).statistic
  assert found.spearman == pytest.approx(expected)


def test_turning_all_embeddings_changes_no_order():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((8, 4))
  turn, _ = np.linalg.qr(rng.standard_normal((4, 4)))
  found = encoders.fidelity(x, x @ turn)
  assert found.spearman == pytest.approx(1)
  assert found.cosine < 0.9


@pytest.mark.parametrize('ties', [False, True])
def test_spearman_is_that_of_scipy(ties):
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((2, 50))
  if ties:
    x, y = np.round(x), np.round(y + x)
  expected = scipy.stats.spearmanr(x, y).statistic
  assert encoders.spearman(x, y) == pytest.approx(expected, abs=1e-12)


def test_embeddings_that_cannot_be_compared_are_refused():
  for other in (np.ones((3, 4)), np.ones((2, 3))):
    with pytest.raises(ValueError, match='same three texts or more'):
      encoders.fidelity(np.ones((len(other), 3)), other)


def _clouds(n, rng):
  labels = rng.random(n) < 0.4
  x = rng.standard_normal((n, 3)) + np.where(labels, 1.0, -1.0)[:, None]
  return x.astype(np.float32), labels


def test_the_head_is_at_the_minimum():
  x, labels = _clouds(200, np.random.default_rng(0))
  head = encoders.fit_head(x, labels, l2=0.01)
  # The gradient of the loss, by hand and in float64.
  probability = 1 / (1 + np.exp(-np.asarray(head.scores(x), np.float64)))
  wrong = probability - labels
  slope = x.T.astype(np.float64) @ wrong / len(x)
  slope += 0.01 * np.asarray(head.weights)
  np.testing.assert_allclose(slope, 0, atol=1e-5)
  np.testing.assert_allclose(wrong.mean(), 0, atol=1e-5)
  again = encoders.fit_head(x, labels, l2=0.01)
  np.testing.assert_array_equal(head.weights, again.weights)


def test_two_clouds_are_told_apart():
  rng = np.random.default_rng(1)
  head = encoders.fit_head(*_clouds(500, rng))
  x, labels = _clouds(400, rng)
  found = encoders.accuracy(head, x, labels)
  # The best possible is Phi(sqrt(3)), about 0.96.
  assert 0.92 < found.accuracy < 0.99
  wrong = 1 - found.accuracy
  error = np.sqrt(found.accuracy * wrong / 400)
  assert found.standard_error == pytest.approx(error)
  assert found.count == 400
  turned = encoders.accuracy(head, x, ~labels)
  assert turned.accuracy == pytest.approx(wrong)


def test_a_head_needs_both_sentiments_and_one_label_each():
  x = np.ones((3, 2), np.float32)
  with pytest.raises(ValueError, match='both sentiments'):
    encoders.fit_head(x, np.ones(3, bool))
  with pytest.raises(
    ValueError, match=r'labels \[N\], got \(3, 2\) and \(2,\)'
  ):
    encoders.fit_head(x, np.array([True, False]))
