"""The edge that all experiments share: flags, start-up, a user's mistakes.

An experiment is a function of a config and a folder:

    def experiment(config, workdir):
      rows = [workdir.row(name, lambda: measure(name)) for name in config.cases]
      workdir.write_results(rows)

    def main(argv):
      launch.run('decode', experiment, argv)

    if __name__ == '__main__':
      main(sys.argv)

and it is started, on one host or with the same command on each of many, by

    python -m experiments.decode --config=configs/FILE.py --workdir=DIR
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import difflib
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from typing import Any

from absl import flags
import jax
import ml_collections
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from efficiency_jax.io import assets
from efficiency_jax.training import loop
from experiments import workdir as workdirs

Experiment = Callable[..., Any]  # of the config and the opened workdir


def run(
  name: str,
  experiment: Experiment,
  argv: Sequence[str],
  switches: Mapping[str, str] | None = None,
) -> None:
  """Runs an experiment as its command line says.

  What a user can put right, a `ValueError` or an `OSError` (a wrong flag, a
  missing or damaged file, a folder of another run), ends in one line on the
  error stream and exit code 1. `--debug` shows where it came from.

  Args:
    name: The module's name within `experiments`.
    experiment: Is called with the config and the opened workdir.
    argv: The command line, the program's own name first.
    switches: Further flags that are on or off, with their help: how a run is
      shown, not what it measures. They reach `experiment` as keyword arguments.

  Raises:
    SystemExit: With code 1 after a user's mistake, 130 after Ctrl-C, 143 after
      SIGTERM in training, and 0 after `--help`.
  """
  debug = any(arg.lstrip('-') in ('debug', 'debug=true') for arg in argv[1:])
  try:
    config, values = parse(name, argv, switches)
    _start(values)
    command = ('python', '-m', f'experiments.{name}', *argv[1:])
    workdir = workdirs.Workdir(
      values.workdir, experiment=name, config=config, command=command
    )
    shown = {switch: values[switch].value for switch in switches or {}}
    experiment(config, workdir, **shown)
  except KeyboardInterrupt:
    print('interrupted: the same command goes on from here.', file=sys.stderr)
    raise SystemExit(130) from None
  except loop.Preempted as stop:
    print(f'{stop} The same command goes on.', file=sys.stderr)
    raise SystemExit(143) from None
  except (ValueError, OSError, flags.Error) as error:
    if debug:
      traceback.print_exc()
    print(f'error: {workdirs.describe(error)}', file=sys.stderr)
    raise SystemExit(1) from None


def parse(
  name: str, argv: Sequence[str], switches: Mapping[str, str] | None = None
) -> tuple[ml_collections.ConfigDict, flags.FlagValues]:
  """Reads the command line: the config with its overrides, and the flags.

  Raises:
    ValueError: A flag or a field of the config is unknown, missing or wrong.
    SystemExit: `--help` was asked for.
  """
  values = _define(switches)
  values.set_gnu_getopt(True)
  rest = values(list(argv), known_only=True)
  if values.help:
    print(_usage(name, values))
    raise SystemExit(0)
  for flag, example in (
    ('config', f'configs/{name}.py'),
    ('workdir', f'runs/{name}'),
  ):
    if not values[flag].value:
      raise ValueError(f'--{flag} is missing, for example --{flag}={example}.')
  config = load_config(values.config)
  for arg in rest[1:]:
    if re.match('--?(no)?config[.]', arg):
      _check_field(config, arg.partition('=')[0].partition('.')[2])

  # The overrides are parsed by the types of the loaded config's fields. The
  # other flags stand here only to be proposed in place of a mistyped one.
  overrides = _define(switches, without='config')
  overrides.set_gnu_getopt(True)
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=overrides, sys_argv=list(rest)
  )
  unexpected = overrides(rest)[1:]
  if unexpected:
    raise ValueError(
      f'{unexpected[0]!r} is not a flag: settings are given as'
      ' --config.FIELD=VALUE.'
    )
  return overrides.config, values


def load_config(spec: str) -> ml_collections.ConfigDict:
  """Loads a config file: `FILE.py` or `FILE.py:ARGUMENT_OF_GET_CONFIG`.

  Raises:
    ValueError: There is no such file, it raises, or it gives no config.
  """
  file, *argument = spec.split(':', 1)
  if not pathlib.Path(file).is_file():
    raise ValueError(f'--config={spec}: there is no file {file}.')
  try:
    found = importlib.util.spec_from_file_location('experiment_config', file)
    if found is None:
      raise ValueError('a config is a Python file, FILE.py')
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
      raise ValueError('the file defines no function get_config')
    config = module.get_config(*argument)
    if not isinstance(config, ml_collections.ConfigDict):
      raise ValueError(
        'get_config must return an ml_collections.ConfigDict, not'
        f' {type(config).__name__}'
      )
  except Exception as error:  # the file is the user's: whatever it raises
    kind = '' if type(error) is ValueError else f'{type(error).__name__}: '
    at = _line_in(file, error)
    raise ValueError(
      f'--config={spec}: {kind}{workdirs.describe(error)}{at}'
    ) from error
  return config


def _define(
  switches: Mapping[str, str] | None = None, without: str = ''
) -> flags.FlagValues:
  """The flags of every experiment, apart from those of the process."""
  values = flags.FlagValues()
  texts: Mapping[str, str] = {
    'config': 'the config file, FILE.py or FILE.py:ARGUMENT; a field of it'
    ' is set by --config.FIELD=VALUE',
    'workdir': 'folder for results; a run that was stopped goes on there',
    'coordinator': 'host:port of process 0, to run on several hosts',
  }
  for flag, text in texts.items():
    if flag != without:
      flags.DEFINE_string(flag, None, text, flag_values=values)
  for flag, text in {
    'num_processes': 'how many processes run; goes with --coordinator',
    'process_id': 'which of them this is, from 0; goes with --coordinator',
  }.items():
    flags.DEFINE_integer(flag, None, text, 0, flag_values=values)
  for flag, default, text in (
    ('multihost', False, 'Cloud TPU, Slurm or Kubernetes: find the others'),
    ('compilation_cache', True, 'keep compiled programs between runs'),
    ('debug', False, 'show where an error came from'),
    ('help', False, 'show this and stop'),
    *((switch, False, text) for switch, text in (switches or {}).items()),
  ):
    flags.DEFINE_boolean(flag, default, text, flag_values=values)
  return values


def _usage(name: str, values: flags.FlagValues) -> str:
  lines = [
    f'python -m experiments.{name} --config=FILE.py --workdir=DIR',
    '  [--config.FIELD=VALUE ...]',
    '',
  ]
  for flag in (
    'config',
    'workdir',
    *sorted(set(values) - {'config', 'workdir'}),
  ):
    default = values[flag].default
    note = '' if default in (None, False) else ' (on; --no... turns it off)'
    lines.append(f'  --{flag}: {values[flag].help}{note}')
  return '\n'.join(lines)


def _check_field(config: ml_collections.ConfigDict, path: str) -> None:
  """Refuses a field that the config does not have, and proposes one."""
  node = config
  for part in config_path.split(path):
    if not isinstance(node, ml_collections.ConfigDict):
      return  # an index into a field's value: left to the parser
    if part not in node:
      close = difflib.get_close_matches(str(part), list(node), 1)
      raise ValueError(
        f'--config.{path}: no such field; '
        + (
          f'did you mean {close[0]!r}?'
          if close
          else f'there are {_names(node)}.'
        )
      )
    node = node[part]


def _names(node: ml_collections.ConfigDict) -> str:
  return ', '.join(sorted(node)) or 'none here'


def _line_in(file: str, error: Exception) -> str:
  """Where in a config file an error arose."""
  if isinstance(error, SyntaxError):
    return ''  # its message says so
  path = os.path.abspath(file)
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if os.path.abspath(f.filename) == path]
  return f' (line {lines[-1]})' if lines else ''


def keep_programs() -> None:
  """Keeps compiled programs in the cache folder, for later runs to load."""
  folder = assets.cache_directory() / 'compiled'
  with contextlib.suppress(OSError):  # a home that cannot be written
    folder.mkdir(parents=True, exist_ok=True)
    jax.config.update('jax_compilation_cache_dir', str(folder))


def _start(values: flags.FlagValues) -> None:
  """Joins the other processes, and turns the compilation cache on."""
  if values.coordinator:
    for flag in ('num_processes', 'process_id'):
      if values[flag].value is None:
        raise ValueError(f'--{flag} is missing: it goes with --coordinator.')
    jax.distributed.initialize(
      values.coordinator, values.num_processes, values.process_id
    )
  elif values.multihost:
    jax.distributed.initialize()
  if values.compilation_cache:
    keep_programs()
