"""Texts to model: news and novels, a dictionary, and manuals of programmers."""

from collections.abc import Callable, Iterator
import gzip
import pathlib
import re
import tarfile
import zlib

from efficiency_jax.io import assets
from efficiency_jax.io.errors import FileFormatError

_BROWN_SAMPLE = re.compile(r'package/c[a-r]\d\d')
_BLANK_LINES = re.compile(r'\n(?:[ \t]*\n)+')
# The tagged text has these marks twice.
_DOUBLED = re.compile(r'(?<= )([;?!:]) \1(?= |$)')
# A closing mark belongs to the word before it and an opening one to the next.
_SPACE_BEFORE = re.compile(r" (?=(?:[.,;:?!)\]]|'')(?: |$))")
_SPACE_AFTER = re.compile(r'(?:(?<=^)|(?<= ))([(\[]|``) ')
# `Headword \Head"word\ (pronunciation), n.`; other lines are indented.
_GCIDE_HEAD = re.compile(r'\n\n+(?=[^\s\\[][^\n]*\\)')
# How info marks an image or an index.
_INFO_MARK = re.compile('\x00\x08\\[.*?\x00\x08\\]', re.DOTALL)
_INFO_HEAD = re.compile(r'\nFile: [^\n]*?Node: ([^\n]*?),  [^\n]*\n+')


def load(name: str) -> list[str]:
  """The documents of a text, in the order of the release.

  Args:
    name: One of
      `brown`, 500 samples of American English of 1961, about 2000 words each:
      paragraphs without tags, spaced and quoted as usual;
      `gcide`, the entries of an English dictionary;
      `python-manual`, the nodes of the manual of Python 3.11 as info shows
      them, but for the contents and the indices;
      `perl-manual`, the pods of Perl 5.36 in their own markup, but for the
      contents.

  Raises:
    ValueError: `name` is none of these.
    FetchError: The text could not be downloaded.
    FileFormatError: The file is damaged, or holds none of the documents.
  """
  if name not in _READERS:
    raise ValueError(f'documents {name!r} are unknown; there are {TEXTS}.')
  path = assets.fetch(name)
  remedy = 'remove the file, and it is fetched again'
  try:
    documents = [text for text in _READERS[name](path) if text.strip()]
  except (
    tarfile.TarError,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    UnicodeDecodeError,
  ) as error:
    problem = f'is not the text of {name} ({error})'
    raise FileFormatError(path, problem, remedy) from error
  if not documents:
    raise FileFormatError(path, f'holds no documents of {name}', remedy)
  return documents


def _brown(path: pathlib.Path) -> Iterator[str]:
  with tarfile.open(path) as files:
    for member, content in _files(files):
      if _BROWN_SAMPLE.fullmatch(member):
        paragraphs = _BLANK_LINES.split(content.decode('utf8').strip())
        yield '\n\n'.join(map(_untagged, paragraphs))


def _untagged(paragraph: str) -> str:
  """`Is/bez it/pps ?/. ?/.` as one reads it: `Is it?`"""
  text = ' '.join(word.rpartition('/')[0] for word in paragraph.split())
  text = _DOUBLED.sub(r'\1', text)
  text = _SPACE_AFTER.sub(r'\1', _SPACE_BEFORE.sub('', text))
  return text.replace('``', '"').replace("''", '"')


def _gcide(path: pathlib.Path) -> Iterator[str]:
  with gzip.open(path) as file:
    text = file.read().decode('cp1252')
  # Before the first entry come the licence and the history of the edition.
  for entry in _GCIDE_HEAD.split(text)[1:]:
    yield entry.strip()


def _python_manual(path: pathlib.Path) -> Iterator[str]:
  with gzip.open(path) as file:
    text = file.read().decode('utf8')
  # Nodes are separated by a control character; tables for programs follow.
  for node in text.split('\x1f')[1:]:
    head = _INFO_HEAD.match(node)
    if head and head[1] not in ('Top', 'Python Module Index', 'Index'):
      yield _INFO_MARK.sub('', node[head.end() :]).strip()


def _perl_manual(path: pathlib.Path) -> Iterator[str]:
  with tarfile.open(path) as files:
    for member, content in _files(files):
      # The table of contents says again what stands in the others.
      if member.endswith('.pod') and not member.endswith('/perltoc.pod'):
        yield content.decode('utf8').strip()


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
  for member in archive:
    if member.isfile():
      yield member.name, archive.extractfile(member).read()


_READERS: dict[str, Callable[[pathlib.Path], Iterator[str]]] = {
  'brown': _brown,
  'gcide': _gcide,
  'perl-manual': _perl_manual,
  'python-manual': _python_manual,
}
TEXTS = ', '.join(sorted(_READERS))
