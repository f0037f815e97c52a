"""Each text is cut into its documents, and nothing else of it is kept."""

import gzip
import io
import tarfile

import pytest

from efficiency_jax.data import documents
from efficiency_jax.io.errors import FileFormatError


@pytest.fixture
def file(tmp_path, monkeypatch):
  path = tmp_path / 'text'
  monkeypatch.setattr(documents.assets, 'fetch', lambda unused_name: path)
  return path


def _write_tar(path, mode, **contents):
  with tarfile.open(path, mode) as tar:
    folder = tarfile.TarInfo('package')
    folder.type = tarfile.DIRTYPE
    tar.addfile(folder)
    for name, content in contents.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))


def test_brown_samples_lose_their_tags(file):
  sample = b"""

	The/at jury/nn said/vbd ,/, ``/`` Is/bez it/pps ?/. ?/. ''/'' (/( No/rb )/)
	It/pps is/bez 1/2/cd --/-- not/* Af/nn ./.


	His/pp$ boys'/nns$ end/nn :/: :/: yes/rb ;/. ;/. well/uh !/. !/. ''/''
"""
  _write_tar(
    file,
    'w:gz',
    **{
      'package/README': b'no/nn',
      'package/ca01': sample,
      'package/cr09': b'A/at',
    },
  )
  assert documents.load('brown') == [
    'The jury said, "Is it?" (No) It is 1/2 -- not Af.\n\n'
    'His boys\' end: yes; well!"',
    'A',
  ]


def test_gcide_is_cut_into_entries(file):
  text = """

00-database-info
   About \\it

GCIDE is free software

Zero \\Ze"ro\\ n.
   1. Nothing.

   Note: Or more.

[1913 Webster]

\\Not a head\\

Zest \\Zest\\ n. [F. zeste\x92s.]
   Taste.
"""
  file.write_bytes(gzip.compress(text.encode('latin1')))
  assert documents.load('gcide') == [
    'Zero \\Ze"ro\\ n.\n   1. Nothing.\n\n   Note: Or more.\n\n[1913 Webster]'
    '\n\n\\Not a head\\',
    'Zest \\Zest\\ n. [F. zeste’s.]\n   Taste.',
  ]


def test_the_python_manual_is_cut_into_nodes(file):
  head = '\x1f\nFile: python3.11.info,  Node: '
  text = (
    'Produced by makeinfo\n'
    f'{head}Top,  Next: A, b,  Up: (dir)\n\nContents\n'
    f'{head}A, b,  Next: Empty,  Prev: Top,  Up: Top\n\n1 A ‘b’\n=====\n\n'
    'See \x00\x08[image src="a\n.png"\x00\x08]here.\n\n'
    f'{head}Empty,  Prev: A, b,  Up: Top\n\n'
    f'{head}Index,  Prev: Empty,  Up: Top\n\n* Menu:\n'
    '\x1f\nTag Table:\nNode: Top\x7f35\n\x1f\nEnd Tag Table\n'
  )
  file.write_bytes(gzip.compress(text.encode()))
  assert documents.load('python-manual') == ['1 A ‘b’\n=====\n\nSee here.']


def test_the_perl_manual_is_its_pods(file):
  _write_tar(
    file,
    'w',
    **{
      './usr/pod/perl.pod': '=head1 NAME\n\nperl – ü\n'.encode(),
      './usr/pod/perltoc.pod': b'=head1 CONTENTS\n',
      './usr/bin/perldoc': b'\xff\xfe',
    },
  )
  assert documents.load('perl-manual') == ['=head1 NAME\n\nperl – ü']


@pytest.mark.parametrize(
  'name', ['brown', 'gcide', 'perl-manual', 'python-manual']
)
@pytest.mark.parametrize(
  'content',
  # Without the time in them, or each worker would name the cases otherwise.
  [
    b'nothing',
    gzip.compress(b'x' * 999, mtime=0)[:-9],
    b'\x1f\x8b\x08' + b'!' * 50,
  ],
)
def test_a_damaged_file_is_an_error(file, name, content):
  file.write_bytes(content)
  with pytest.raises(FileFormatError, match='remove the file') as caught:
    documents.load(name)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['gcide', 'python-manual'])
def test_a_file_without_documents_is_an_error(file, name):
  file.write_bytes(gzip.compress(b'another text'))
  with pytest.raises(FileFormatError, match=f'holds no documents of {name}'):
    documents.load(name)


def test_another_encoding_is_an_error(file):
  file.write_bytes(gzip.compress(b'\xff\xfe'))
  with pytest.raises(FileFormatError, match='is not the text of python-man'):
    documents.load('python-manual')


def test_unknown_documents_are_refused():
  with pytest.raises(ValueError, match="documents 'x' are unknown") as caught:
    documents.load('x')
  assert 'brown, gcide, perl-manual, python-manual' in str(caught.value)


@pytest.mark.network
@pytest.mark.parametrize(
  ('name', 'count', 'characters'),
  [
    ('brown', 500, 5_974_319),
    ('gcide', 126_223, 39_695_818),
    ('perl-manual', 205, 8_018_241),
    ('python-manual', 5_303, 14_231_281),
  ],
)
def test_the_real_texts_have_their_known_size(name, count, characters):
  found = documents.load(name)
  assert (len(found), sum(map(len, found))) == (count, characters)
