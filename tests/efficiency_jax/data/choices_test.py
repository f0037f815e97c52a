"""Questions are put together from the requests that score them."""

import gzip
import json

import pytest

from efficiency_jax.data import choices
from efficiency_jax.data.choices import Choice
from efficiency_jax.data.choices import LastWord
from efficiency_jax.io.errors import FileFormatError


@pytest.fixture
def file(tmp_path, monkeypatch):
  path = tmp_path / 'requests.jsonl.gz'
  monkeypatch.setattr(choices.assets, 'fetch', lambda unused_name: path)
  return path


def _request(document, place, label, context, continuation):
  return {
    'doc_id': document,
    'idx': place,
    'label': label,
    'request': {'context': context, 'continuation': continuation},
    'task_name': 'other things are there',
  }


def _write(path, *requests):
  with gzip.open(path, 'wt', encoding='utf8') as file:
    file.writelines(json.dumps(request) + '\n' for request in requests)


def test_requests_of_a_question_are_its_continuations(file):
  _write(
    file,
    _request(0, 1, 1, 'Question: é?\nAnswer:', ' no'),
    _request(0, 0, 1, 'Question: é?\nAnswer:', ' yes'),
    _request(7, 0, 0, 'Two', ' one'),
    _request(7, 1, 0, 'Two', ' two'),
    _request(7, 2, 0, 'Two', ' three'),
    _request(1_000_000, 0, 1, 'Answer:', ' yes'),
    _request(1_000_007, 0, 0, 'Answer:', ' one'),
  )
  assert choices.load('piqa') == [
    Choice(
      context='Question: é?\nAnswer:', continuations=(' yes', ' no'), answer=1
    ),
    Choice(context='Two', continuations=(' one', ' two', ' three'), answer=0),
  ]


def test_last_words_keep_their_order(file):
  _write(
    file,
    _request(0, 0, ['signs'], 'He saw the', ' signs'),
    _request(1, 0, ['dog'], 'It was a', ' dog'),
  )
  assert choices.last_words() == [
    LastWord(context='He saw the', continuation=' signs'),
    LastWord(context='It was a', continuation=' dog'),
  ]


@pytest.mark.parametrize(
  'requests',
  [
    [_request(0, 0, 0, 'a', ' b')],
    [_request(0, 0, 2, 'a', ' b'), _request(0, 1, 2, 'a', ' c')],
    [_request(0, 0, -1, 'a', ' b'), _request(0, 1, -1, 'a', ' c')],
    [_request(0, 0, 'b', 'a', ' b'), _request(0, 1, 'b', 'a', ' c')],
    [_request(0, 0, 0, 'a', ' b'), _request(0, 1, 0, 'x', ' c')],
    [_request(0, 0, 0, 'a', ' b'), _request(0, 1, 0, 'a', '')],
  ],
)
def test_what_is_no_question_is_named(file, requests):
  _write(file, *requests)
  with pytest.raises(FileFormatError, match='question 0 is not one') as caught:
    choices.load('hellaswag')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('word', ['', ' ', None])
def test_what_is_no_passage_is_named(file, word):
  _write(file, _request(0, 0, [], 'a', ' b'), _request(1, 0, [], 'a', word))
  with pytest.raises(FileFormatError, match='passage 1 is not one'):
    choices.last_words()


@pytest.mark.parametrize(
  'content',
  # Without the time in them, or each worker would name the cases otherwise.
  [
    b'nothing',
    gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9],
    gzip.compress(b'{', mtime=0),
  ],
)
def test_a_damaged_file_is_an_error(file, content):
  file.write_bytes(content)
  with pytest.raises(FileFormatError, match='remove the file') as caught:
    choices.load('piqa')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('record', [{}, [], {'doc_id': 0, 'request': 'a'}])
def test_other_records_are_named(file, record):
  _write(file, _request(0, 0, 0, 'a', ' b'), record)
  with pytest.raises(FileFormatError, match='request 2 is not one'):
    choices.load('piqa')


def test_unknown_tasks_are_refused():
  with pytest.raises(ValueError, match="choices 'x' are unknown") as caught:
    choices.load('x')
  assert 'arc-easy, hellaswag, piqa' in str(caught.value)


@pytest.mark.parametrize(
  ('continuations', 'answer', 'message'),
  [
    ((' a', ' b'), 2, 'answer must be a place among the 2'),
    ((' a', ' b'), -1, 'answer must be a place among the 2'),
    ((' a',), 0, 'two or more texts'),
    ((' a', ''), 0, 'two or more texts'),
  ],
)
def test_what_is_no_choice_is_refused(continuations, answer, message):
  with pytest.raises(ValueError, match=message):
    Choice(context='x', continuations=continuations, answer=answer)


@pytest.mark.parametrize(('context', 'word'), [(' ', ' a'), ('a', ' ')])
def test_what_is_no_last_word_is_refused(context, word):
  with pytest.raises(ValueError, match='must not be empty'):
    LastWord(context=context, continuation=word)


@pytest.mark.network
@pytest.mark.parametrize(
  ('name', 'count', 'continuations'),
  [('arc-easy', 570, 2281), ('hellaswag', 10042, 40168), ('piqa', 1838, 3676)],
)
def test_the_real_tasks_have_their_known_size(name, count, continuations):
  found = choices.load(name)
  total = sum(len(choice.continuations) for choice in found)
  assert (len(found), total) == (count, continuations)


@pytest.mark.network
def test_the_real_passages_have_their_known_size():
  found = choices.last_words()
  assert len(found) == 5153
