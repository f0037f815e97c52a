"""Reads GGUF, the one-file format of llama.cpp, without trusting the file.

A GGUF file is a magic number, a version, two counts, that many key-value pairs,
that many tensor descriptions, padding, and the tensors. Every count, length,
dimension and offset is compared with the size of the file before anything is
allocated for it, so a hostile file costs no more than its own bytes. Values of
quantized tensors are computed by the reference `gguf` package.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
import struct
from typing import Any

import gguf
import numpy as np

from efficiency_jax.io import errors

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_MAX_PAIRS = 2**16
_MAX_TENSORS = 2**16
_MAX_NAME_BYTES = 2**10
_MAX_STRING_BYTES = 2**26
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 2**16
_REMEDY = 'download the file again'

_STRING = gguf.GGUFValueType.STRING
_ARRAY = gguf.GGUFValueType.ARRAY
_BOOL = gguf.GGUFValueType.BOOL
_SCALARS: Mapping[int, np.dtype] = {
  gguf.GGUFValueType.UINT8: np.dtype('<u1'),
  gguf.GGUFValueType.INT8: np.dtype('<i1'),
  gguf.GGUFValueType.UINT16: np.dtype('<u2'),
  gguf.GGUFValueType.INT16: np.dtype('<i2'),
  gguf.GGUFValueType.UINT32: np.dtype('<u4'),
  gguf.GGUFValueType.INT32: np.dtype('<i4'),
  gguf.GGUFValueType.FLOAT32: np.dtype('<f4'),
  gguf.GGUFValueType.BOOL: np.dtype('<u1'),
  gguf.GGUFValueType.UINT64: np.dtype('<u8'),
  gguf.GGUFValueType.INT64: np.dtype('<i8'),
  gguf.GGUFValueType.FLOAT64: np.dtype('<f8'),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Where one tensor lies.

  Attributes:
    name: As the file spells it.
    shape: Slowest axis first, as numpy counts (the file stores the reverse).
    kind: How its values are stored.
    start: First byte, from the start of the file.
    num_bytes: Bytes it takes.
  """

  name: str
  shape: tuple[int, ...]
  kind: gguf.GGMLQuantizationType
  start: int
  num_bytes: int


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """A checked header; tensors are read from disk when they are asked for.

  Attributes:
    path: The file.
    version: 2 or 3.
    metadata: Scalars as Python values, arrays of numbers as numpy arrays,
      arrays of strings as lists.
    tensors: Every tensor by name, in file order.
  """

  path: pathlib.Path
  version: int
  metadata: Mapping[str, Any]
  tensors: Mapping[str, TensorInfo]

  def raw(self, name: str) -> np.ndarray:
    """The tensor's bytes as they are stored: [rows, bytes of a row]."""
    info = self.tensors[name]
    rows = math.prod(info.shape[:-1])
    try:
      data = np.memmap(
        self.path, np.uint8, 'r', offset=info.start, shape=(info.num_bytes,)
      )
    except (OSError, ValueError) as error:
      problem = f'tensor {name} cannot be read ({error})'
      raise errors.FileFormatError(self.path, problem, _REMEDY) from error
    return data.reshape(rows, info.num_bytes // rows)

  def tensor(self, name: str) -> np.ndarray:
    """The tensor's values in float32, in the shape of its `TensorInfo`.

    Raises:
      FileFormatError: Its storage type is one that `gguf` cannot decode.
    """
    info = self.tensors[name]
    try:
      # Damaged scales may overflow; the caller decides about values.
      with np.errstate(all='ignore'):
        values = gguf.quants.dequantize(np.array(self.raw(name)), info.kind)
    except NotImplementedError as error:
      problem = f'tensor {name} is stored as {info.kind.name}'
      remedy = 'use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant'
      raise errors.FileFormatError(self.path, problem, remedy) from error
    return np.asarray(values, np.float32).reshape(info.shape)


def read(path: str | os.PathLike[str]) -> GGUFFile:
  """Reads and checks the header of a GGUF file, version 2 or 3.

  Raises:
    FileFormatError: Anything in the header is not as it must be.
  """
  path = pathlib.Path(path)
  try:
    size = path.stat().st_size
    if size < 24:
      problem = f'is {size} bytes long, too short for a GGUF header'
      raise errors.FileFormatError(path, problem, _REMEDY)
    data = np.memmap(path, np.uint8, 'r')
  except OSError as error:
    problem = f'cannot be read ({error.strerror})'
    raise errors.FileFormatError(path, problem, 'check the path') from error
  return _parse(_Cursor(path, memoryview(data)))


class _Cursor:
  """Reads little-endian values from a buffer, never beyond its end."""

  def __init__(self, path: pathlib.Path, data: memoryview):
    self.path = path
    self.data = data
    self.position = 0

  def error(self, problem: str, remedy: str = _REMEDY):
    return errors.FileFormatError(self.path, problem, remedy)

  def take(self, count: int, what: str) -> memoryview:
    if count > len(self.data) - self.position:
      raise self.error(
        f'{what} needs {count} bytes at byte {self.position}, but the file'
        f' ends at byte {len(self.data)}'
      )
    piece = self.data[self.position : self.position + count]
    self.position += count
    return piece

  def unsigned(self, width: int, what: str) -> int:
    return int.from_bytes(self.take(width, what), 'little')

  def string(self, what: str, max_bytes: int = _MAX_STRING_BYTES) -> str:
    length = self.unsigned(8, what)
    if length > max_bytes:
      raise self.error(f'{what} is {length} bytes long, over {max_bytes}')
    try:
      return str(self.take(length, what), 'utf-8')
    except UnicodeDecodeError as error:
      raise self.error(f'{what} is not UTF-8') from error

  def value(self, kind: int, what: str) -> Any:
    if kind == _STRING:
      return self.string(what)
    if kind == _ARRAY:
      return self.array(what)
    if kind not in _SCALARS:
      raise self.error(f'{what} has the unknown value type {kind}')
    return self.numbers(kind, 1, what)[0].item()

  def array(self, what: str) -> list[str] | np.ndarray:
    kind = self.unsigned(4, what)
    count = self.unsigned(8, what)
    left = len(self.data) - self.position
    if kind == _STRING:
      if count > left // 8:
        raise self.error(f'{what} claims {count} strings in {left} bytes')
      return [self.string(what) for _ in range(count)]
    if kind not in _SCALARS:
      raise self.error(f'{what} is an array of the unsupported type {kind}')
    return self.numbers(kind, count, what)

  def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
    dtype = _SCALARS[kind]
    piece = self.take(count * dtype.itemsize, what)
    values = np.frombuffer(piece, dtype).copy()
    if kind == _BOOL:
      if values.size and values.max() > 1:
        raise self.error(f'{what} holds a boolean that is neither 0 nor 1')
      return values.astype(bool)
    return values


def _parse(cursor: _Cursor) -> GGUFFile:
  if bytes(cursor.take(4, 'the magic number')) != _MAGIC:
    raise cursor.error('is not a GGUF file', 'pass a .gguf file')
  version = cursor.unsigned(4, 'the version')
  if version not in _VERSIONS:
    swapped = int.from_bytes(version.to_bytes(4, 'little'), 'big')
    what = 'big-endian' if swapped in _VERSIONS else f'version {version}'
    problem = f'is {what} GGUF'
    raise cursor.error(problem, 'convert it to little-endian version 3')
  num_tensors = cursor.unsigned(8, 'the tensor count')
  num_pairs = cursor.unsigned(8, 'the metadata count')
  if num_tensors > _MAX_TENSORS or num_pairs > _MAX_PAIRS:
    raise cursor.error(f'claims {num_tensors} tensors and {num_pairs} keys')
  metadata = _metadata(cursor, num_pairs)
  tensors = _tensors(cursor, num_tensors, _alignment(cursor, metadata))
  return GGUFFile(cursor.path, version, metadata, tensors)


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
  metadata: dict[str, Any] = {}
  for _ in range(count):
    key = cursor.string('a metadata key', _MAX_NAME_BYTES)
    if key in metadata:
      raise cursor.error(f'holds the metadata key {key!r} twice')
    kind = cursor.unsigned(4, f'the type of {key!r}')
    metadata[key] = cursor.value(kind, f'metadata {key!r}')
  return metadata


def _alignment(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
  key = gguf.Keys.General.ALIGNMENT
  value = metadata.get(key, gguf.GGUF_DEFAULT_ALIGNMENT)
  power_of_two = type(value) is int and value > 0 and not value & (value - 1)
  if not power_of_two or value > _MAX_ALIGNMENT:
    raise cursor.error(f'{key} is {value!r}, expected a small power of two')
  return value


def _tensors(
  cursor: _Cursor, count: int, alignment: int
) -> dict[str, TensorInfo]:
  """Reads the tensor descriptions and checks where their data lies."""
  described = [_tensor_description(cursor) for _ in range(count)]
  start_of_data = -(-cursor.position // alignment) * alignment
  tensors: dict[str, TensorInfo] = {}
  for info in described:
    if info.name in tensors:
      raise cursor.error(f'holds the tensor {info.name!r} twice')
    if info.start % alignment:
      raise cursor.error(
        f'tensor {info.name!r} starts at {info.start}, which is not aligned'
        f' to {alignment} bytes'
      )
    start = start_of_data + info.start
    if start + info.num_bytes > len(cursor.data):
      raise cursor.error(
        f'tensor {info.name!r} needs bytes {start}..{start + info.num_bytes},'
        f' but the file ends at byte {len(cursor.data)}'
      )
    tensors[info.name] = dataclasses.replace(info, start=start)
  end = 0
  for info in sorted(tensors.values(), key=lambda info: info.start):
    if info.start < end:
      raise cursor.error(f'tensor {info.name!r} overlaps the one before it')
    end = info.start + info.num_bytes
  return tensors


def _tensor_description(cursor: _Cursor) -> TensorInfo:
  """Reads one description; `start` still counts from the start of the data."""
  name = cursor.string('a tensor name', _MAX_NAME_BYTES)
  num_dimensions = cursor.unsigned(4, f'tensor {name!r}')
  if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
    raise cursor.error(f'tensor {name!r} has {num_dimensions} dimensions')
  dimensions = struct.unpack(
    f'<{num_dimensions}Q', cursor.take(8 * num_dimensions, f'tensor {name!r}')
  )
  kind_number = cursor.unsigned(4, f'tensor {name!r}')
  start = cursor.unsigned(8, f'tensor {name!r}')
  try:
    kind = gguf.GGMLQuantizationType(kind_number)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  except (ValueError, KeyError) as error:
    problem = f'tensor {name!r} has the unknown storage type {kind_number}'
    remedy = 'use a file in F32, F16, BF16, Q8_0, Q4_0, Q4_1 or a K-quant'
    raise cursor.error(problem, remedy) from error
  # Python's integers do not overflow, so the product can simply be compared.
  size = math.prod(dimensions)
  if size == 0 or dimensions[0] % block:
    raise cursor.error(
      f'tensor {name!r} has dimensions {dimensions}, which are not whole'
      f' {kind.name} blocks of {block}'
    )
  num_bytes = size // block * block_bytes
  return TensorInfo(name, dimensions[::-1], kind, start, num_bytes)
