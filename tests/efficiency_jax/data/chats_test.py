"""Conversations are read up to the break, and leaks are taken out."""

import json

import pytest

from efficiency_jax.data import chats
from efficiency_jax.data import prompts
from efficiency_jax.io.errors import FileFormatError


def _record(name, *turns):
  return {
    'id': name,
    'conversations': [{'from': role, 'value': text} for role, text in turns],
  }


_GOOD = _record('a', ('human', 'Hi'), ('gpt', 'Hello'), ('human', 'Bye'))


@pytest.fixture
def file(tmp_path, monkeypatch):
  path = tmp_path / 'chats.json'
  monkeypatch.setattr(chats.assets, 'fetch', lambda unused_name: path)
  return path


def _chat(*contents, name='x'):
  return chats.Chat(
    name=name,
    turns=tuple(
      chats.Turn(role=('user', 'assistant')[i % 2], content=text)
      for i, text in enumerate(contents)
    ),
  )


def test_roles_and_names_are_read(file):
  file.write_text(json.dumps([_GOOD], indent=2))
  (chat,) = chats.load('sharegpt')
  assert chat == _chat('Hi', 'Hello', 'Bye', name='sharegpt/a')


def test_every_cut_keeps_the_whole_records(file):
  other = _record('b', ('human', 'Ça va? \\ "q" 😀'), ('gpt', 'true'))
  whole = json.dumps([_GOOD, other], indent=2)
  ends = [whole.index('},\n  {\n    "id": "b"') + 1, whole.rindex('}') + 1]
  for cut in range(1, len(whole) + 1):
    file.write_text(whole[:cut])
    names = [chat.name for chat in chats.load()]
    expected = ['sharegpt/a', 'sharegpt/b'][: sum(cut >= end for end in ends)]
    assert names == expected, whole[:cut][-20:]


@pytest.mark.parametrize(
  'turns',
  [
    (),
    (('gpt', 'Hello'), ('human', 'Hi')),
    (('human', 'Hi'), ('gpt', ' \n')),
    (('human', 'Hi'), ('bing', 'Hello')),
    (('system', 'Be kind'), ('human', 'Hi')),
    (('human', 'Hi'), ('human', 'Hi again')),
  ],
)
def test_unusable_records_are_dropped(file, turns):
  file.write_text(json.dumps([_record('bad', *turns), _GOOD]))
  assert [chat.name for chat in chats.load()] == ['sharegpt/a']


def test_half_a_surrogate_pair_is_replaced(file):
  file.write_text(json.dumps([_record('a', ('human', 'x\ud83d y 😀'))]))
  assert chats.load()[0].turns[0].content == 'x\ufffd y 😀'


@pytest.mark.parametrize(
  ('text', 'problem'),
  [
    ('{}', 'not a JSON list'),
    ('[{"id": 1}]', 'record 1 is not a conversation'),
    ('[3]', 'record 1 is not a conversation'),
    (
      json.dumps([_GOOD, _GOOD]).replace('"from"', '"from', 1),
      'record 1 is damaged',
    ),
    (
      json.dumps([_GOOD, _GOOD, _GOOD]).replace('}, {"id"', '}, #{"id"', 1),
      'record 2 is damaged',
    ),
  ],
)
def test_damage_before_the_end_is_an_error(file, text, problem):
  file.write_text(text)
  with pytest.raises(FileFormatError, match=problem) as caught:
    chats.load()
  assert 'remove the file' in str(caught.value)


def test_other_encodings_are_an_error(file):
  file.write_bytes(b'[\xff\xfe')
  with pytest.raises(FileFormatError, match='UTF-8'):
    chats.load()


def test_unknown_chats_are_refused():
  with pytest.raises(ValueError, match="chats 'x' are unknown"):
    chats.load('x')


def test_user_prompts_are_unique_and_in_order():
  found = chats.user_prompts(
    [
      _chat('Why is it?', 'So.'),
      _chat('B' * 50),
      _chat('why  is it', 'No.'),
      _chat('Other', 'why is what'),
      _chat('?'),
      _chat('!'),
    ],
    max_characters=49,
  )
  assert found == ['Why is it?', 'Other', '?', '!']


def test_user_prompts_of_every_turn():
  talk = [_chat('One', 'no', 'Two', 'no', 'one'), _chat('Three', 'Two')]
  found = chats.user_prompts(talk, first_only=False)
  assert found == ['One', 'Two', 'Three']
  assert chats.user_prompts(talk) == ['One', 'Three']


def test_without_looks_for_whole_words_in_every_turn():
  message = 'Write a poem:\nof rain.'
  kept = [
    _chat('Write a poem', 'of rain'),  # Over two turns is nowhere.
    _chat('write a poem of rainbows'),
    _chat('rewrite a poem of rain'),
  ]
  dropped = [
    _chat('Please, WRITE a   poem of "rain"!'),
    _chat('Hi', 'You asked: write a poem of rain. Here'),
  ]
  assert chats.without(kept + dropped, [message]) == kept
  assert chats.without(kept + dropped, []) == kept + dropped


def test_without_finds_the_problem_inside_its_wrapping():
  code = 'def rolling(xs):\n  """From a list xs give the rolling maximum."""'
  message = f'Complete this Python function.\n\n```python\n{code}\n```'
  assert chats.without([_chat(f'Fix:\n{code}\n  return 1')], [message]) == []
  kept = [_chat('Complete this Python function. Now!')]
  assert chats.without(kept, [message, 'a\n```\nNow\n```']) == kept


def test_a_message_without_words_is_refused():
  with pytest.raises(ValueError, match='holds no words'):
    chats.without([], ['good', '...'])


@pytest.mark.network
def test_the_real_chats_have_their_known_size():
  loaded = chats.load()
  assert len(loaded) == 11_105
  messages = [
    prompt.message
    for name in ('mt-bench', 'humaneval')
    for prompt in prompts.load(name)
  ]
  assert len(chats.without(loaded, messages)) == 11_105
  assert len(chats.user_prompts(loaded)) == 10_249
