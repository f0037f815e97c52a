"""Damaged and hostile files load or are refused; nothing else happens.

Every case starts from a whole model, changes it in a way that a fixed seed
decides, and loads it. A change may go unnoticed (a flipped bit in a weight is a
weight), but whatever is noticed must be one `FileFormatError` of one line.
"""

import copy
import json
import shutil
import struct
import time

import numpy as np
import pytest

from efficiency_jax.io import errors
from efficiency_jax.io import export
from efficiency_jax.io import pretrained
from tests.efficiency_jax.io import tiny_models

# Generous: a case takes milliseconds.
_SECONDS_A_CASE = 5.0
_VALUES = (
  None,
  True,
  -1,
  0,
  1.5,
  2**31,
  10**400,
  'x',
  '\ud800',
  [],
  [None],
  {},
  {'a': 1},
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A saved model and the same as GGUF; tests work on copies."""
  folder = tmp_path_factory.mktemp('whole')
  lm = tiny_models.model('llama')
  export.save(lm, folder / 'model')
  tiny_models.write_gguf(folder / 'model.gguf', lm)
  return folder


def _load(source):
  """Loads, and says whether the file was refused."""
  start = time.monotonic()
  problem = ''
  try:
    pretrained.load(source)
  except errors.FileFormatError as error:
    problem = str(error)
  assert problem.isprintable()
  assert time.monotonic() - start < _SECONDS_A_CASE
  return bool(problem)


def _flipped(data, rng, low, high):
  """Changes one to four bits of the bytes in low..high."""
  damaged = bytearray(data)
  for _ in range(rng.integers(1, 5)):
    damaged[rng.integers(low, high)] ^= 1 << rng.integers(8)
  return bytes(damaged)


def _overwritten(data, rng, low, high):
  """Puts an extreme number of 4 or 8 bytes somewhere in low..high."""
  damaged = bytearray(data)
  number = [0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1][rng.integers(7)]
  packed = struct.pack('<Q', number)[: 4 * rng.integers(1, 3)]
  place = rng.integers(low, high - 8)
  damaged[place : place + len(packed)] = packed
  return bytes(damaged)


@pytest.mark.parametrize('damage', [_flipped, _overwritten])
@pytest.mark.parametrize('part', ['header', 'whole'])
def test_gguf_bytes(whole, tmp_path, damage, part):
  data = (whole / 'model.gguf').read_bytes()
  # Keys before the vocabulary, or anywhere.
  high = 1200 if part == 'header' else len(data)
  rng = np.random.default_rng(0)
  path = tmp_path / 'a.gguf'
  refused = 0
  for _ in range(60):
    path.write_bytes(damage(data, rng, 0, high))
    refused += _load(path)
  assert refused > 5 or part == 'whole'


def test_gguf_truncated(whole, tmp_path):
  data = (whole / 'model.gguf').read_bytes()
  rng = np.random.default_rng(1)
  path = tmp_path / 'a.gguf'
  for length in [*range(0, 64, 4), *rng.integers(64, len(data) - 32, 40)]:
    path.write_bytes(data[:length])
    assert _load(path)


def test_gguf_with_a_weight_that_is_not_a_number(whole, tmp_path):
  data = (whole / 'model.gguf').read_bytes()
  path = tmp_path / 'a.gguf'
  path.write_bytes(data[:-4] + struct.pack('<f', float('nan')))
  assert _load(path)


@pytest.mark.parametrize('damage', [_flipped, _overwritten])
@pytest.mark.parametrize('part', ['header', 'whole'])
def test_safetensors_bytes(whole, tmp_path, damage, part):
  directory = shutil.copytree(whole / 'model', tmp_path / 'model')
  path = directory / 'model.safetensors'
  data = path.read_bytes()
  header = 8 + int.from_bytes(data[:8], 'little')
  rng = np.random.default_rng(2)
  refused = 0
  for _ in range(50):
    high = header if part == 'header' else len(data)
    path.write_bytes(damage(data, rng, 0, high))
    refused += _load(directory)
  assert refused > 5 or part == 'whole'


def test_safetensors_truncated(whole, tmp_path):
  directory = shutil.copytree(whole / 'model', tmp_path / 'model')
  path = directory / 'model.safetensors'
  data = path.read_bytes()
  rng = np.random.default_rng(3)
  for length in [0, 4, 8, 100, *rng.integers(200, len(data), 30)]:
    path.write_bytes(data[:length])
    assert _load(directory)


@pytest.mark.parametrize(
  'name',
  [
    'config.json',
    'tokenizer.json',
    'tokenizer_config.json',
    'generation_config.json',
  ],
)
def test_json_bytes(whole, tmp_path, name):
  directory = shutil.copytree(whole / 'model', tmp_path / 'model')
  path = directory / name
  data = path.read_bytes()
  rng = np.random.default_rng(4)
  for _ in range(40):
    path.write_bytes(_flipped(data, rng, 0, len(data)))
    _load(directory)
  for length in rng.integers(0, len(data) - 2, 15):
    path.write_bytes(data[:length])
    assert _load(directory)
  path.write_bytes(b'[' * 200_000)
  assert _load(directory)


def _places(node, path=()):
  """The path of every value in a JSON tree; long containers are sampled."""
  if isinstance(node, dict):
    items = list(node.items())
  elif isinstance(node, list):
    items = list(enumerate(node))
  else:
    return
  for key, child in items[:30]:
    yield (*path, key)
    yield from _places(child, (*path, key))


@pytest.mark.parametrize(
  ('name', 'cases'),
  [
    ('config.json', 150),
    ('tokenizer.json', 150),
    ('tokenizer_config.json', 40),
    ('generation_config.json', 30),
  ],
)
def test_json_values(whole, tmp_path, name, cases):
  directory = shutil.copytree(whole / 'model', tmp_path / 'model')
  original = json.loads((directory / name).read_text())
  places = list(_places(original))
  rng = np.random.default_rng(5)
  for _ in range(cases):
    tree = copy.deepcopy(original)
    *parents, last = places[rng.integers(len(places))]
    node = tree
    for key in parents:
      node = node[key]
    if rng.random() < 0.2:
      del node[last]
    else:
      node[last] = _VALUES[rng.integers(len(_VALUES))]
    (directory / name).write_text(json.dumps(tree))
    _load(directory)


def test_a_message_is_one_line_with_its_remedy_at_the_end():
  error = errors.FileFormatError('a', 'x\n\x1b[31m\ud800' * 500, 'do this')
  assert str(error).isprintable()
  assert len(str(error)) < 500
  assert str(error).endswith('...; do this')


def test_any_failure_of_a_library_becomes_a_format_error():
  class Panic(BaseException):
    """Rust panics do not derive from Exception."""

  with (
    pytest.raises(errors.FileFormatError, match='Panic: oh'),
    errors.as_format_error('a', 'parsing', 'do this'),
  ):
    raise Panic('oh')
  with (
    pytest.raises(KeyboardInterrupt),
    errors.as_format_error('a', 'parsing', 'do this'),
  ):
    raise KeyboardInterrupt
