"""Sentences with a sentiment: reviews to train on, SST-2 to test on.

SST-2 was made of the reviews that the training set holds, so every snippet that
gives a test sentence away is dropped (`without`).
"""

import bz2
from collections.abc import Collection, Iterator, Sequence
import csv
import dataclasses
import pathlib
import re

from efficiency_jax.data import splits
from efficiency_jax.io import arrow_file
from efficiency_jax.io import assets
from efficiency_jax.io.errors import FileFormatError

_LABELS = {'fresh': True, 'rotten': False}
_OTHER = re.compile('[^a-z]')
# A passage shorter than this says nothing of where it comes from.
_LEAST_LETTERS = 18
_REMEDY = 'remove the file, and it is fetched again'


@dataclasses.dataclass(frozen=True)
class Sentence:
  """A piece of a review and what it thinks.

  Attributes:
    text: The words.
    positive: Whether the reviewer liked the film.
  """

  text: str
  positive: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Splits:
  """Sentences to train on, to choose by, and to report on.

  Attributes:
    train: Snippets of Rotten Tomatoes.
    validation: More of them.
    test: The validation set of SST-2, whose test labels are secret.
  """

  train: list[Sentence]
  validation: list[Sentence]
  test: list[Sentence]


def load(name: str) -> list[Sentence]:
  """All sentences of a set, in the order of the release.

  Args:
    name: `rotten-tomatoes`, 12,808 snippets of reviews that call a film fresh
      or rotten; or `sst2`, the 872 sentences of the validation set of SST-2
      (arXiv 1804.07461).

  Raises:
    ValueError: `name` is neither.
    FetchError: The set could not be downloaded.
    FileFormatError: The file is damaged.
  """
  if name not in _READERS:
    raise ValueError(f'sentences {name!r} are unknown; there are {SETS}.')
  path = assets.fetch(name)
  sentences = list(_READERS[name](path))
  if not sentences:
    raise FileFormatError(path, 'holds no sentences', _REMEDY)
  return sentences


def load_splits(*, share: float = 0.1, seed: int = 0) -> Splits:
  """Rotten Tomatoes without leaks and copies in two parts, and SST-2.

  Args:
    share: Part of the snippets that is for validation.
    seed: Another seed divides them otherwise.

  Raises:
    FetchError: A set could not be downloaded.
    FileFormatError: A file is damaged.
  """
  test = load('sst2')
  snippets = without(load('rotten-tomatoes'), [s.text for s in test])
  train, validation = [], []
  for sentence in unique(snippets):
    apart = splits.is_validation(_letters(sentence.text), share, seed)
    (validation if apart else train).append(sentence)
  return Splits(train=train, validation=validation, test=test)


def without(
  snippets: Sequence[Sentence], tests: Collection[str]
) -> list[Sentence]:
  """The snippets that do not give a test sentence away.

  Compared are the letters a to z, whatever the case, spaces and punctuation. A
  snippet is dropped when it equals a test sentence, or when one of the two lies
  in the other and has 18 letters or more: shorter ones are phrases that anybody
  writes.

  Raises:
    ValueError: A test sentence holds no letters.
  """
  letters = {_letters(test) for test in tests}
  if '' in letters:
    raise ValueError('tests must hold letters, one of them holds none.')
  passages = [test for test in letters if len(test) >= _LEAST_LETTERS]
  # One text to search in; the line end keeps a match inside one sentence.
  whole = '\n'.join(letters)

  def leaks(snippet: Sentence) -> bool:
    found = _letters(snippet.text)
    inside = len(found) >= _LEAST_LETTERS and found in whole
    return found in letters or inside or any(p in found for p in passages)

  return [snippet for snippet in snippets if not leaks(snippet)]


def unique(sentences: Sequence[Sentence]) -> list[Sentence]:
  """Each sentence once; of those with the same letters the last one counts."""
  return list({_letters(s.text): s for s in sentences}.values())


def _letters(text: str) -> str:
  return _OTHER.sub('', text.lower())


def _rotten_tomatoes(path: pathlib.Path) -> Iterator[Sentence]:
  try:
    with bz2.open(path, 'rt', encoding='utf8', newline='') as file:
      for row in csv.DictReader(file):
        # Other rows tell the plot of a film.
        if row['category'] in _LABELS:
          yield Sentence(row['text'], _LABELS[row['category']])
  except (OSError, EOFError, ValueError, KeyError, csv.Error) as error:
    problem = f'is not the table of snippets ({error!r})'
    raise FileFormatError(path, problem, _REMEDY) from error


def _sst2(path: pathlib.Path) -> Iterator[Sentence]:
  kinds = {'sentence': str, 'label': '<i8', 'idx': '<i4'}
  table = arrow_file.read(path, kinds)
  for text, label in zip(table['sentence'], table['label'], strict=True):
    yield Sentence(text.strip(), label == 1)


_READERS = {'rotten-tomatoes': _rotten_tomatoes, 'sst2': _sst2}
SETS = ', '.join(sorted(_READERS))
