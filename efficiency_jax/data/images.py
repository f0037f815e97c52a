"""Small labelled images in ten classes: clothes, digits, things.

Two sets come from package registries (`load`); of the others the official files
are read from a folder (`load_folder`). Nothing is unpickled.
"""

from collections.abc import Callable, Sequence
import dataclasses
import gzip
import math
import os
import pathlib

import numpy as np
import scipy.io

from efficiency_jax.io import assets
from efficiency_jax.io import errors
from efficiency_jax.io import json_file
from efficiency_jax.io.errors import FileFormatError

CLASSES = 10
FETCHED = ('fashion-mnist', 'mnist-10k')
_AGAIN = 'download it again'
_UBYTE = 8  # code of the only type of idx files that is read
# Images to train on, to choose by, to report on.
_SIZES = {
  'cifar10': (45_000, 5_000, 10_000),
  'fashion-mnist': (50_000, 10_000, 10_000),
  'mnist': (50_000, 10_000, 10_000),
  'mnist-10k': (8_000, 1_000, 1_000),
  'svhn': (67_257, 6_000, 26_032),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """Images and what is on them.

  Attributes:
    pixels: uint8 [N, H, W, C], 0 is black.
    labels: int32 [N], from 0 to 9.
  """

  pixels: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Splits:
  """Images to train on, to choose by, and to report on."""

  train: Images
  validation: Images
  test: Images


def load(name: str, seed: int = 0) -> Splits:
  """A set from a package registry.

  Args:
    name: `fashion-mnist` (arXiv 1708.07747), [28, 28, 1]: the 60,000 official
      training images in a random order, of which the last 10,000 are for
      validation, and the 10,000 official test images. Or `mnist-10k`,
      [28, 28, 1]: 10,000 digits of MNIST, of which 8,000, 1,000 and 1,000 are
      drawn. This is NOT the official split of MNIST, and an error on it cannot
      be compared with published ones.
    seed: Another seed divides the images otherwise.

  Raises:
    ValueError: `name` is neither, or the seed is negative.
    FetchError: The set could not be downloaded.
    FileFormatError: A file is damaged.
  """
  if name not in FETCHED:
    raise ValueError(
      f'images {name!r} are in no package registry, {", ".join(FETCHED)} are;'
      f' load_folder reads {", ".join(_SIZES)} from files of your own.'
    )
  return load_folder(name, assets.fetch(name).parent, seed)


def load_folder(
  name: str, path: str | os.PathLike[str], seed: int = 0
) -> Splits:
  """A set from a folder that holds its official files.

  The test images are the official ones. Those for validation are the last of
  the official training images in a random order.

  Args:
    name: What the folder holds:
      `mnist`, [28, 28, 1], the four idx files, plain or gzipped
      (`train-images-idx3-ubyte`, ...): 50,000 to train on, 10,000 for
      validation, 10,000 to test.
      `cifar10`, [32, 32, 3], the binary version (`data_batch_1.bin` to
      `data_batch_5.bin`, `test_batch.bin`): 45,000, 5,000, 10,000.
      `svhn`, [32, 32, 3], the cropped digits (`train_32x32.mat`,
      `test_32x32.mat`) without the extra ones: 67,257, 6,000, 26,032.
      Or a set of `load`, as it was fetched.
    path: The folder.
    seed: Another seed divides the images otherwise.

  Raises:
    ValueError: `name` is unknown, or the seed is negative.
    FileFormatError: A file is missing or damaged, or is of another set.
  """
  if name not in _READERS:
    raise ValueError(
      f'images {name!r} are unknown; there are {", ".join(sorted(_READERS))}.'
    )
  folder = pathlib.Path(path)
  sizes = _SIZES[name]
  # All but the test images, or all images where no test set is official.
  rest, *official = _READERS[name](folder)
  drawn = sizes[: len(sizes) - len(official)]
  _expect(folder, rest, sum(drawn), 'to train on')
  for test in official:
    _expect(folder, test, sizes[-1], 'to test')
  train, validation, test = (*_draw(rest, drawn, seed), *official)
  return Splits(train=train, validation=validation, test=test)


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
  """Reads an array of bytes in the idx format of MNIST.

  The file begins with two zeros, the code of the type and the rank; the sizes
  of the axes follow as big-endian integers of 32 bits, then the values.

  Args:
    path: The file, plain or gzipped, whatever its name.

  Returns:
    uint8, of the shape that the file names.

  Raises:
    FileFormatError: The file cannot be read, is cut short or too long, or holds
      no bytes in this format.
  """
  with errors.as_format_error(path, 'reading idx', _AGAIN):
    data = pathlib.Path(path).read_bytes()
    if data.startswith(b'\x1f\x8b'):
      data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != bytes([0, 0, _UBYTE]):
      problem = f'does not begin like an idx file of bytes ({data[:4].hex()})'
      raise FileFormatError(path, problem, _AGAIN)
    start = 4 + 4 * data[3]
    if len(data) < start:
      raise FileFormatError(path, 'is cut short in its header', _AGAIN)
    shape = np.frombuffer(data[4:start], '>u4').tolist()
    if len(data) != start + math.prod(shape):
      problem = f'has {len(data) - start} values, not those of shape {shape}'
      raise FileFormatError(path, problem, _AGAIN)
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _mnist(folder: pathlib.Path) -> tuple[Images, ...]:
  return tuple(_idx_pair(folder, part) for part in ('train', 't10k'))


def _idx_pair(folder: pathlib.Path, part: str) -> Images:
  """The images and labels of a part in the two files of MNIST."""
  paths = []
  for kind in ('images-idx3', 'labels-idx1'):
    plain = folder / f'{part}-{kind}-ubyte'
    packed = plain.with_name(f'{plain.name}.gz')
    paths.append(packed if packed.is_file() else plain)
    _require(paths[-1], 'put the four idx files of MNIST, plain or .gz, there')
  pixels, labels = map(read_idx, paths)
  if pixels.shape[1:] != (28, 28):
    problem = f'has the shape {list(pixels.shape)}, not [N, 28, 28]'
    raise FileFormatError(paths[0], problem, _AGAIN)
  if labels.shape != pixels.shape[:1]:
    problem = f'has labels {list(labels.shape)} for {len(pixels)} images'
    raise FileFormatError(paths[1], problem, _AGAIN)
  return _labelled(paths[1], pixels[..., None], labels)


def _cifar10(folder: pathlib.Path) -> tuple[Images, ...]:
  train = [_records(folder / f'data_batch_{i}.bin') for i in range(1, 6)]
  whole = Images(
    np.concatenate([images.pixels for images in train]),
    np.concatenate([images.labels for images in train]),
  )
  return whole, _records(folder / 'test_batch.bin')


def _records(path: pathlib.Path) -> Images:
  """Records of a label and the pixels [C, H, W] of an image."""
  _require(path, 'unpack cifar-10-binary.tar.gz (the "binary version") there')
  with errors.as_format_error(path, 'reading', _AGAIN):
    data = np.fromfile(path, np.uint8)
  size = 1 + 3 * 32 * 32
  if len(data) % size:
    problem = f'has {len(data)} bytes, which are no records of {size}'
    raise FileFormatError(path, problem, _AGAIN)
  records = data.reshape(-1, size)
  pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  return _labelled(path, pixels, records[:, 0])


def _svhn(folder: pathlib.Path) -> tuple[Images, ...]:
  return tuple(_mat(folder / f'{part}_32x32.mat') for part in ('train', 'test'))


def _mat(path: pathlib.Path) -> Images:
  """`X` [H, W, C, N] and `y` [N, 1] of a MATLAB file."""
  _require(path, 'put train_32x32.mat and test_32x32.mat (format 2) there')
  # Truncation and damage to compressed data are noticed, but a forged type code
  # in uncompressed data crashes scipy's reader: read no files of strangers.
  with errors.as_format_error(path, 'reading MATLAB arrays', _AGAIN):
    arrays = scipy.io.loadmat(path, variable_names=('X', 'y'))
    pixels, labels = arrays['X'], arrays['y']
  if pixels.dtype != np.uint8 or pixels.shape[:-1] != (32, 32, 3):
    problem = (
      f'has X of {pixels.dtype} {list(pixels.shape)}, not uint8 [32, 32, 3, N]'
    )
    raise FileFormatError(path, problem, _AGAIN)
  if labels.dtype.kind not in 'iu' or labels.shape != (pixels.shape[-1], 1):
    problem = (
      f'has y of {labels.dtype} {list(labels.shape)}, not integers'
      f' [{pixels.shape[-1]}, 1]'
    )
    raise FileFormatError(path, problem, _AGAIN)
  if 0 in labels:
    problem = 'has the label 0; 1 to 9 and 10, for the digit 0, are expected'
    raise FileFormatError(path, problem, _AGAIN)
  labels = np.where(labels == 10, 0, labels)
  return _labelled(path, pixels.transpose(3, 0, 1, 2), labels[:, 0])


def _digits(folder: pathlib.Path) -> tuple[Images, ...]:
  """The digits of the npm package, a file of numbers from 0 to 1 for each."""
  pixels = [_digit(folder / f'{label}.json') for label in range(CLASSES)]
  labels = np.repeat(np.arange(CLASSES), [len(some) for some in pixels])
  return (_labelled(folder, np.concatenate(pixels), labels),)


def _digit(path: pathlib.Path) -> np.ndarray:
  values = json_file.read_object(path).get('data')
  with errors.as_format_error(path, 'reading numbers', _AGAIN):
    values = np.asarray(values, np.float64).reshape(-1, 28, 28, 1)
    if not np.all((values >= 0) & (values <= 1)):
      raise FileFormatError(path, 'has values outside 0 to 1', _AGAIN)
  # Three decimals are written, which is enough to have the bytes back.
  return np.rint(255 * values).astype(np.uint8)


def _require(path: pathlib.Path, remedy: str) -> None:
  if not path.is_file():
    raise FileFormatError(path, 'is missing', remedy)


def _labelled(
  path: pathlib.Path, pixels: np.ndarray, labels: np.ndarray
) -> Images:
  """Images whose labels are checked."""
  wrong = labels[(labels < 0) | (labels >= CLASSES)]
  if wrong.size:
    problem = f'has the label {wrong[0]}, which is none of {CLASSES} classes'
    raise FileFormatError(path, problem, _AGAIN)
  return Images(np.ascontiguousarray(pixels), labels.astype(np.int32))


def _expect(
  folder: pathlib.Path, images: Images, count: int, purpose: str
) -> None:
  if len(images.labels) != count:
    problem = f'holds {len(images.labels):,} images {purpose}, not {count:,}'
    raise FileFormatError(folder, problem, 'download the set again')


def _draw(images: Images, sizes: Sequence[int], seed: int) -> list[Images]:
  """Divides the images, in a random order, into parts of these sizes."""
  order = np.random.default_rng(seed).permutation(sum(sizes))
  return [
    Images(images.pixels[rows], images.labels[rows])
    for rows in np.split(order, np.cumsum(sizes)[:-1])
  ]


_READERS: dict[str, Callable[[pathlib.Path], tuple[Images, ...]]] = {
  'cifar10': _cifar10,
  'fashion-mnist': _mnist,
  'mnist': _mnist,
  'mnist-10k': _digits,
  'svhn': _svhn,
}
