"""Snippets that give a test sentence away are dropped, and only those."""

import bz2
import collections

import pytest

from efficiency_jax.data import sentiment
from efficiency_jax.data.sentiment import Sentence
from efficiency_jax.io.errors import FileFormatError

_HEAD = 'category,text,movie_name\n'


@pytest.fixture
def file(tmp_path, monkeypatch):
  path = tmp_path / 'file'
  monkeypatch.setattr(sentiment.assets, 'fetch', lambda unused_name: path)
  return path


def _kept(snippets, tests):
  sentences = [Sentence(text, True) for text in snippets]
  return [s.text for s in sentiment.without(sentences, tests)]


def test_snippets_are_read_and_plots_are_not(file):
  rows = (
    'fresh,"Warm, and ""wise"".",a\n'
    'plot,A man walks.,a\n'
    'rotten,"Two\nlines, naïve.",b\n'
  )
  file.write_bytes(bz2.compress((_HEAD + rows).encode()))
  assert sentiment.load('rotten-tomatoes') == [
    Sentence('Warm, and "wise".', True),
    Sentence('Two\nlines, naïve.', False),
  ]


@pytest.mark.parametrize(
  'content',
  [
    b'nothing',
    bz2.compress((_HEAD + 'fresh,a,b\n' * 999).encode())[:-9],
    bz2.compress(b'a,b\nfresh,x\n'),
    bz2.compress(b'category,text\nfresh,\xff\n'),
    bz2.compress(_HEAD.encode()),
  ],
)
def test_a_damaged_file_is_an_error(file, content):
  file.write_bytes(content)
  with pytest.raises(FileFormatError, match='remove the file') as caught:
    sentiment.load('rotten-tomatoes')
  assert '\n' not in str(caught.value)


def test_a_damaged_test_set_is_an_error(file):
  file.write_bytes(b'nothing to see')
  with pytest.raises(FileFormatError, match='not an Arrow stream'):
    sentiment.load('sst2')


_TESTS = ["it 's a charming and often affecting journey . ", 'so bad']


@pytest.mark.parametrize(
  'snippet',
  [
    # The same words, spelled and spaced otherwise; also few of them.
    "It's a CHARMING, and often affecting, journey!",
    'So bad!',
    # It holds a test sentence, or lies in one with 18 letters.
    "Verdict: it's a charming and often affecting journey",
    'often affecting jour',
  ],
)
def test_leaks_are_dropped(snippet):
  assert _kept([snippet], _TESTS) == []


@pytest.mark.parametrize(
  'snippet',
  [
    "It's a charming and often dull journey.",
    # Phrases that anybody writes: they hold 'so bad', or have 17 letters.
    'Also bad.',
    'often affecting jou',
    # They lie in the test sentences, but across two of them.
    'affecting journey, so bad',
    "So bad: it's a charming",
  ],
)
def test_other_snippets_stay(snippet):
  assert _kept([snippet], _TESTS) == [snippet]


def test_a_test_sentence_without_letters_is_refused():
  with pytest.raises(ValueError, match='must hold letters'):
    sentiment.without([], ['good', '8 / 10'])


def test_copies_count_once():
  first, second = Sentence('Good film.', True), Sentence('good FILM', False)
  other = Sentence('Bad film', False)
  assert sentiment.unique([first, other, second]) == [second, other]


def test_splits_do_not_share_sentences(monkeypatch):
  words = ['red', 'blue', 'green', 'gray', 'black', 'white', 'cyan', 'pink']
  snippets = [
    Sentence(f'{a} {b}', a < b) for a in words for b in words if a != b
  ]
  tests = [Sentence('red blue .', True)]
  sets = {'sst2': tests, 'rotten-tomatoes': snippets * 2}
  monkeypatch.setattr(sentiment, 'load', sets.get)
  found = sentiment.load_splits(share=0.3)
  assert found.test == tests
  together = found.train + found.validation
  # Neither the copies nor the leak.
  assert collections.Counter(together) == collections.Counter(snippets[1:])
  assert 5 < len(found.validation) < 30
  again = sentiment.load_splits(share=0.3, seed=1)
  assert again.validation != found.validation


def test_unknown_sets_are_refused():
  with pytest.raises(ValueError, match="'imdb' are unknown.*tomatoes, sst2"):
    sentiment.load('imdb')


@pytest.mark.network
def test_the_real_sets_have_their_known_size():
  test = sentiment.load('sst2')
  assert len(test) == 872
  assert sum(s.positive for s in test) == 444
  snippets = sentiment.load('rotten-tomatoes')
  assert len(snippets) == 12_808
  assert sum(s.positive for s in snippets) == 7_403
  kept = sentiment.without(snippets, [s.text for s in test])
  assert len(kept) == 12_008
  alone = sentiment.unique(kept)
  assert len(alone) == 11_951
  assert sum(s.positive for s in alone) == 6_958
