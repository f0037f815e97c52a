"""Tests of named arrays in a file: whole or not there."""

import numpy as np
import pytest

from efficiency_jax.io import arrays
from efficiency_jax.io import errors

pytestmark = pytest.mark.short

_DTYPES = ('bool', 'int8', 'uint8', 'int32', 'int64', 'float16', 'float32')


def _values() -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  return {d: rng.integers(0, 100, (3, 4)).astype(d) for d in _DTYPES}


@pytest.mark.parametrize('metadata', [None, {'split': 'train', 'note': 'ä\n"'}])
def test_what_is_saved_is_loaded(tmp_path, metadata):
  values = {**_values(), 'a/b': np.zeros((0, 2), np.float32)}
  # The folder is made.
  arrays.save(tmp_path / 'new' / 'x.safetensors', values, metadata)
  loaded, said = arrays.load(tmp_path / 'new' / 'x.safetensors')
  assert said == (metadata or {})
  assert arrays.metadata(tmp_path / 'new' / 'x.safetensors') == said
  assert loaded.keys() == values.keys()
  for name, value in values.items():
    np.testing.assert_array_equal(loaded[name], value, strict=True)


def test_every_bit_is_kept(tmp_path):
  bits = np.arange(2**16, dtype=np.uint16)
  arrays.save(tmp_path / 'x', {'halves': bits.view(np.float16)})
  loaded, _ = arrays.load(tmp_path / 'x')
  np.testing.assert_array_equal(loaded['halves'].view(np.uint16), bits)


def test_views_are_written_as_what_they_show(tmp_path):
  whole = np.arange(24.0, dtype=np.float32).reshape(4, 6)
  views = {
    'transposed': whole.T,
    'strided': whole[::2, 1::3],
    'backwards': whole[::-1],
    'repeated': np.broadcast_to(whole[0], (3, 6)),
    'in columns': np.asfortranarray(whole),
  }
  arrays.save(tmp_path / 'x', views)
  loaded, _ = arrays.load(tmp_path / 'x')
  for name, value in views.items():
    np.testing.assert_array_equal(loaded[name], value, strict=True)


def test_a_file_is_replaced(tmp_path):
  arrays.save(tmp_path / 'x', {'old': np.ones(100)}, {'age': 'old'})
  arrays.save(tmp_path / 'x', {'new': np.zeros(2)}, {'age': 'new'})
  loaded, said = arrays.load(tmp_path / 'x')
  assert list(loaded) == ['new']
  assert said == {'age': 'new'}
  assert [path.name for path in tmp_path.iterdir()] == ['x']


def _cut_short(arrays_, path, metadata):
  """A disk that is full after a few bytes."""
  del arrays_, metadata
  path.write_bytes(b'some of it')
  raise OSError(28, 'No space left on device')


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  arrays.save(tmp_path / 'x', {'old': np.ones(3)})
  before = (tmp_path / 'x').read_bytes()
  with pytest.raises(TypeError, match='metadata'):
    arrays.save(tmp_path / 'x', {'new': np.ones(3)}, {'age': 3})
  monkeypatch.setattr(arrays.safetensors_numpy, 'save_file', _cut_short)
  with pytest.raises(OSError, match='No space left'):
    arrays.save(tmp_path / 'x', {'new': np.ones(3)})
  assert (tmp_path / 'x').read_bytes() == before
  monkeypatch.undo()
  # What the failure left behind is no hindrance, and is gone afterwards.
  arrays.save(tmp_path / 'x', {'new': np.ones(3)})
  assert list(arrays.load(tmp_path / 'x')[0]) == ['new']
  assert [path.name for path in tmp_path.iterdir()] == ['x']


@pytest.mark.parametrize(
  'harm',
  [
    lambda data: b'',
    lambda data: data[:40],
    lambda data: data[:-1],
    lambda data: data + b'x',
    lambda data: data.replace(b'F32', b'F33'),
    lambda data: data.replace(b'{', b'[', 1),
    lambda data: b'\xff' * 7 + data,
  ],
  ids=['empty', 'header cut', 'cut', 'longer', 'dtype', 'json', 'other'],
)
def test_a_damaged_file_is_refused(tmp_path, harm):
  path = tmp_path / 'x.safetensors'
  arrays.save(path, {'a': np.ones((4, 4), np.float32)}, {'k': 'v'})
  path.write_bytes(harm(path.read_bytes()))
  with pytest.raises(errors.FileFormatError):
    arrays.metadata(path)
  with pytest.raises(errors.FileFormatError) as caught:
    arrays.load(path)
  message = str(caught.value)
  assert message.startswith(f'{path}: is not a readable safetensors file (')
  assert message.endswith('; make it again')
  assert '\n' not in message


def test_a_missing_file_is_said_to_be_missing(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    arrays.load(tmp_path / 'nowhere')


def test_a_folder_is_said_to_be_one(tmp_path):
  with pytest.raises(errors.FileFormatError, match='is a folder; pass a file'):
    arrays.load(tmp_path)
