"""Perplexity and divergence by their definitions, on the windows promised."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from efficiency_jax.evaluation import estimates
from efficiency_jax.evaluation import quality
from efficiency_jax.io import untrained
from efficiency_jax.io.tokenizer import Tokenizer
from efficiency_jax.models import transformer
from tests import fixtures

_WORDS = ('the', 'cat', 'sat', 'on', 'a', 'mat', 'and', 'looked', 'at', 'dogs')


def _documents(count=30, words=25, seed=0):
  """Texts of which every one starts with its number."""
  rng = np.random.default_rng(seed)
  return [
    f'{number:03d} ' + ' '.join(rng.choice(_WORDS, rng.integers(3, words)))
    for number in range(count)
  ]


DOCUMENTS = _documents()


def _with_bos(lm):
  """The same model, trained on documents that start with token 256."""
  backend = type(lm.tokenizer.backend).from_str(lm.tokenizer.backend.to_str())
  backend.post_processor = processors.TemplateProcessing(
    single='<|end|> $A', special_tokens=[('<|end|>', 256)]
  )
  tokenizer = Tokenizer(backend=backend, bos_id=256, eos_id=256)
  return dataclasses.replace(lm, tokenizer=tokenizer)


@pytest.fixture(scope='module')
def lm():
  plain = untrained.language_model()
  return dataclasses.replace(plain, params=fixtures.params(plain.config))


@pytest.fixture(scope='module')
def disturbed(lm):
  """A model nearly like `lm`, as a quantized one is."""
  rng = np.random.default_rng(5)
  noisy = lambda x: x * (1 + 0.01 * rng.standard_normal(x.shape, np.float32))
  return dataclasses.replace(lm, params=jax.tree.map(noisy, lm.params))


def _segments(packed):
  """Every piece of text of some windows, and its mask."""
  for tokens, segments, mask in zip(
    packed['tokens'], packed['segments'], packed['loss_mask'], strict=True
  ):
    for number in range(1, segments.max() + 1):
      yield tokens[segments == number], mask[segments == number]


def _texts(lm, packed):
  return [lm.tokenizer.decode(tokens) for tokens, _ in _segments(packed)]


@pytest.mark.parametrize('tokens', [1, 100, 700])
@pytest.mark.parametrize('bos', [False, True])
def test_windows_predict_as_many_tokens_as_asked_for(lm, tokens, bos):
  tokenizer = (_with_bos(lm) if bos else lm).tokenizer
  packed = quality.windows(tokenizer, DOCUMENTS, tokens=tokens, length=64)
  assert packed['tokens'].shape[1] == 64
  assert packed['loss_mask'].sum() == tokens
  for piece, mask in _segments(packed):
    assert (piece[0] == 256) == bos
    np.testing.assert_array_equal(mask, np.arange(len(piece)) > 0)
    text = tokenizer.decode(piece)
    assert any(text in document for document in DOCUMENTS)


def test_windows_take_one_piece_of_every_document_before_a_second(lm):
  letters = [chr(97 + number) for number in range(26)]
  documents = [letter * 48 for letter in letters]
  windows = functools.partial(quality.windows, lm.tokenizer, length=16)
  # Three pieces of 15 tokens to predict each.
  for times in (1, 2, 3):
    packed = windows(documents, tokens=times * 26 * 15)
    texts = _texts(lm, packed)
    assert sorted(texts) == sorted(letter * 16 for letter in letters * times)
  # All there is to predict, but for rests of one token.
  most = sum(len(text) - -(-len(text) // 16) for text in DOCUMENTS)
  assert sorted(_texts(lm, windows(DOCUMENTS, tokens=most))) == sorted(
    document[place : place + 16]
    for document in DOCUMENTS
    for place in range(0, len(document), 16)
    if len(document) - place > 1
  )


def test_documents_and_their_pieces_are_drawn(lm):
  letters = [chr(97 + number) for number in range(26)]
  documents = [letter * 16 + letter.upper() * 16 for letter in letters]
  draws = []
  for seed in range(2):
    packed = quality.windows(
      lm.tokenizer, documents, tokens=10 * 15, length=16, seed=seed
    )
    draws.append({text[0] for text in _texts(lm, packed)})
  for draw in draws:
    assert len(draw) == len({letter.lower() for letter in draw}) == 10
    assert any(map(str.islower, draw))
    assert any(map(str.isupper, draw))
  one, other = ({letter.lower() for letter in draw} for draw in draws)
  assert one != other


def test_windows_are_the_same_for_the_same_seed(lm):
  options = {'tokens': 300, 'length': 32}
  one = quality.windows(lm.tokenizer, DOCUMENTS, **options)
  same = quality.windows(lm.tokenizer, DOCUMENTS, **options)
  other = quality.windows(lm.tokenizer, DOCUMENTS, seed=1, **options)
  for name in one:
    np.testing.assert_array_equal(one[name], same[name])
  assert sorted(_texts(lm, one)) != sorted(_texts(lm, other))


def test_one_long_document_is_enough(lm):
  packed = quality.windows(lm.tokenizer, ['ab' * 500], tokens=800, length=32)
  assert packed['loss_mask'].sum() == 800


def test_text_that_spells_a_token_is_text(lm):
  packed = quality.windows(lm.tokenizer, ['a<|end|>b'], tokens=8, length=16)
  assert (packed['tokens'] < 256).all()


@pytest.mark.parametrize(
  ('documents', 'options', 'message'),
  [
    (DOCUMENTS, {'tokens': 0}, 'tokens must be at least 1'),
    (DOCUMENTS, {'tokens': 9, 'length': 1}, 'length must be at least 2'),
    (DOCUMENTS, {'tokens': 10**6}, 'documents hold .* 1000000 were asked'),
    (['', ''], {'tokens': 1}, 'documents hold 0 tokens'),
    (['a', 'b'], {'tokens': 1}, 'documents hold 0 tokens'),
    ([], {'tokens': 1}, 'documents hold 0 tokens'),
  ],
)
def test_what_makes_no_windows_is_refused(lm, documents, options, message):
  with pytest.raises(ValueError, match=message) as caught:
    quality.windows(lm.tokenizer, documents, **options)
  assert '\n' not in str(caught.value)


def test_windows_longer_than_the_context_are_refused(lm):
  with pytest.raises(ValueError, match='at most the 4096 tokens'):
    quality.perplexity(lm, DOCUMENTS, tokens=9, length=5000)


def test_equal_logits_have_the_perplexity_of_the_vocabulary(lm):
  params = {**lm.params, 'embedding': {'table': jnp.zeros((257, 64))}}
  blind = dataclasses.replace(lm, params=params)
  found = quality.perplexity(blind, DOCUMENTS, tokens=400, length=32)
  for value in (found.value, found.low, found.high):
    np.testing.assert_allclose(value, 257, rtol=1e-5)
  assert found.tokens == 400
  np.testing.assert_allclose(found.nats.value, math.log(257), rtol=1e-6)


@functools.partial(jax.jit, static_argnames='apply')
def _all_logits(apply, params, tokens):
  return apply(params, tokens[None])[0].logits[0]


def _logits(lm, tokens):
  """Logits [T, V] of one sequence, in float64."""
  padded = np.zeros(48, np.int32)  # What comes later does not matter.
  padded[: len(tokens)] = tokens
  apply = transformer.apply_fn(lm.config)
  logits = np.asarray(_all_logits(apply, lm.params, padded), np.float64)
  return logits[: len(tokens)]


def _log_p(logits):
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize('bos', [False, True])
def test_perplexity_is_that_of_every_piece_by_itself(lm, bos):
  lm = _with_bos(lm) if bos else lm
  options = {'tokens': 250, 'length': 40}
  found = quality.perplexity(lm, DOCUMENTS, **options)
  packed = quality.windows(lm.tokenizer, DOCUMENTS, **options)
  losses = [
    -_log_p(_logits(lm, piece))[np.arange(len(piece) - 1), piece[1:]]
    for piece, _ in _segments(packed)
  ]
  expected = np.exp(np.concatenate(losses).mean())
  np.testing.assert_allclose(found.value, expected, rtol=1e-4)
  assert found.tokens == 250
  assert len(found.nats.sums) == len(packed['tokens']) > 5
  assert found.low < found.value < found.high


def test_batches_and_progress_do_not_change_the_numbers(lm):
  options = {'tokens': 250, 'length': 40}
  calls = []
  few = quality.perplexity(
    lm, DOCUMENTS, batch=3, progress=lambda *n: calls.append(n), **options
  )
  many = quality.perplexity(lm, DOCUMENTS, batch=8, **options)
  np.testing.assert_allclose(few.nats.sums, many.nats.sums, rtol=1e-5)
  total = len(many.nats.sums)
  assert total % 3
  assert calls == [(min(done, total), total) for done in range(3, total + 3, 3)]
  with pytest.raises(ValueError, match='batch must be at least 1'):
    quality.perplexity(lm, DOCUMENTS, batch=0, **options)


def test_small_losses_show_in_pairs(lm, disturbed):
  options = {'tokens': 400, 'length': 32}
  a = quality.perplexity(lm, DOCUMENTS, **options)
  b = quality.perplexity(disturbed, DOCUMENTS, **options)
  found = estimates.compare(b.nats, a.nats)
  apart = np.hypot(a.nats.standard_error, b.nats.standard_error)
  assert 0 < found.standard_error < apart / 5


def test_divergence_by_its_definition(lm, disturbed):
  options = {'tokens': 250, 'length': 40}
  reference = quality.reference(lm, DOCUMENTS, **options)
  found = quality.kl(reference, disturbed)
  distances, same = [], []
  for piece, _ in _segments(reference.windows):
    p, q = (_log_p(_logits(m, piece)[:-1]) for m in (lm, disturbed))
    distances.append((np.exp(p) * (p - q)).sum(-1))
    same.append(p.argmax(-1) == q.argmax(-1))
  expected = np.concatenate(distances).mean()
  np.testing.assert_allclose(found.nats.value, expected, rtol=1e-3)
  assert 0 < found.nats.low < found.nats.value < found.nats.high
  np.testing.assert_allclose(
    found.agreement.value, np.concatenate(same).mean(), rtol=1e-6
  )
  # Both perplexities are those of passes of their own.
  for mine, other in (
    (reference.perplexity, lm),
    (found.perplexity, disturbed),
  ):
    alone = quality.perplexity(other, DOCUMENTS, **options)
    np.testing.assert_allclose(mine.nats.sums, alone.nats.sums, rtol=1e-5)
    np.testing.assert_array_equal(mine.nats.counts, alone.nats.counts)


def test_a_model_does_not_diverge_from_itself(lm):
  reference = quality.reference(lm, DOCUMENTS, tokens=100, length=32)
  # The reference is not run again, an equal model is.
  for same in (lm, dataclasses.replace(lm)):
    found = quality.kl(reference, same, batch=3)
    np.testing.assert_allclose(found.nats.value, 0, atol=1e-6)
    np.testing.assert_allclose(
      found.perplexity.nats.sums, reference.perplexity.nats.sums, rtol=1e-5
    )
    assert found.agreement.value == 1
    assert found.perplexity.tokens == found.agreement.counts.sum() == 100


def test_other_vocabularies_are_not_compared(lm):
  reference = quality.reference(lm, DOCUMENTS, tokens=50, length=32)
  backend = type(lm.tokenizer.backend).from_str(lm.tokenizer.backend.to_str())
  backend.add_tokens(['cat'])
  other = dataclasses.replace(lm, tokenizer=Tokenizer(backend=backend))
  with pytest.raises(ValueError, match='different tokenizers'):
    quality.kl(reference, other)
