"""Answers are those of rows of their own, and of a model one can compute."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

from efficiency_jax.data.choices import Choice
from efficiency_jax.data.choices import LastWord
from efficiency_jax.evaluation import accuracy
from efficiency_jax.io import untrained
from efficiency_jax.io.tokenizer import Tokenizer
from efficiency_jax.models import transformer
from tests import fixtures

_LETTERS = 'abcdefghijklmnopqrstuvwxyz '


def _model(config):
  plain = untrained.language_model()
  params = fixtures.params(config)
  return dataclasses.replace(plain, config=config, params=params)


@pytest.fixture(scope='module')
def lm():
  config = fixtures.config(vocab_size=257, num_layers=1, max_positions=4096)
  return _model(config)


@pytest.fixture(scope='module')
def alphabet():
  """A model sure that every byte is followed by the next one.

  Its state is the one-hot byte, of length sqrt(320) behind the norm. The head
  holds 3 / sqrt(320) at the byte before: the next byte has a logit of 3, the
  others of 0.
  """
  config = fixtures.config(
    vocab_size=257, width=320, num_layers=1, tie_embeddings=False
  )
  lm = untrained.language_model()
  symbols = lm.tokenizer.backend
  byte = lambda letter: symbols.token_to_id('Ġ' if letter == ' ' else letter)
  head = np.zeros((257, 320), np.float32)
  for letter, following in itertools.pairwise(_LETTERS):
    head[byte(following), byte(letter)] = 3 / np.sqrt(320)
  shapes = jax.eval_shape(
    lambda key: transformer.init(config, key), jax.random.key(0)
  )
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
  params |= {
    'embedding': {
      'table': jnp.asarray(30 * np.eye(257, 320, dtype=np.float32))
    },
    'head': {'table': jnp.asarray(head)},
    'final_norm': {'scale': np.ones(320, np.float32)},
  }
  return dataclasses.replace(lm, config=config, params=params)


# log p of a byte that follows, and of one that does not.
_TOTAL = np.exp(3.0) + 256
_RIGHT, _WRONG = 3 - np.log(_TOTAL), -np.log(_TOTAL)


def _questions(count=25, seed=0):
  rng = np.random.default_rng(seed)
  text = lambda low, high: ''.join(
    rng.choice(list(_LETTERS), rng.integers(low, high))
  )
  return [
    Choice(
      context='a' + text(1, 60),
      continuations=tuple(
        ' ' + text(1, 25) + 'z' for _ in range(rng.integers(2, 6))
      ),
      answer=int(rng.integers(2)),
    )
    for _ in range(count)
  ]


QUESTIONS = _questions()


@functools.partial(jax.jit, static_argnames='apply')
def _all_logits(apply, params, tokens):
  return apply(params, tokens[None])[0].logits[0]


def _alone(lm, context, continuation):
  """log p of a continuation, and whether it is greedy, from one whole row."""
  start = lm.tokenizer.encode(context)
  tail = np.array(lm.tokenizer.encode(continuation))
  tokens = np.zeros(96, np.int32)  # What comes later does not matter.
  tokens[: len(start) + len(tail)] = [*start, *tail]
  apply = transformer.apply_fn(lm.config)
  logits = np.asarray(_all_logits(apply, lm.params, tokens), np.float64)
  logits = logits[len(start) - 1 :][: len(tail)]
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return (
    log_p[np.arange(len(tail)), tail].sum(),
    bool((logits.argmax(-1) == tail).all()),
  )


@pytest.mark.parametrize('name', ['plain', 'every option'])
def test_a_tree_scores_what_rows_of_their_own_score(lm, name):
  if name != 'plain':
    config = fixtures.every_option(
      vocab_size=257, num_layers=2, windows=(3, None)
    )
    lm = _model(config)
  questions = QUESTIONS[:8]
  found = accuracy._answers(
    lm, [(q.context, q.continuations) for q in questions], 3, None
  )
  for question, answers in zip(questions, found, strict=True):
    for text, answer in zip(question.continuations, answers, strict=True):
      expected, greedy = _alone(lm, question.context, text)
      np.testing.assert_allclose(
        answer.log_likelihood, expected, rtol=1e-4, atol=1e-3
      )
      assert answer.greedy == greedy


def test_accuracies_by_their_definitions(lm):
  found = accuracy.choice_accuracy(lm, QUESTIONS)
  plain, normalized = [], []
  for question in QUESTIONS:
    total = np.array(
      [_alone(lm, question.context, t)[0] for t in question.continuations]
    )
    # The space in front does not count.
    size = np.array([len(text) - 1 for text in question.continuations])
    plain.append(total.argmax() == question.answer)
    normalized.append((total / size).argmax() == question.answer)
  np.testing.assert_array_equal(found.plain.sums, plain)
  np.testing.assert_array_equal(found.normalized.sums, normalized)
  share = np.mean(plain)
  np.testing.assert_allclose(
    found.plain.standard_error,
    np.sqrt(share * (1 - share) / (len(QUESTIONS) - 1)),
  )


def test_log_likelihoods_of_the_alphabet(alphabet):
  (answers,) = accuracy._answers(
    alphabet, [('xab', ['cde', 'cdx', 'z', 'pqr'])], 2, None
  )
  found = [answer.log_likelihood for answer in answers]
  expected = [
    3 * _RIGHT,
    2 * _RIGHT + _WRONG,
    _WRONG,
    _WRONG + 2 * _RIGHT,
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert [a.greedy for a in answers] == [True, False, False, False]


def test_long_answers_need_the_normalized_accuracy(alphabet):
  # The right answer costs 2.6 nats a byte, the wrong one 5.6 in all.
  question = Choice(context='a', continuations=('q', 'bcde'), answer=1)
  assert 4 * _RIGHT < _WRONG < _RIGHT
  found = accuracy.choice_accuracy(alphabet, [question, question])
  assert (found.plain.value, found.normalized.value) == (0, 1)


def test_lengths_count_bytes(alphabet):
  # A letter that follows and one of two bytes, against one that does not.
  question = Choice(context='a', continuations=('bé', 'q'), answer=0)
  cost = _RIGHT + 2 * _WRONG
  assert cost / 3 > _WRONG > cost / 2
  found = accuracy.choice_accuracy(alphabet, [question])
  assert (found.plain.value, found.normalized.value) == (0, 1)


def test_a_last_word_is_right_when_all_its_tokens_are(alphabet):
  passages = [
    LastWord(context='x ab', continuation='cde'),
    LastWord(context='x ab', continuation='cdx'),
    LastWord(context='x ab', continuation='xcd'),
    LastWord(context='b', continuation='c'),
    # The alphabet ends with a space, which belongs to the word.
    LastWord(context='xyz ', continuation='q'),
    LastWord(context='wxy', continuation='z '),
  ]
  found = accuracy.last_word_accuracy(alphabet, passages, batch=4)
  np.testing.assert_array_equal(found.sums, [1, 0, 0, 1, 0, 1])
  assert found.value == 0.5


def test_spaces_that_end_a_context_belong_to_the_continuation(alphabet):
  one = accuracy._tree(alphabet, 'xyz ', ['ab'])
  assert one == accuracy._tree(alphabet, 'xyz', [' ab'])
  assert one.sizes == [3]


def test_a_bos_stands_for_an_empty_context(alphabet):
  with pytest.raises(ValueError, match='empty context and the model no bos'):
    accuracy._answers(alphabet, [('', ['a'])], 1, None)
  backend = alphabet.tokenizer.backend
  backend = type(backend).from_str(backend.to_str())
  backend.post_processor = processors.TemplateProcessing(
    single='<|end|> $A', special_tokens=[('<|end|>', 256)]
  )
  tokenizer = Tokenizer(backend=backend, bos_id=256)
  lm = dataclasses.replace(alphabet, tokenizer=tokenizer)
  ((answer,),) = accuracy._answers(lm, [('', ['ab'])], 1, None)
  # The head knows nothing to follow a bos: all are equally likely.
  expected = -np.log(257) + _RIGHT
  np.testing.assert_allclose(answer.log_likelihood, expected, rtol=1e-5)
  assert accuracy._tree(lm, 'q', ['a']).tokens[0] == 256


def test_batches_of_other_sizes_give_the_same_answers(lm):
  calls = []
  one = accuracy.choice_accuracy(
    lm, QUESTIONS, batch=7, progress=lambda *n: calls.append(n)
  )
  other = accuracy.choice_accuracy(lm, QUESTIONS, batch=25)
  np.testing.assert_array_equal(one.plain.sums, other.plain.sums)
  np.testing.assert_array_equal(one.normalized.sums, other.normalized.sums)
  assert calls == [(7, 25), (14, 25), (21, 25), (25, 25)]


def test_buckets_are_few_and_hardly_too_large():
  buckets = {accuracy._bucket(size) for size in range(1, 1025)}
  assert len(buckets) == 14
  for size in range(1, 1025):
    assert size <= accuracy._bucket(size) < max(1.5 * size, 17)


@pytest.mark.parametrize('options', [{'batch': 0}, {}])
def test_nothing_to_do_is_refused(lm, options):
  with pytest.raises(ValueError, match='at least (1|one question)'):
    accuracy.choice_accuracy(lm, [], **options)


def test_what_the_model_cannot_read_is_refused(lm):
  config = dataclasses.replace(lm.config, max_positions=8)
  short = dataclasses.replace(lm, config=config)
  passage = LastWord(context='a long', continuation=' word')
  with pytest.raises(ValueError, match='has 11 tokens, more than the 8'):
    accuracy.last_word_accuracy(short, [passage])
