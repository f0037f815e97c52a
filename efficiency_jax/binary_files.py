"""Folded binarized networks as files: bits, thresholds, and the shape.

binary_files.save('digits.safetensors', config, folded)
config, folded = binary_files.load('digits.safetensors')
scores = folding.apply(config, folded, pixels)
"""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.binarization import folding
from efficiency_jax.binarization import networks
from efficiency_jax.io import arrays as arrays_io
from efficiency_jax.io.errors import FileFormatError

_KIND = 'folded binarized network'
_REMEDY = 'save it again with binary_files.save'


def save(
  path: str | os.PathLike[str], config: networks.Config, folded: folding.Folded
) -> None:
  """Writes one safetensors file, whole or not at all."""
  metadata = {
    'kind': _KIND,
    'config': json.dumps(dataclasses.asdict(config), sort_keys=True),
  }
  arrays_io.save(path, _named(folded), metadata)


def load(
  path: str | os.PathLike[str],
) -> tuple[networks.Config, folding.Folded]:
  """Reads what `save` wrote.

  Raises:
    FileFormatError: It is no such file, or an array is missing, left over, or
      of another shape than the network needs.
  """
  arrays, metadata = arrays_io.load(path)
  if metadata.get('kind') != _KIND:
    raise FileFormatError(path, f'is no {_KIND}', _REMEDY)
  try:
    fields = json.loads(metadata['config'])
    config = networks.Config(**{k: _hashable(v) for k, v in fields.items()})
    needed = _form(config)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    problem = f'has a shape that cannot be read ({error})'
    raise FileFormatError(path, problem, _REMEDY) from error
  wanted, found = _named(needed), arrays
  for problem, names in (
    ('lacks', set(wanted) - set(found)),
    ('has, and should not,', set(found) - set(wanted)),
  ):
    if names:
      raise FileFormatError(path, f'{problem} {sorted(names)[0]}', _REMEDY)
  for name, like in wanted.items():
    one = found[name]
    if (one.shape, one.dtype) != (like.shape, like.dtype):
      problem = (
        f'has {name} as {one.dtype} {list(one.shape)} where {like.dtype}'
        f' {list(like.shape)} is needed'
      )
      raise FileFormatError(path, problem, _REMEDY)
  structure = jax.tree.structure(needed)
  return config, structure.unflatten(jnp.asarray(found[n]) for n in wanted)


def _named(tree) -> dict[str, np.ndarray]:
  """Leaves by name, in the order of the tree."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): leaf
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
  }


def _form(config: networks.Config) -> folding.Folded:
  """A folded network of this shape, without its numbers."""

  def make():
    params = networks.init(config, jax.random.key(0))
    seen = {
      name: networks.Moments(layer['bias'], layer['scale'])
      for name, layer in params.items()
    }
    return folding.fold(config, params, seen)

  return jax.eval_shape(make)


def _hashable(value):
  return tuple(map(_hashable, value)) if isinstance(value, list) else value
