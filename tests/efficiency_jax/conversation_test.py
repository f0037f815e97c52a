"""Conversations with random weights."""

import jax
import pytest

from efficiency_jax import conversation
from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.io import untrained

ROOM = 96
SLOTS = ROOM + 1 + engine_lib.ADAPTIVE_LENGTHS[-1]  # as chats have it


@pytest.fixture(scope='module')
def lm():
  return untrained.language_model()


def _last(pieces):
  *_, last = pieces
  return last


def test_an_answer_continues_the_whole_conversation(lm):
  talked = conversation.Chat(lm, max_new_tokens=8, context=ROOM)
  messages = []
  for message in ('one', 'two'):
    got = _last(talked.answer(message))
    messages.append({'role': 'user', 'content': message})
    prompt = lm.tokenizer.apply_chat_template(messages)
    expected = generation.generate(
      talked.engine, [prompt], max_new_tokens=8, slots=SLOTS
    )
    assert got.rows[0].tokens.tolist() == expected.rows[0].tokens.tolist()
    messages.append({'role': 'assistant', 'content': got.texts[0]})
    assert talked.messages == messages


def test_answers_run_the_programs_that_were_compiled_at_the_start(lm, caplog):
  talked = conversation.Chat(lm, max_new_tokens=8, context=ROOM)
  talked.compile()
  with jax.log_compiles():
    for message in ('a', 'a longer message', 'b'):
      _last(talked.answer(message))
    quiet = len(caplog.records)
    jax.jit(lambda x: x + 1)(1.0)  # the log would have shown one
  messages = [record.getMessage() for record in caplog.records]
  compiled = [m.startswith('Compiling') for m in messages]
  assert not any(compiled[:quiet])
  assert any(compiled[quiet:])


def test_a_full_context_forgets_the_oldest_turns(lm):
  talked = conversation.Chat(lm, max_new_tokens=8, context=ROOM)
  forgotten = []
  for number in range(5):
    _last(talked.answer(f'message {number}'))
    forgotten.append(talked.forgotten)
  assert forgotten[0] == 0
  assert max(forgotten) >= 1
  assert talked.messages[-2]['content'] == 'message 4'
  assert talked.messages[0]['role'] == 'user'
  with pytest.raises(
    conversation.TooLongError, match='shorten it, raise context'
  ):
    next(talked.answer('x' * ROOM))
  assert talked.messages[-2]['content'] == 'message 4'
