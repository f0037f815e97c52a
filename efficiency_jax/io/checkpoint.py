"""Checkpoints of a training run: whole, verified, or not there.

The only module that knows Orbax. A checkpoint holds a tree of arrays (sharded
or not) and a small JSON value beside it, such as the place of the data
iterator. It is written into a folder of another name, moved into place when it
is complete, and sealed with the sha256 of each of its files; a folder without a
seal was never finished and counts as absent. So a full disk or a killed process
costs the checkpoint that was being written and no other, and a damaged file is
noticed before any number of it is believed.
"""

from collections.abc import Callable
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from efficiency_jax.io.errors import FileFormatError

_SEAL = 'seal.json'


class CheckpointError(OSError):
  """A checkpoint could not be written; earlier ones are as they were."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
  """The checkpoints of one run, a folder for each kept step.

  Attributes:
    folder: Holds them. On several hosts it is one folder that all of them see.
    keep: How many of the latest to keep, at least 1. The best one, if any was
      saved with a score, is kept as well.
  """

  folder: pathlib.Path
  keep: int = 2

  def __post_init__(self):
    if self.keep < 1:
      raise ValueError(f'keep must be >= 1, got {self.keep}.')

  def steps(self) -> list[int]:
    """Steps whose checkpoints are complete, in order."""
    found = []
    if self.folder.is_dir():
      for path in self.folder.iterdir():
        if path.name.isdigit() and (path / _SEAL).is_file():
          found.append(int(path.name))
    return sorted(found)

  def latest(self) -> int | None:
    """The last complete step."""
    steps = self.steps()
    return steps[-1] if steps else None

  def best(self) -> int | None:
    """The step with the lowest score; the earliest of equals."""
    scores = {step: self._seal(step).get('score') for step in self.steps()}
    scores = {step: s for step, s in scores.items() if s is not None}
    return min(scores, key=lambda step: (scores[step], step), default=None)

  def save(
    self, step: int, tree: Any, extra: Any = None, score: float | None = None
  ) -> None:
    """Writes the checkpoint of `step`; all processes must call it together.

    Args:
      step: Its number.
      tree: Arrays, in any tree of containers.
      extra: A JSON value.
      score: Lower is better; the best checkpoint outlives `keep`.

    Raises:
      CheckpointError: It could not be written. Nothing else has changed.
    """
    final = self.folder / str(step)
    partial = self.folder / f'.partial-{step}'
    arrays = _by_path(tree)
    try:
      _on_first(lambda: self._make_room(partial))
      ocp.save_checkpointables(
        partial / 'tree', {'tree': arrays}, overwrite=True
      )
      facts = {
        'step': step,
        'score': score,
        'extra': extra,
        'shapes': _shapes(arrays),
      }
      _on_first(lambda: _finish(partial, final, facts))
    except Exception as error:  # whatever a full or broken disk makes Orbax say
      _on_first(lambda: shutil.rmtree(partial, ignore_errors=True), quiet=True)
      why = ' '.join(str(error).split())[:200] or type(error).__name__
      raise CheckpointError(
        f'The checkpoint of step {step} could not be written to {self.folder}'
        f' ({why}). Earlier checkpoints are whole; make room, and the same'
        ' command goes on from the last one.'
      ) from error
    _on_first(self._forget_old)

  def load(self, step: int, like: Any) -> tuple[Any, Any]:
    """The tree and the JSON value of a step.

    Args:
      step: A complete one.
      like: A tree of the same structure; its arrays or
        `jax.ShapeDtypeStruct`s say which dtypes and shardings to restore to.

    Raises:
      FileFormatError: A file is missing, damaged, or fits another tree.
    """
    folder = self.folder / str(step)
    remedy = f'remove {folder}, and the run goes on from an earlier one'
    seal = self._seal(step)
    for name, digest in seal['files'].items():
      path = folder / name
      if not path.is_file():
        raise FileFormatError(folder, f'{name} is missing', remedy)
      if _sha256(path) != digest:
        raise FileFormatError(folder, f'{name} is damaged', remedy)
    arrays = _by_path(like)
    found, expected = seal['shapes'], _shapes(arrays)
    if found != expected:
      names = sorted(found.keys() | expected.keys())
      name = next(n for n in names if found.get(n) != expected.get(n))
      raise FileFormatError(
        folder,
        f'holds another tree: {name} is {found.get(name, "absent")} there and'
        f' {expected.get(name, "absent")} here',
        'use the config that it was made with',
      )
    abstract = {name: _abstract(leaf) for name, leaf in arrays.items()}
    read = ocp.load_checkpointables(folder / 'tree', {'tree': abstract})['tree']
    leaves = [read[name] for name in arrays]
    return jax.tree.structure(like).unflatten(leaves), seal['extra']

  def _seal(self, step: int) -> dict[str, Any]:
    path = self.folder / str(step) / _SEAL
    try:
      seal = json.loads(path.read_text(encoding='utf-8'))
      if not {'files', 'shapes', 'extra'} <= seal.keys():
        raise ValueError('fields are missing')
    except (OSError, ValueError, AttributeError) as error:
      raise FileFormatError(
        path, f'is not readable ({error})', f'remove {path.parent}'
      ) from error
    return seal

  def _make_room(self, partial: pathlib.Path) -> None:
    self.folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

  def _forget_old(self) -> None:
    kept = {*self.steps()[-self.keep :], self.best()}
    for step in set(self.steps()) - kept:
      # Without its seal it counts as absent, however far the removal gets.
      (self.folder / str(step) / _SEAL).unlink()
      shutil.rmtree(self.folder / str(step), ignore_errors=True)


def _finish(
  partial: pathlib.Path, final: pathlib.Path, facts: dict[str, Any]
) -> None:
  files = sorted(path for path in partial.rglob('*') if path.is_file())
  digests = {str(path.relative_to(partial)): _sha256(path) for path in files}
  with open(partial / _SEAL, 'w', encoding='utf-8') as file:
    json.dump({**facts, 'files': digests}, file, indent=1)
    file.flush()
    os.fsync(file.fileno())
  if final.exists():
    shutil.rmtree(final)
  partial.rename(final)


def _by_path(tree: Any) -> dict[str, Any]:
  """The leaves by their paths: independent of the classes around them."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='.')
  return {name(path): leaf for path, leaf in leaves}


def _shapes(arrays: dict[str, Any]) -> dict[str, list[int]]:
  return {name: list(array.shape) for name, array in arrays.items()}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None)
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _on_first(act: Callable[[], Any], quiet: bool = False) -> None:
  """Runs `act` on process 0; all wait for it, and fail if it failed."""
  failure = None
  if jax.process_index() == 0:
    try:
      act()
    except OSError as error:
      failure = error
  if jax.process_count() > 1:
    failed = multihost_utils.broadcast_one_to_all(failure is not None)
    if bool(failed) and failure is None:
      failure = OSError('process 0 could not write')
  if failure is not None and not quiet:
    raise failure
