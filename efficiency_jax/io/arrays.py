"""Named arrays in one safetensors file: whole or not there."""

from collections.abc import Iterator, Mapping
import contextlib
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from efficiency_jax.io.errors import FileFormatError


def save(
  path: str | os.PathLike[str],
  arrays: Mapping[str, np.ndarray],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes arrays of numpy's own dtypes, replacing the file in one step."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.partial')
  arrays = {k: np.asarray(v, order='C') for k, v in arrays.items()}
  safetensors_numpy.save_file(arrays, partial, dict(metadata or {}))
  with partial.open('rb') as file:
    os.fsync(file.fileno())
  partial.replace(path)


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
  """What a file says of itself; its arrays are not read.

  Raises:
    FileFormatError: It is not a whole safetensors file.
  """
  with _opened(path) as file:
    return dict(file.metadata() or {})


def load(
  path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """The arrays and the metadata of a file.

  Raises:
    FileFormatError: It is not a whole safetensors file.
  """
  with _opened(path) as file:
    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return arrays, dict(file.metadata() or {})


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
  if os.path.isdir(path):
    raise FileFormatError(path, 'is a folder', 'pass a file in it')
  try:
    with safetensors.safe_open(path, framework='np') as file:
      yield file
  except (safetensors.SafetensorError, TypeError) as error:
    raise FileFormatError(
      path, f'is not a readable safetensors file ({error})', 'make it again'
    ) from error
