"""The folder of one run: its config, log, finished rows, results and report.

Files are replaced whole or appended a line at a time, so that a run killed at
any moment leaves a folder from which the same command goes on.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import datetime
import io
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
from typing import TYPE_CHECKING, Any

import flax
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from efficiency_jax.evaluation import speed

if TYPE_CHECKING:  # slow to import, and many runs draw nothing
  from matplotlib import figure as figures

Row = dict[str, Any]

_CONFIG = 'config.json'
_LOG = 'log.jsonl'
_ROWS = 'rows.jsonl'


class Workdir:
  """Where one experiment with one config keeps what it makes.

  Process 0 alone writes; every process knows the rows that were finished
  before, so that all of them skip the same work.

  Attributes:
    path: The folder.
    experiment: Name of the experiment.
    config: The config as plain JSON values.
    command: The command line that made, or goes on making, the run.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    experiment: str,
    config: Any,
    command: Sequence[str],
  ):
    """Opens a new folder, or one of the same experiment and config.

    Raises:
      ValueError: The folder holds another run or files of another kind. It is
        left as it was.
    """
    self.path = pathlib.Path(path)
    self.experiment = experiment
    self.config = plain(config)
    self.command = shlex.join(command)
    self._writes = jax.process_index() == 0
    self._rows = {}
    opened = _from_process_0(self._open)
    if 'error' in opened:
      raise ValueError(opened['error'])
    self._rows = opened['rows']

  def log(self, entry: Mapping[str, Any]) -> None:
    """Appends one JSON object to `log.jsonl`."""
    if self._writes:
      _append(self.path / _LOG, entry)

  def row(self, key: str, make: Callable[[], Mapping[str, Any]]) -> Row:
    """The result row of one case: read back if finished before, else made.

    Args:
      key: Names the case within the experiment.
      make: Measures it. Called on every process, and only if no earlier run
        had finished the case. Process 0's row is everybody's.

    Returns:
      The row as it stands in the file, whether just made or read back: plain
      JSON values, None in place of a number that is not finite.
    """
    if key not in self._rows:
      made = plain(make())
      row = _from_process_0(lambda: made)
      if self._writes:
        _append(self.path / _ROWS, {'key': key, 'row': row}, durable=True)
      self._rows[key] = row
    return dict(self._rows[key])

  def finished(self, key: str) -> bool:
    """Whether `row` would read this case back."""
    return key in self._rows

  def write_results(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `results.json`: what was run, where, and one row a case."""
    results = {
      'experiment': self.experiment,
      'config': self.config,
      'environment': environment(),
      'rows': plain(rows),
    }
    self._replace('results.json', _dumps(results, indent=2) + '\n')

  def write_report(self, markdown: str) -> None:
    """Writes `report.md`: a title, the text, and how to make it again."""
    facts = '\n'.join(
      f'- {name}: {"unknown" if value is None else value}'
      for name, value in environment().items()
    )
    self._replace(
      'report.md',
      f'# {self.experiment}\n\n{markdown.strip()}\n\n## How it was made\n\n'
      f'```\n{self.command}\n```\n\n{facts}\n',
    )

  def save_figure(self, figure: 'figures.Figure', name: str) -> pathlib.Path:
    """Writes a matplotlib figure as `name`.png and returns its path."""
    image = io.BytesIO()
    figure.savefig(image, format='png', dpi=144)
    self._replace(f'{name}.png', image.getvalue())
    return self.path / f'{name}.png'

  def _open(self) -> dict[str, Any]:
    """Makes or checks the folder; gives its finished rows, or what is wrong."""
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      mine = {'experiment': self.experiment, 'config': self.config}
      shown = {
        p.name for p in self.path.iterdir() if not p.name.startswith('.')
      }
      if shown - {_CONFIG} and _CONFIG not in shown:
        raise ValueError(
          f'--workdir={self.path} holds files but no {_CONFIG}: it is not the'
          ' folder of a run. Choose a new or an empty one.'
        )
      if shown - {_CONFIG}:
        differences = _differences(_read_json(self.path / _CONFIG), mine)
        if differences:
          raise ValueError(
            f'--workdir={self.path} holds a run with another config:'
            f' {"; ".join(differences)}. Choose another --workdir, or remove'
            ' this one.'
          )
      else:
        # A run that stopped at a mistake before its first result binds nobody.
        self._replace(_CONFIG, _dumps(mine, indent=2) + '\n')
      _mend(self.path / _LOG)
      _mend(self.path / _ROWS)
      finished = _read_lines(self.path / _ROWS)
      return {'rows': {line['key']: line['row'] for line in finished}}
    except OSError as error:
      why = error.strerror or describe(error)
      return {
        'error': f'--workdir={self.path}: {why}. Choose a folder that can be'
        ' written.'
      }
    except ValueError as error:
      return {'error': describe(error)}

  def _replace(self, name: str, content: str | bytes) -> None:
    """Writes a whole file, or leaves the one that was there."""
    if not self._writes:
      return
    data = _encode(content) if isinstance(content, str) else content
    target = self.path / name
    partial = target.with_name(f'.{name}.partial')
    with partial.open('wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    partial.replace(target)


def environment() -> dict[str, Any]:
  """Where and with what a result was made, and the most memory it took."""
  return {
    'python': platform.python_version(),
    'jax': jax.__version__,
    'flax': flax.__version__,
    'backend': jax.default_backend(),
    'device': _device(),
    'cores': _cores(),
    'peak_megabytes': round(speed.peak_bytes() / 1e6, 1),
    'git': _git(),
    'date': datetime.datetime.now(datetime.UTC).isoformat('T', 'seconds'),
  }


def plain(value: Any) -> Any:
  """The value in JSON's own types; a number that is not finite becomes None.

  Raises:
    TypeError: The value holds something that has no place in JSON.
  """
  if isinstance(value, ml_collections.ConfigDict):
    return plain(value.to_dict())
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return plain(dataclasses.asdict(value))
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple | set | frozenset):
    items = sorted(value) if isinstance(value, set | frozenset) else value
    return [plain(item) for item in items]
  if isinstance(value, jax.Array | np.ndarray | np.generic):
    return plain(np.asarray(value).tolist())
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if value is None or isinstance(value, bool | int | str):
    return value
  raise TypeError(f'{value!r} ({type(value).__name__}) has no form in JSON.')


def describe(error: BaseException) -> str:
  """The message of an error in one line."""
  text = ' '.join(str(error).split()) or type(error).__name__
  if isinstance(error, OSError) and error.filename and error.strerror:
    text = f'{os.fspath(error.filename)}: {error.strerror}'
  return text


def _dumps(value: Any, indent: int | None = None) -> str:
  return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)


def _encode(text: str) -> bytes:
  # A lone surrogate, as in an undecodable file name, becomes its JSON escape.
  return text.encode(errors='backslashreplace')


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}).') from error


def _read_lines(path: pathlib.Path) -> list[Any]:
  if not path.exists():
    return []
  try:
    with path.open(encoding='utf-8', newline='\n') as file:
      return [json.loads(line) for line in file]
  except ValueError as error:
    raise ValueError(
      f'{path} has a line that is not JSON ({error}).'
    ) from error


def _append(path: pathlib.Path, entry: Any, durable: bool = False) -> None:
  """Appends one line in one write."""
  with path.open('ab') as file:
    file.write(_encode(f'{_dumps(plain(entry))}\n'))
    file.flush()
    if durable:
      os.fsync(file.fileno())


def _mend(path: pathlib.Path) -> None:
  """Cuts off a last line that a killed run left unfinished."""
  if not path.exists():
    return
  content = path.read_bytes()
  whole = content[: content.rfind(b'\n') + 1]
  if whole != content:
    os.truncate(path, len(whole))


def _differences(theirs: Any, mine: Any, name: str = '') -> list[str]:
  """What differs between a stored value and ours, a phrase a field."""
  if isinstance(theirs, dict) and isinstance(mine, dict):
    found = []
    for key in sorted(theirs.keys() | mine.keys()):
      # The config's own fields are called as the flags that set them.
      inner = f'{name}.{key}' if name else key
      if key not in theirs:
        found.append(f'{inner} is new here')
      elif key not in mine:
        found.append(f'{inner} is only there')
      else:
        found += _differences(theirs[key], mine[key], inner)
    return found
  if theirs == mine:
    return []
  return [f'{name} is {_dumps(theirs)} there and {_dumps(mine)} here']


def _from_process_0(read: Callable[[], Any]) -> Any:
  """What `read` gives on process 0, on every process."""
  if jax.process_count() == 1:
    return read()
  first = jax.process_index() == 0
  data = _encode(_dumps(read())) if first else b''
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  padded = np.frombuffer(data.ljust(size, b'\0'), np.uint8)
  padded = np.asarray(multihost_utils.broadcast_one_to_all(padded))
  return json.loads(padded.astype(np.uint8).tobytes())


def _device() -> str:
  kind = jax.devices()[0].device_kind
  if kind != 'cpu':
    return kind
  info = pathlib.Path('/proc/cpuinfo')
  if info.exists():
    for line in info.read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def _cores() -> int:
  """Cores that this process may use, where the system tells."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _git() -> str | None:
  """The commit of this checkout, marked if files differ from it."""
  try:
    said = subprocess.run(
      ('git', 'describe', '--always', '--dirty', '--abbrev=12'),
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      timeout=30,
    )
  except (OSError, subprocess.TimeoutExpired):
    return None
  return said.stdout.strip() if said.returncode == 0 else None
