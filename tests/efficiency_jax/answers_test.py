"""A model's own answers against plain passes over them."""

import dataclasses
import functools
import itertools
import types

import jax
import numpy as np
import pytest

from efficiency_jax import answers
from efficiency_jax import generation
from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from tests import fixtures

_PROMPTS = ([5, 6, 7, 5, 6], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
_SLOTS = 28


@functools.cache
def _model(stop: tuple[int, ...] = ()):
  """One whose distributions are peaked and depend on the text."""
  config = fixtures.config(vocab_size=257, max_positions=64)
  lm = untrained.language_model(config)
  return dataclasses.replace(
    lm,
    params=fixtures.params(config),
    tokenizer=dataclasses.replace(lm.tokenizer, stop_ids=stop),
  )


@functools.cache
def _stopping_model():
  """One that ends the answer to the first prompt with its fourth token."""
  row = answers.answer(_model(), _PROMPTS, slots=_SLOTS).tokens[0]
  new = row[len(_PROMPTS[0]) :].tolist()
  assert new[3] not in new[:3], 'the text must end at its fourth token'
  return _model((new[3],))


def _written(made: answers.Answers) -> list[list[int]]:
  return [
    row[first:last].tolist()
    for row, first, last in zip(
      made.tokens, made.start, made.length, strict=True
    )
  ]


@pytest.mark.parametrize(('temperature', 'stops'), [(0.0, True), (1.0, False)])
def test_hidden_states_are_those_of_one_pass_over_the_text(temperature, stops):
  lm = _stopping_model() if stops else _model()
  made = answers.answer(lm, _PROMPTS, slots=_SLOTS, temperature=temperature)
  assert made.hidden.dtype == np.float16
  assert made.hidden.shape == (3, _SLOTS, lm.config.width)
  assert made.tokens.shape == (3, _SLOTS)
  # Attention is causal: what stands behind a text does not matter.
  output, _ = jax.jit(transformer.apply_fn(lm.config))(lm.params, made.tokens)
  for row, length in enumerate(made.length):
    np.testing.assert_allclose(
      made.hidden[row, : length - 1].astype(np.float32),
      output.hidden[row, : length - 1],
      rtol=2e-3,
      atol=2e-4,
    )
    assert np.abs(made.hidden[row, : length - 1]).max(axis=1).min() > 0
    assert not made.hidden[row, length - 1 :].any()


@pytest.mark.parametrize(
  ('temperature', 'verifier'), [(0, None), (1, 'coupled')]
)
def test_answers_are_the_text_of_generate(temperature, verifier):
  lm = _stopping_model()
  made = answers.answer(
    lm, _PROMPTS, slots=_SLOTS, temperature=temperature, seed=5
  )
  texts = generation.generate(
    lm,
    _PROMPTS,
    drafter='plain',
    verifier=verifier,
    temperature=temperature,
    seed=5,
    max_new_tokens=_SLOTS,
  )
  for row, (prompt, mine) in enumerate(
    zip(_PROMPTS, _written(made), strict=True)
  ):
    assert made.tokens[row, : made.start[row]].tolist() == prompt
    # A row has less room than the budget of `generate`.
    assert mine == texts.rows[row].tokens[: len(mine)].tolist()


def test_an_answer_ends_with_its_stop_token_or_its_row():
  lm = _stopping_model()
  made = answers.answer(lm, _PROMPTS, slots=_SLOTS)
  (stop,) = lm.tokenizer.stop_ids
  assert made.start.tolist() == [len(p) for p in _PROMPTS]
  assert made.length[0] == made.start[0] + 4
  for text, length in zip(_written(made), made.length, strict=True):
    assert stop not in text[:-1]
    assert text[-1] == stop or length == _SLOTS - 1
  # Otherwise the test would not see a row that fills up.
  assert (made.length == _SLOTS - 1).any()


def test_sampled_answers_do_not_depend_on_the_batch():
  lm = _model()
  sample = functools.partial(
    answers.answer, lm, slots=_SLOTS, temperature=1.0, seed=3
  )
  whole = sample(_PROMPTS)
  parts = [sample(_PROMPTS[:1]), sample(_PROMPTS[1:], first_row=1)]
  together = jax.tree.map(lambda *x: np.concatenate(x), *parts)
  assert _written(together) == _written(whole)
  np.testing.assert_array_equal(together.length, whole.length)
  # float16 has 11 bits: the two may round to neighbours.
  np.testing.assert_allclose(
    together.hidden.astype(np.float32),
    whole.hidden.astype(np.float32),
    rtol=1e-3,
    atol=1e-3,
  )
  assert _written(sample(_PROMPTS[1:])) != _written(parts[1])
  assert _written(sample(_PROMPTS, seed=4)) != _written(whole)


def test_equal_prompts_have_answers_of_their_own():
  made = answers.answer(_model(), [[5, 6]] * 3, slots=_SLOTS, temperature=1.0)
  assert len({tuple(text) for text in _written(made)}) == 3


def test_states_need_not_be_kept():
  lm = _stopping_model()
  made = answers.answer(lm, _PROMPTS, slots=_SLOTS)
  bare = answers.answer(lm, _PROMPTS, slots=_SLOTS, keep_hidden=False)
  assert bare.hidden is None
  assert _written(bare) == _written(made)


def _talking_model():
  """One for which many a token ends a question."""
  return _model(tuple(range(100, 106)))


def test_questions_are_what_the_model_goes_on_with_and_ends():
  lm = _talking_model()
  ask = functools.partial(answers.questions, lm, slots=64, seed=2)
  found = list(itertools.islice(ask(batch=8), 12))
  assert found == list(itertools.islice(ask(batch=5), 12))
  assert found != list(itertools.islice(ask(batch=8, seed=3), 12))
  chat = [{'role': 'user', 'content': 'x'}]
  before = lm.tokenizer.apply_chat_template(chat).split('x')[0]
  ids = lm.tokenizer.encode(before)
  made = answers.answer(
    lm, [ids] * 40, slots=64, temperature=1.0, seed=2, keep_hidden=False
  )
  right = [
    lm.tokenizer.decode(text[:-1]).strip()
    for text in _written(made)
    if text[-1] in lm.tokenizer.stop_ids
  ]
  # Some rows fill up, and those are no questions.
  assert len(right) < 40
  assert found == [text for text in right if text][:12]


def test_a_model_that_ends_no_question_is_refused():
  message = 'ended none of 3 questions within 48 tokens'
  with pytest.raises(ValueError, match=message):
    next(answers.questions(_model(), slots=48, batch=3))


def test_a_template_that_changes_questions_is_refused():
  lm = _model()
  loud = types.SimpleNamespace(
    apply_chat_template=lambda chat: chat[0]['content'].upper()
  )
  lm = dataclasses.replace(lm, tokenizer=loud)
  with pytest.raises(ValueError, match='changes questions'):
    next(answers.questions(lm))


def test_every_prompt_needs_room_for_an_answer():
  lm = _model()
  longest = len(_PROMPTS[2])
  message = f'slots must be >= {longest + 2} .*, got {longest + 1}'
  with pytest.raises(ValueError, match=message):
    answers.answer(lm, _PROMPTS, slots=longest + 1)
  made = answers.answer(lm, _PROMPTS, slots=longest + 2)
  assert made.length.max() == longest + 1
  assert [len(text) for text in _written(made)][2] == 1
