"""Reads the JSON files that come with checkpoints, without trusting them."""

import json
import pathlib
from typing import Any

from efficiency_jax.io import errors

MAX_BYTES = 64 * 2**20


def read_object(
  path: pathlib.Path, *, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
  """Reads a file that holds one JSON object.

  Numbers must be finite: the `NaN` and `Infinity` that Python's parser also
  takes are refused.

  Raises:
    FileFormatError: The file is missing, too large, or not such an object.
  """
  remedy = 'download the file again'
  text = read_text(path, max_bytes=max_bytes)
  try:
    value = json.loads(text, parse_constant=_refuse_constant)
    # Escapes can spell half of a surrogate pair, which is not text: it fails
    # wherever it is first written or passed on.
    json.dumps(value, ensure_ascii=False).encode('utf-8')
  except (ValueError, RecursionError) as error:
    problem = f'is not valid JSON ({error})'
    raise errors.FileFormatError(path, problem, remedy) from error
  if not isinstance(value, dict):
    problem = f'holds a JSON {type(value).__name__}, expected an object'
    raise errors.FileFormatError(path, problem, remedy)
  return value


def read_text(path: pathlib.Path, *, max_bytes: int = MAX_BYTES) -> str:
  """Reads a UTF-8 file of at most `max_bytes`."""
  remedy = 'download the file again'
  try:
    with open(path, 'rb') as file:
      data = file.read(max_bytes + 1)
  except OSError as error:
    problem = f'cannot be read ({error.strerror})'
    raise errors.FileFormatError(path, problem, remedy) from error
  if len(data) > max_bytes:
    problem = f'is larger than {max_bytes} bytes'
    raise errors.FileFormatError(path, problem, 'check that it is the file')
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    problem = f'is not UTF-8 text ({error.reason} at byte {error.start})'
    raise errors.FileFormatError(path, problem, remedy) from error


def _refuse_constant(name: str) -> float:
  raise ValueError(f'{name} is not JSON')
