"""Tests of the GGUF reader against the reference reader and writer."""

import struct

import gguf
import numpy as np
import pytest

from efficiency_jax.io import errors
from efficiency_jax.io import gguf_file
from tests.efficiency_jax.io import tiny_models

pytestmark = pytest.mark.short

_TYPES = gguf.GGMLQuantizationType


def _can_quantize(kind):
  block, _ = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.quants.quantize(np.zeros((1, block), np.float32), kind)
  except NotImplementedError:
    return False
  return True


def _can_dequantize(kind):
  _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
  try:
    gguf.quants.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


_KINDS = sorted(gguf.GGML_QUANT_SIZES)
QUANTIZED = [kind for kind in _KINDS if _can_quantize(kind)]
READ_ONLY = [
  kind for kind in _KINDS if _can_dequantize(kind) and kind not in QUANTIZED
]
UNKNOWN = [kind for kind in _KINDS if not _can_dequantize(kind)]


def _write(path, tensors=(), pairs=(), alignment=None):
  writer = gguf.GGUFWriter(path, 'llama')
  if alignment is not None:
    writer.add_custom_alignment(alignment)
  for add, *args in pairs:
    getattr(writer, add)(*args)
  for name, value, kind in tensors:
    writer.add_tensor(name, value, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def test_header_equals_the_reference_readers_view(tmp_path):
  lm = tiny_models.model('llama')
  path = tiny_models.write_gguf(tmp_path / 'a.gguf', lm, _TYPES.Q8_0)
  file = gguf_file.read(path)
  reference = gguf.GGUFReader(path)

  expected = {
    name: field.contents()
    for name, field in reference.fields.items()
    if not name.startswith('GGUF.')
  }
  found = {
    name: value.tolist() if isinstance(value, np.ndarray) else value
    for name, value in file.metadata.items()
  }
  assert found == expected
  assert list(file.tensors) == [t.name for t in reference.tensors]
  for tensor in reference.tensors:
    info = file.tensors[tensor.name]
    assert info.shape == tuple(int(n) for n in tensor.shape[::-1])
    assert info.kind == tensor.tensor_type
    assert info.start == tensor.data_offset
    assert info.num_bytes == tensor.n_bytes


def test_every_scalar_type_and_array(tmp_path):
  pairs = [
    ('add_uint8', 'u8', 200),
    ('add_int8', 'i8', -100),
    ('add_uint16', 'u16', 60_000),
    ('add_int16', 'i16', -30_000),
    ('add_uint32', 'u32', 2**32 - 1),
    ('add_int32', 'i32', -(2**31)),
    ('add_uint64', 'u64', 2**64 - 1),
    ('add_int64', 'i64', -(2**63)),
    ('add_float32', 'f32', 0.5),
    ('add_float64', 'f64', 1e300),
    ('add_bool', 'yes', True),
    ('add_string', 'text', 'naïve 東京'),
    ('add_array', 'numbers', [1, 2, 3]),
    ('add_array', 'words', ['a', '', 'ccc']),
    ('add_array', 'flags', [True, False]),
  ]
  file = gguf_file.read(_write(tmp_path / 'a.gguf', pairs=pairs))
  for _, name, value in pairs:
    found = file.metadata[name]
    found = found.tolist() if isinstance(found, np.ndarray) else found
    assert found == value
    assert type(found) is type(value)


def _name(kind):
  return kind.name


@pytest.mark.parametrize('kind', QUANTIZED, ids=_name)
def test_values_equal_the_reference(tmp_path, kind):
  values = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
  data = gguf.quants.quantize(values, kind)
  file = gguf_file.read(_write(tmp_path / 'a.gguf', [('w', data, kind)]))
  expected = gguf.quants.dequantize(data, kind)
  np.testing.assert_array_equal(file.tensor('w'), expected)
  assert file.tensor('w').dtype == np.float32
  stored = data.reshape(3, -1).view(np.uint8)
  np.testing.assert_array_equal(file.raw('w'), stored)


@pytest.mark.parametrize('kind', READ_ONLY, ids=_name)
def test_random_blocks_equal_the_reference(tmp_path, kind):
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  shape = (2, 512 // block * block_bytes)
  data = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
  path = _write(tmp_path / 'a.gguf', [('w', data, kind)])
  with np.errstate(all='ignore'):
    expected = gguf.quants.dequantize(data, kind)
  found = gguf_file.read(path).tensor('w')
  np.testing.assert_array_equal(found, expected)
  assert found.shape == (2, 512)


@pytest.mark.parametrize('kind', UNKNOWN, ids=_name)
def test_other_types_are_named(tmp_path, kind):
  block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
  data = np.zeros((2, 256 // block * block_bytes), np.uint8)
  path = _write(tmp_path / 'a.gguf', [('w', data, kind)])
  with pytest.raises(errors.FileFormatError, match=kind.name):
    gguf_file.read(path).tensor('w')


def test_custom_alignment_and_three_dimensions(tmp_path):
  values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  path = _write(
    tmp_path / 'a.gguf',
    [('a', values[0], None), ('b', values, None)],
    alignment=64,
  )
  file = gguf_file.read(path)
  np.testing.assert_array_equal(file.tensor('b'), values)
  assert all(info.start % 64 == 0 for info in file.tensors.values())


def _string(text):
  data = text.encode()
  return struct.pack('<Q', len(data)) + data


def _header(tensors=0, pairs=0, version=3, magic=b'GGUF'):
  return magic + struct.pack('<IQQ', version, tensors, pairs)


def _tensor(name, dimensions, kind=0, start=0, count=None):
  count = len(dimensions) if count is None else count
  return (
    _string(name)
    + struct.pack('<I', count)
    + struct.pack(f'<{len(dimensions)}Q', *dimensions)
    + struct.pack('<IQ', kind, start)
  )


_U32_ONE = struct.pack('<II', 4, 1)
_HUGE = 2**60
HOSTILE = {
  'empty': b'',
  'short': b'GGUF',
  'wrong magic': _header(magic=b'GGML'),
  'version 1': _header(version=1),
  'big endian': b'GGUF' + struct.pack('>IQQ', 3, 0, 0),
  'tensor count': _header(tensors=_HUGE),
  'pair count': _header(pairs=_HUGE),
  'missing pairs': _header(pairs=2) + bytes(8),
  'key length': _header(pairs=1) + struct.pack('<Q', _HUGE) + bytes(64),
  'key utf-8': _header(pairs=1) + struct.pack('<Q', 2) + b'\xff\xfe' + _U32_ONE,
  'key twice': _header(pairs=2) + 2 * (_string('k') + _U32_ONE),
  'value type': _header(pairs=1) + _string('k') + struct.pack('<I', 13),
  'string length': _header(pairs=1)
  + _string('k')
  + struct.pack('<IQ', 8, 2**63),
  'boolean': _header(pairs=1) + _string('k') + struct.pack('<IB', 7, 2),
  'array of numbers': _header(pairs=1)
  + _string('k')
  + struct.pack('<IIQ', 9, 10, _HUGE),
  'array of strings': _header(pairs=1)
  + _string('k')
  + struct.pack('<IIQ', 9, 8, _HUGE),
  'array of arrays': _header(pairs=1)
  + _string('k')
  + struct.pack('<IIQ', 9, 9, 1) * 500,
  'alignment zero': _header(pairs=1)
  + _string('general.alignment')
  + struct.pack('<II', 4, 0),
  'alignment three': _header(pairs=1)
  + _string('general.alignment')
  + struct.pack('<II', 4, 3),
  'alignment text': _header(pairs=1)
  + _string('general.alignment')
  + struct.pack('<I', 8)
  + _string('32'),
  'no dimensions': _header(tensors=1) + _tensor('w', ()) + bytes(64),
  'dimensions': _header(tensors=1)
  + _tensor('w', (1,) * 4, count=2**31)
  + bytes(64),
  'overflow': _header(tensors=1) + _tensor('w', (2**32, 2**32)) + bytes(64),
  'zero': _header(tensors=1) + _tensor('w', (0, 4)) + bytes(64),
  'not whole blocks': _header(tensors=1) + _tensor('w', (33,), 8) + bytes(64),
  'storage type': _header(tensors=1) + _tensor('w', (4,), 999) + bytes(64),
  'start': _header(tensors=1)
  + _tensor('w', (4,), start=2**64 - 32)
  + bytes(64),
  'unaligned': _header(tensors=1) + _tensor('w', (4,), start=8) + bytes(64),
  'beyond the end': _header(tensors=1) + _tensor('w', (64,)) + bytes(64),
  'tensor twice': _header(tensors=2)
  + _tensor('w', (4,))
  + _tensor('w', (4,), start=32)
  + bytes(128),
  'overlap': _header(tensors=2)
  + _tensor('v', (16,))
  + _tensor('w', (4,), start=32)
  + bytes(128),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_headers_are_refused(tmp_path, name):
  path = tmp_path / 'a.gguf'
  path.write_bytes(HOSTILE[name])
  with pytest.raises(errors.FileFormatError) as caught:
    gguf_file.read(path)
  message = str(caught.value)
  assert message.startswith(str(path))
  assert '\n' not in message


def test_missing_file_and_folder(tmp_path):
  for path in (tmp_path / 'none.gguf', tmp_path):
    with pytest.raises(errors.FileFormatError):
      gguf_file.read(path)
