"""What a run wrote down: one JSON object a step, and TensorBoard if wanted.

A run that is continued from a checkpoint forgets the lines after it, so that
the file of a run that was stopped holds the same steps, each once, as that of a
run that was not.
"""

from collections.abc import Mapping
import importlib.util
import json
import math
import os
import pathlib
from typing import Any

import jax


class Logbook:
  """Appends numbers of steps to a file; process 0 alone writes.

  Attributes:
    path: The JSONL file.
  """

  def __init__(
    self, path: str | os.PathLike[str], *, tensorboard: bool = False
  ):
    """Opens the file for appending.

    Raises:
      ValueError: TensorBoard files are wanted and tensorboardX is missing.
    """
    self.path = pathlib.Path(path)
    self._writes = jax.process_index() == 0
    self._board = None
    if tensorboard:
      if importlib.util.find_spec('tensorboardX') is None:
        raise ValueError(
          'tensorboard files need tensorboardX: pip install tensorboardX, or'
          ' switch them off.'
        )
      if self._writes:
        import tensorboardX

        self._board = tensorboardX.SummaryWriter(
          str(self.path.parent / 'tensorboard')
        )

  def rewind(self, step: int) -> None:
    """Forgets the lines of steps beyond `step`, and an unfinished last one."""
    if not self._writes or not self.path.exists():
      return
    lines = self.path.read_bytes().split(b'\n')[:-1]
    kept = [line for line in lines if not _beyond(line, step)]
    partial = self.path.with_name(f'.{self.path.name}.partial')
    partial.write_bytes(b''.join(line + b'\n' for line in kept))
    partial.replace(self.path)

  def write(self, step: int, numbers: Mapping[str, Any]) -> None:
    """Appends `{"step": step, ...}`; a number that is not finite is null."""
    if not self._writes:
      return
    numbers = {name: float(value) for name, value in numbers.items()}
    plain = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
    line = json.dumps({'step': step, **plain}, allow_nan=False)
    with self.path.open('ab') as file:
      file.write(line.encode() + b'\n')
    if self._board is not None:
      for name, value in numbers.items():
        self._board.add_scalar(name, value, step)

  def close(self) -> None:
    """Writes out what TensorBoard still holds."""
    if self._board is not None:
      self._board.close()


def _beyond(line: bytes, step: int) -> bool:
  try:
    entry = json.loads(line)
  except ValueError:
    return True
  return isinstance(entry, dict) and entry.get('step', 0) > step
