"""Reads small tables from Arrow streams, as Hugging Face saves data sets.

A stream is a row of messages, each a FlatBuffers table followed by the bytes
that it describes (https://arrow.apache.org/docs/format/Columnar.html). Read are
columns of strings and numbers without gaps, whose kinds the caller knows.
"""

from collections.abc import Mapping
import os
import pathlib
import struct
from typing import Any

import numpy as np

from efficiency_jax.io import errors

_RECORD_BATCH = 3  # a kind of message


def read(
  path: str | os.PathLike[str], kinds: Mapping[str, Any]
) -> dict[str, list]:
  """The columns of a table by name, as lists of values.

  Args:
    path: The file.
    kinds: All columns in the order of the file: str, or a numpy dtype.

  Raises:
    FileFormatError: The file is damaged or holds other columns.
  """
  data = pathlib.Path(path).read_bytes()
  columns: dict[str, list] = {name: [] for name in kinds}
  place = 0
  try:
    while place < len(data):
      mark, size = struct.unpack_from('<iI', data, place)
      if mark != -1:
        raise ValueError(f'no message begins at byte {place}')
      if not size:  # the end of the stream
        break
      body = place + 8 + size
      message = _follow(data, place + 8)
      place = body + _number(data, message, 3, 'Q')
      if place > len(data):
        raise ValueError('it breaks off')
      if _number(data, message, 1, 'B') == _RECORD_BATCH:
        batch = _follow(data, _field(data, message, 2))
        _append(data, batch, body, kinds, columns)
  except (struct.error, IndexError, ValueError) as error:
    raise errors.FileFormatError(
      path,
      f'is not an Arrow stream of the columns {", ".join(kinds)} ({error})',
      'fetch it again',
    ) from error
  return columns


def _append(
  data: bytes,
  batch: int,
  body: int,
  kinds: Mapping[str, Any],
  columns: dict[str, list],
) -> None:
  """Adds the rows of the record batch at `batch` to the columns."""
  rows = _number(data, batch, 0, 'q')
  vector = _follow(data, _field(data, batch, 2))
  (count,) = struct.unpack_from('<I', data, vector)
  places = struct.iter_unpack('<qq', data[vector + 4 : vector + 4 + 16 * count])
  buffers = [data[body + start : body + start + n] for start, n in places]
  # Each column begins with a bit map of its gaps, which is empty without any.
  widths = [3 if kind is str else 2 for kind in kinds.values()]
  if sum(widths) != len(buffers):
    raise ValueError(f'it has {len(buffers)} buffers, not {sum(widths)}')
  for (name, kind), width in zip(kinds.items(), widths):
    gaps, first, *texts = buffers[:width]
    buffers = buffers[width:]
    if gaps:
      raise ValueError(f'column {name} has gaps')
    if kind is str:
      ends = np.frombuffer(first, '<i4', rows + 1).tolist()
      pairs = zip(ends, ends[1:])
      columns[name] += [texts[0][a:b].decode('utf8') for a, b in pairs]
    else:
      columns[name] += np.frombuffer(first, kind, rows).tolist()


def _number(data: bytes, table: int, field: int, form: str) -> int:
  """The number in a field of a FlatBuffers table; 0 is not written."""
  place = _find(data, table, field)
  return struct.unpack_from(f'<{form}', data, place)[0] if place else 0


def _field(data: bytes, table: int, field: int) -> int:
  """Where a field that must be there lies."""
  place = _find(data, table, field)
  if not place:
    raise ValueError(f'field {field} of a table is missing')
  return place


def _find(data: bytes, table: int, field: int) -> int:
  """Where a field lies, by the list of places before the table; or 0."""
  (back,) = struct.unpack_from('<i', data, table)
  (size,) = struct.unpack_from('<H', data, table - back)
  entry = 4 + 2 * field
  if entry >= size:
    return 0
  (offset,) = struct.unpack_from('<H', data, table - back + entry)
  return table + offset if offset else 0


def _follow(data: bytes, place: int) -> int:
  """Where the offset that is stored at `place` points."""
  return place + struct.unpack_from('<I', data, place)[0]
