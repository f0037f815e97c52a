"""Prompts to decode: questions of MT-bench and problems of HumanEval."""

from collections.abc import Callable
import dataclasses
import gzip
import json

from efficiency_jax.io import assets
from efficiency_jax.io.errors import FileFormatError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """One user message.

  Attributes:
    name: Identifier in its data set.
    category: Kind of question, or the data set's name.
    message: What the user says.
  """

  name: str
  category: str
  message: str


def load(name: str) -> list[Prompt]:
  """All prompts of `mt-bench` (80 first turns) or `humaneval` (164 problems).

  Raises:
    ValueError: `name` is neither.
    FetchError: The data could not be downloaded.
  """
  if name not in _READERS:
    raise ValueError(f'prompts {name!r} are unknown; there are {SETS}.')
  path = assets.fetch(name)
  opened = gzip.open if path.suffix == '.gz' else open
  prompts = []
  with opened(path, 'rt', encoding='utf8') as lines:
    for number, line in enumerate(lines, 1):
      try:
        prompts.append(_READERS[name](json.loads(line)))
      except (ValueError, KeyError, TypeError, IndexError) as error:
        raise FileFormatError(
          path,
          f'line {number} is not a prompt',
          'remove the file, and it is fetched again',
        ) from error
  return prompts


def _mt_bench(record: dict) -> Prompt:
  return Prompt(
    name=f'mt-bench/{record["question_id"]}',
    category=record['category'],
    message=record['turns'][0],
  )


def _humaneval(record: dict) -> Prompt:
  ask = 'Complete this Python function.\n\n```python\n'
  return Prompt(
    name=record['task_id'],
    category='humaneval',
    message=ask + record['prompt'].rstrip() + '\n```',
  )


_READERS: dict[str, Callable[[dict], Prompt]] = {
  'mt-bench': _mt_bench,
  'humaneval': _humaneval,
}
SETS = ', '.join(sorted(_READERS))
