"""Folded networks as files: the same bits again, and files that are wrong."""

import json

import chex
import jax
import numpy as np
import pytest

from efficiency_jax import binary_files
from efficiency_jax.binarization import folding
from efficiency_jax.binarization import networks
from efficiency_jax.io import arrays as arrays_io
from efficiency_jax.io import checkpoint
from efficiency_jax.io.errors import FileFormatError

CONFIG = networks.Config(
  image=(4, 4, 1), convolutions=((8, True),), hidden=(40,), classes=3
)


def _folded():
  params = networks.init(CONFIG, jax.random.key(0))
  pixels = np.random.default_rng(0).integers(0, 256, (16, 4, 4, 1), np.uint8)
  seen = networks.statistics(CONFIG, params, [pixels])
  return folding.fold(CONFIG, params, seen), pixels


def test_a_file_holds_the_network(tmp_path):
  folded, pixels = _folded()
  path = tmp_path / 'a.safetensors'
  binary_files.save(path, CONFIG, folded)
  config, again = binary_files.load(path)
  assert config == CONFIG
  chex.assert_trees_all_equal(again, folded)
  chex.assert_trees_all_equal_dtypes(again, folded)
  np.testing.assert_array_equal(
    folding.apply(config, again, pixels), folding.apply(CONFIG, folded, pixels)
  )


def test_orbax_holds_the_network(tmp_path):
  folded, _ = _folded()
  store = checkpoint.Store(folder=tmp_path / 'checkpoints', keep=1)
  store.save(1, folded, None)
  again, _ = store.load(1, folded)
  chex.assert_trees_all_equal(again, folded)


def _changed(path, change_arrays=None, change_metadata=None):
  arrays, metadata = arrays_io.load(path)
  if change_arrays:
    change_arrays(arrays)
  if change_metadata:
    change_metadata(metadata)
  arrays_io.save(path, arrays, metadata)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'change_arrays': lambda a: a.pop('layers.1.flip')},
      r'lacks layers\.1\.flip',
    ),
    (
      {'change_arrays': lambda a: a.update({'extra': np.zeros(1)})},
      'has, and should not, extra',
    ),
    (
      {
        'change_arrays': lambda a: a.update(
          {'layers.1.words': a['layers.1.words'][:5]}
        )
      },
      r'layers\.1\.words as uint32 \[5, 1\] where uint32 \[40, 1\] is needed',
    ),
    (
      {'change_metadata': lambda m: m.update({'kind': 'other'})},
      'is no folded binarized network',
    ),
    *(
      (
        {'change_metadata': lambda m, text=text: m.update({'config': text})},
        'has a shape that cannot be read',
      )
      for text in (
        '{',
        '[]',
        'null',
        '{"image": [4, 4, 1], "hidden": ["x"]}',
        '{"image": [4, 4, 1], "hidden": [-3]}',
        '{"image": [4, 4, 1], "weights": "float"}',
      )
    ),
    (
      {
        'change_metadata': lambda m: m.update(
          {'config': json.dumps({'image': [4, 4, 1], 'norm': 'x'})}
        )
      },
      'has a shape that cannot be read',
    ),
  ],
)
def test_wrong_files_are_one_line(tmp_path, change, message):
  folded, _ = _folded()
  path = tmp_path / 'a.safetensors'
  binary_files.save(path, CONFIG, folded)
  _changed(path, **change)
  with pytest.raises(FileFormatError, match=message):
    binary_files.load(path)
