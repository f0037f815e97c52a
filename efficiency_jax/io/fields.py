"""Strictly typed reading of settings from JSON objects and GGUF metadata."""

from collections.abc import Mapping
import math
import os
from typing import Any

from efficiency_jax.io import errors

# No decoder comes near these; they keep a hostile file from asking for work
# that grows with a number it made up.
MAX_SIZE = 2**31
MAX_LAYERS = 4096

_REQUIRED = object()


class Fields:
  """A mapping whose values are checked as they are read.

  JSON `null` counts as absent, as it does in the configurations of Hugging
  Face. Every error names the file and the field.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    values: Mapping[str, Any],
    prefix: str = '',
  ):
    self.path = path
    self.values = values
    self.prefix = prefix

  def error(
    self, name: str, problem: str, remedy: str = 'check the file'
  ) -> errors.FileFormatError:
    return errors.FileFormatError(
      self.path, f'{self.prefix}{name} {problem}', remedy
    )

  def get(self, name: str) -> Any:
    return self.values.get(self.prefix + name)

  def size(
    self, name: str, default: Any = _REQUIRED, maximum: int = MAX_SIZE
  ) -> Any:
    """A whole number in 1..maximum."""
    value = self.get(name)
    if value is None:
      return self._default(name, default)
    if type(value) is not int or not 1 <= value <= maximum:
      raise self.error(
        name, f'is {value!r}, expected a whole number in 1..{maximum}'
      )
    return value

  def index(self, name: str, default: Any = None) -> Any:
    """A whole number in 0..MAX_SIZE."""
    value = self.get(name)
    if value is None:
      return self._default(name, default)
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
      raise self.error(name, f'is {value!r}, expected a whole number >= 0')
    return value

  def positive(self, name: str, default: Any = _REQUIRED) -> Any:
    """A finite number above zero."""
    value = self.get(name)
    if value is None:
      return self._default(name, default)
    if type(value) not in (int, float):
      raise self.error(name, f'is {value!r}, expected a number')
    # Compared first: a huge integer does not fit in a float.
    if not 0 < value <= 1e38 or not math.isfinite(value):
      raise self.error(name, f'is {value!r}, expected a finite number > 0')
    return float(value)

  def flag(self, name: str, default: Any = False) -> Any:
    value = self.get(name)
    if value is None:
      return self._default(name, default)
    if type(value) is not bool:
      raise self.error(name, f'is {value!r}, expected true or false')
    return value

  def text(self, name: str, default: Any = _REQUIRED) -> Any:
    value = self.get(name)
    if value is None:
      return self._default(name, default)
    if not isinstance(value, str):
      raise self.error(name, f'is {value!r}, expected a string')
    return value

  def object(self, name: str) -> 'Fields | None':
    """A nested object, or None where there is none."""
    value = self.get(name)
    if value is None:
      return None
    if not isinstance(value, Mapping):
      raise self.error(name, f'is {value!r}, expected an object')
    return Fields(self.path, value)

  def _default(self, name: str, default: Any) -> Any:
    if default is _REQUIRED:
      raise self.error(name, 'is missing')
    return default
