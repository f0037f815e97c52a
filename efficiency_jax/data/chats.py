"""Conversations to train on: what people asked and what was answered."""

from collections.abc import Iterable, Iterator
import dataclasses
import json
import pathlib
import re
from typing import Literal

from efficiency_jax.io import assets
from efficiency_jax.io.errors import FileFormatError

_ROLES = {'human': 'user', 'gpt': 'assistant'}
_SEPARATORS = re.compile(r'[\s,]*')
_WORDS = re.compile(r'\w+')
_FENCED = re.compile(r'```\w*\n(.*?)```', re.DOTALL)
_REMEDY = 'remove the file, and it is fetched again'
_LOOSE_HALVES = re.compile('[\ud800-\udfff]')
# A quoted passage shorter than this says nothing of where it comes from.
_LEAST_WORDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
  """What one side says.

  Attributes:
    role: `user` or `assistant`.
    content: The text, never empty.
  """

  role: Literal['user', 'assistant']
  content: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
  """One conversation; the user speaks first, then each side in turn.

  Attributes:
    name: Identifier in its data set.
    turns: One or more.
  """

  name: str
  turns: tuple[Turn, ...]


def load(name: str = 'sharegpt') -> list[Chat]:
  """All usable conversations of `sharegpt`, in the order of the file.

  The released file breaks off inside a record, so records are read one by one
  up to the break. A record is dropped when it does not start with the user,
  when a turn is empty, when one side speaks twice in a row, or when somebody
  other than `human` and `gpt` speaks. Half of a surrogate pair, which no
  tokenizer can read, becomes U+FFFD.

  Raises:
    ValueError: `name` is not `sharegpt`.
    FetchError: The data could not be downloaded.
    FileFormatError: The file holds something else than conversations, or a
      record before the last is damaged.
  """
  if name != 'sharegpt':
    raise ValueError(f'chats {name!r} are unknown; there are sharegpt.')
  path = assets.fetch(name)
  chats = []
  for number, record in enumerate(_records(path), 1):
    try:
      turns = record['conversations']
      roles = [turn['from'] for turn in turns]
      contents = [_LOOSE_HALVES.sub('\ufffd', turn['value']) for turn in turns]
      identifier = record['id']
    except (KeyError, TypeError) as error:
      problem = f'record {number} is not a conversation'
      raise FileFormatError(path, problem, _REMEDY) from error
    alternating = roles == [('human', 'gpt')[i % 2] for i in range(len(roles))]
    if roles and alternating and all(text.strip() for text in contents):
      chats.append(
        Chat(
          name=f'{name}/{identifier}',
          turns=tuple(
            Turn(role=_ROLES[role], content=content)
            for role, content in zip(roles, contents)
          ),
        )
      )
  return chats


def user_prompts(
  chats: Iterable[Chat],
  *,
  max_characters: int | None = None,
  first_only: bool = True,
) -> list[str]:
  """What users ask, each question once, in the order of the chats.

  Two questions are the same when their words are, whatever the case, spaces
  and punctuation.

  Args:
    chats: The conversations.
    max_characters: Longer questions are left out; None keeps all.
    first_only: Whether only what opens a chat counts. What is asked later may
      speak of what was said before.
  """
  found = {}
  for chat in chats:
    for turn in chat.turns[: 1 if first_only else None]:
      message = turn.content
      fits = max_characters is None or len(message) <= max_characters
      if turn.role == 'user' and fits:
        found.setdefault(_normalised(message) or message, message)
  return list(found.values())


def without(chats: Iterable[Chat], messages: Iterable[str]) -> list[Chat]:
  """The chats in no turn of which one of `messages` occurs.

  It keeps the questions of a benchmark out of what is trained on. A message
  occurs in a turn when all its words do, one after the other, whatever the
  case, spaces and punctuation; a message that quotes code between fences also
  occurs where that code does.

  Raises:
    ValueError: A message holds no words: it would occur everywhere.
  """
  passages = set()
  for message in messages:
    whole = _normalised(message)
    if not whole:
      raise ValueError(f'a message of {message!r} holds no words to look for.')
    passages.add(whole)
    for block in _FENCED.findall(message):
      if len(_WORDS.findall(block)) >= _LEAST_WORDS:
        passages.add(_normalised(block))
  return [chat for chat in chats if not _holds(chat, passages)]


def _holds(chat: Chat, passages: set[str]) -> bool:
  # The line end keeps a passage from running over from one turn to the next.
  text = '\n'.join(_normalised(turn.content) for turn in chat.turns)
  return any(passage in text for passage in passages)


def _normalised(text: str) -> str:
  """The words of a text in lower case, with one space around each."""
  words = _WORDS.findall(text.casefold())
  return f' {" ".join(words)} ' if words else ''


def _records(path: pathlib.Path) -> Iterator[dict]:
  """Gives the records of a JSON list, up to where the file breaks off."""
  try:
    text = path.read_text(encoding='utf8')
  except UnicodeDecodeError as error:
    raise FileFormatError(path, 'is not UTF-8 text', _REMEDY) from error
  if not text.startswith('['):
    raise FileFormatError(path, 'is not a JSON list', _REMEDY)
  decoder = json.JSONDecoder()
  place, number = 1, 0
  while True:
    place = _SEPARATORS.match(text, place).end()
    if place == len(text) or text[place] == ']':
      return
    try:
      record, place = decoder.raw_decode(text, place)
    except json.JSONDecodeError as error:
      # Only a record that the end of the file cuts may be unreadable.
      if error.msg.startswith('Unterminated') or error.pos >= len(text) - 6:
        return
      problem = f'record {number + 1} is damaged ({error})'
      raise FileFormatError(path, problem, _REMEDY) from error
    number += 1
    yield record
