"""Questions that a language model answers by what it finds likely.

The prompts are those of OLMES (arXiv:2406.08446) without examples, as the
package of the data has them ready for scoring.
"""

import dataclasses
import gzip
import itertools
import json
import pathlib
from typing import Any
import zlib

from efficiency_jax.io import assets
from efficiency_jax.io.errors import FileFormatError

_REMEDY = 'remove the file, and it is fetched again'
# From here on the same continuations follow `Answer:` alone.
_UNCONDITIONAL = 1_000_000
TASKS = ('arc-easy', 'hellaswag', 'piqa')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """A text and several ways to go on, one of which is right.

  Attributes:
    context: What is given.
    continuations: Two or more, each with the space that separates it.
    answer: The place of the right one among them.
  """

  context: str
  continuations: tuple[str, ...]
  answer: int

  def __post_init__(self):
    if len(self.continuations) < 2 or not all(self.continuations):
      raise ValueError(
        'continuations must be two or more texts, none of them empty, got'
        f' {self.continuations}.'
      )
    if not 0 <= self.answer < len(self.continuations):
      raise ValueError(
        f'answer must be a place among the {len(self.continuations)}'
        f' continuations, counted from 0, got {self.answer}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastWord:
  """A passage and the word that ends it.

  Attributes:
    context: The passage up to that word.
    continuation: The word, with the space before it.
  """

  context: str
  continuation: str

  def __post_init__(self):
    if not self.context.strip() or not self.continuation.strip():
      raise ValueError('context and continuation must not be empty.')


def load(name: str) -> list[Choice]:
  """All questions of a task, in the order of the release.

  The first ones are no fair sample of all: draw some at random.

  Args:
    name: One of
      `hellaswag`, how everyday scenes and instructions go on, 4 endings
      (arXiv:1905.07830);
      `arc-easy`, science questions of grade schools, mostly 4 answers
      (arXiv:1803.05457);
      `piqa`, how to reach goals with things, 2 ways (arXiv:1911.11641).
      All are the validation sets.

  Raises:
    ValueError: `name` is none of these.
    FetchError: The data could not be downloaded.
    FileFormatError: The file is damaged or holds something else.
  """
  if name not in TASKS:
    raise ValueError(
      f'choices {name!r} are unknown; there are {", ".join(TASKS)}.'
    )
  path = assets.fetch(name)
  requests = [r for r in _requests(path) if r['doc_id'] < _UNCONDITIONAL]
  found = []
  for document, group in itertools.groupby(requests, lambda r: r['doc_id']):
    group = sorted(group, key=lambda request: request['idx'])
    try:
      contexts = {request['context'] for request in group}
      (context,) = contexts
      found.append(
        Choice(
          context=context,
          continuations=tuple(request['continuation'] for request in group),
          answer=group[0]['label'],
        )
      )
    except (TypeError, ValueError) as error:
      problem = f'question {document} is not one ({error})'
      raise FileFormatError(path, problem, _REMEDY) from error
  return found


def last_words() -> list[LastWord]:
  """The 5,153 passages of LAMBADA, in the order of the release.

  Passages of novels whose last word people guess from the whole passage, and
  not from the last sentence alone (arXiv:1606.06031).

  Raises:
    FetchError: The data could not be downloaded.
    FileFormatError: The file is damaged or holds something else.
  """
  path = assets.fetch('lambada')
  found = []
  for request in _requests(path):
    try:
      found.append(
        LastWord(
          context=request['context'], continuation=request['continuation']
        )
      )
    except (AttributeError, ValueError) as error:
      problem = f'passage {request["doc_id"]} is not one ({error})'
      raise FileFormatError(path, problem, _REMEDY) from error
  return found


def _requests(path: pathlib.Path) -> list[dict[str, Any]]:
  """What is to be scored, one continuation a record."""
  found = []
  try:
    with gzip.open(path, 'rt', encoding='utf8') as lines:
      for line in lines:
        record = json.loads(line)
        found.append(
          {name: record[name] for name in ('doc_id', 'idx', 'label')}
          | {
            name: record['request'][name]
            for name in ('context', 'continuation')
          }
        )
  except (OSError, EOFError, zlib.error, ValueError) as error:
    problem = f'is not a file of requests ({error})'
    raise FileFormatError(path, problem, _REMEDY) from error
  except (KeyError, TypeError) as error:
    problem = f'request {len(found) + 1} is not one'
    raise FileFormatError(path, problem, _REMEDY) from error
  return found
