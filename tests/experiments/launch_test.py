"""Flags, start-up and errors, mostly with an experiment of three numbers."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import pytest

from efficiency_jax.training import loop
from experiments import launch

ROOT = pathlib.Path(__file__).parent.parent.parent

CONFIG = """
import ml_collections

def get_config(preset='small'):
  config = ml_collections.ConfigDict()
  config.cases = {'small': 3, 'large': 5}[preset]
  config.names = ('a', 'b')
  config.verbose = False
  config.decoding = ml_collections.ConfigDict()
  config.decoding.temperature = 0.5
  config.decoding.draft_length = 4
  return config
"""

# One row a case. In the third the process is killed, unless it was before.
EXPERIMENT = """
import os, pathlib, signal, sys
import jax
from experiments import launch

def measure(case, config, workdir):
  with open(os.environ['CALLS'], 'a') as calls:
    calls.write(f'{case} ')
  if case == 2 and os.environ.get('KILL'):
    os.kill(os.getpid(), signal.SIGKILL)
  square = jax.jit(lambda x: config.decoding.temperature * x * x)
  return {'method': 'square', 'case': case, 'value': square(case)}

def experiment(config, workdir):
  rows = []
  for case in range(config.cases):
    rows.append(workdir.row(str(case), lambda: measure(case, config, workdir)))
    workdir.log(rows[-1])
  workdir.write_results(rows)

def main(argv):
  launch.run('squares', experiment, argv)

if __name__ == '__main__':
  main(sys.argv)
"""


@pytest.fixture
def config(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG)
  return path


@pytest.fixture
def start(tmp_path, config):
  """Starts the experiment in a process of its own."""
  script = tmp_path / 'squares.py'
  script.write_text(EXPERIMENT)

  def popen(*args, **variables):
    environment = dict(
      os.environ,
      PYTHONPATH=str(ROOT),
      EFFICIENCY_JAX_CACHE=str(tmp_path / 'cache'),
      CALLS=str(tmp_path / 'calls'),
    )
    return subprocess.Popen(
      [sys.executable, script, f'--config={config}', *args],
      env=environment | variables,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  return popen


def _finish(process):
  output, errors = process.communicate(timeout=120)
  return process.returncode, output, errors


def _rows(workdir):
  return json.loads((workdir / 'results.json').read_text())['rows']


def _tree(path):
  """Every file below a path and its bytes, Python's own caches apart."""
  files = [p for p in path.rglob('*') if p.is_file() and p.suffix != '.pyc']
  return {p: p.read_bytes() for p in files}


def _parse(config, *args):
  argv = ['squares', f'--config={config}', '--workdir=unused', *args]
  return launch.parse('squares', argv)[0]


def test_overrides_have_the_types_of_their_fields(config):
  parsed = _parse(
    f'{config}:large',
    '--config.decoding.temperature=2',
    '--config.decoding.draft_length',
    '7',
    '--config.names=("x", "y", "z")',
    '--config.verbose',
  )
  assert parsed.cases == 5
  assert parsed.decoding.temperature == 2.0
  assert isinstance(parsed.decoding.temperature, float)
  assert parsed.decoding.draft_length == 7
  assert parsed.names == ('x', 'y', 'z')
  assert parsed.verbose


def test_a_second_run_in_the_same_process_starts_afresh(config):
  assert _parse(config, '--config.cases=9').cases == 9
  assert _parse(config).cases == 3


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    (
      '--config.decodng.temperature=1',
      "--config.decodng.temperature: no such field; did you mean 'decoding'?",
    ),
    (
      '--config.decoding.temprature=1',
      '--config.decoding.temprature: no such field; did you mean'
      " 'temperature'?",
    ),
    (
      '--config.decoding.zzz=1',
      '--config.decoding.zzz: no such field; there are draft_length,'
      ' temperature.',
    ),
    (
      '--noconfig.zzz',
      '--config.zzz: no such field; there are cases, decoding, names, verbose.',
    ),
    (
      '--config.cases=many',
      'flag --config.cases=many: invalid literal for int() with base 10:'
      " 'many'",
    ),
    (
      '--wrkdir=x',
      "Unknown command line flag 'wrkdir'. Did you mean: workdir ?",
    ),
    (
      'cases=4',
      "'cases=4' is not a flag: settings are given as --config.FIELD=VALUE.",
    ),
    (
      '--coordinator=localhost:1',
      '--num_processes is missing: it goes with --coordinator.',
    ),
    ('--workdir=', '--workdir is missing, for example --workdir=runs/squares.'),
    (
      '--config=',
      '--config is missing, for example --config=configs/squares.py.',
    ),
    ('--config=no.py', '--config=no.py: there is no file no.py.'),
    ('--config=no.py:large', '--config=no.py:large: there is no file no.py.'),
  ],
)
def test_a_wrong_flag_ends_in_one_line(
  config, tmp_path, capsys, monkeypatch, flag, message
):
  monkeypatch.chdir(tmp_path)
  before = _tree(tmp_path)

  def experiment(config, workdir):
    raise AssertionError('the experiment must not start')

  argv = ['squares', f'--config={config}', '--workdir=w', flag]
  with pytest.raises(SystemExit) as ended:
    launch.run('squares', experiment, argv)
  assert ended.value.code == 1
  assert capsys.readouterr().err == f'error: {message}\n'
  assert {
    p: b for p, b in _tree(tmp_path).items() if p.suffix != '.pyc'
  } == before


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('x = 1\ny = 1 / 0\n', r'ZeroDivisionError: division by zero \(line 2\)'),
    ('def get_config(:\n', r'SyntaxError: .*line 1\)'),
    ('import no_such_thing\n', r"ModuleNotFoundError: .*'no_such_thing'.*"),
    ('x = 1\n', 'the file defines no function get_config'),
    ('def get_config():\n  return 3\n', 'get_config must return .* not int'),
    (
      'def get_config():\n  raise ValueError("two\\nlines")\n',
      r'two lines \(line 2\)',
    ),
    ('get_config = lambda: {}.x\n', r'AttributeError: .* \(line 1\)'),
  ],
)
def test_a_wrong_config_file_is_named(tmp_path, source, message):
  path = tmp_path / 'wrong.py'
  path.write_text(source)
  with pytest.raises(ValueError, match=f'^--config={path}: {message}$'):
    launch.load_config(str(path))


@pytest.mark.parametrize(
  'error', [ValueError('bad'), FileNotFoundError(2, 'gone', 'model.gguf')]
)
def test_a_mistake_found_later_is_one_line_too(config, tmp_path, capsys, error):
  def experiment(config, workdir):
    raise error

  argv = ['squares', f'--config={config}', f'--workdir={tmp_path / "w"}']
  argv.append('--nocompilation_cache')
  with pytest.raises(SystemExit):
    launch.run('squares', experiment, argv)
  message = {'bad': 'bad'}.get(str(error), 'model.gguf: gone')
  assert capsys.readouterr().err == f'error: {message}\n'
  with pytest.raises(SystemExit):
    launch.run('squares', experiment, [*argv, '--debug'])
  assert re.search('Traceback(.|\n)*in experiment', capsys.readouterr().err)


def test_a_training_that_was_asked_to_end_says_so(config, tmp_path, capsys):
  def fail(config, workdir):
    raise loop.Preempted('stopped at step 3 of 9.')

  arguments = [f'--config={config}', f'--workdir={tmp_path / "run"}']
  with pytest.raises(SystemExit) as ended:
    launch.run('measure', fail, ['measure', *arguments])
  assert ended.value.code == 143
  error = capsys.readouterr().err
  assert error == ('stopped at step 3 of 9. The same command goes on.\n')


def test_a_programming_error_keeps_its_traceback(config, tmp_path):
  def experiment(config, workdir):
    raise TypeError('ours')

  argv = ['squares', f'--config={config}', f'--workdir={tmp_path / "w"}']
  argv.append('--nocompilation_cache')
  with pytest.raises(TypeError, match='ours'):
    launch.run('squares', experiment, argv)


def test_help_names_every_flag(capsys):
  with pytest.raises(SystemExit) as ended:
    launch.parse('squares', ['squares', '--help'])
  assert ended.value.code == 0
  printed = capsys.readouterr().out
  for flag in ('config', 'workdir', 'multihost', 'compilation_cache', 'debug'):
    assert f'--{flag}' in printed


@pytest.mark.short
def test_a_killed_run_goes_on_where_it_stopped(start, tmp_path):
  whole, cut = tmp_path / 'whole', tmp_path / 'cut'
  assert _finish(start(f'--workdir={whole}'))[0] == 0
  calls = tmp_path / 'calls'
  calls.unlink()

  code, _, _ = _finish(start(f'--workdir={cut}', KILL='yes'))
  assert code == -signal.SIGKILL
  assert not (cut / 'results.json').exists()
  # As if the power had gone in the middle of a write.
  for name in ('rows.jsonl', 'log.jsonl'):
    with (cut / name).open('a') as file:
      file.write('{"key": "2", "ro')

  code, _, errors = _finish(start(f'--workdir={cut}'))
  assert (code, errors) == (0, '')
  assert calls.read_text().split() == ['0', '1', '2', '2']
  assert _rows(cut) == _rows(whole)
  assert [row['value'] for row in _rows(cut)] == [0.0, 0.5, 2.0]
  for line in (cut / 'log.jsonl').read_text().splitlines():
    json.loads(line)


@pytest.mark.short
def test_a_mistake_leaves_no_traceback_and_no_trace(start, tmp_path):
  workdir = tmp_path / 'w'
  assert _finish(start(f'--workdir={workdir}'))[0] == 0
  before = _tree(workdir)
  code, output, errors = _finish(
    start(f'--workdir={workdir}', '--config.decoding.draft_length=8')
  )
  assert (code, output) == (1, '')
  assert errors == (
    f'error: --workdir={workdir} holds a run with another config:'
    ' config.decoding.draft_length is 4 there and 8 here. Choose another'
    ' --workdir, or remove this one.\n'
  )
  assert _tree(workdir) == before


def test_the_compilation_cache_changes_neither_results_nor_output(
  start, tmp_path
):
  # Everything is worth keeping, however short its compilation.
  variables = {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  seen = []
  for name, flags in (
    ('off', ['--nocompilation_cache']),
    ('cold', []),
    ('warm', []),
  ):
    process = start(f'--workdir={tmp_path / name}', *flags, **variables)
    assert _finish(process) == (0, '', '')
    seen.append(_rows(tmp_path / name))
    assert (tmp_path / 'cache').exists() == (name != 'off')
  assert any((tmp_path / 'cache' / 'compiled').iterdir())
  assert seen[0] == seen[1] == seen[2]


def test_two_processes_share_a_folder_and_one_writes(start, tmp_path):
  def both(*flags):
    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    together = (
      f'--workdir={tmp_path / "w"}',
      f'--coordinator=localhost:{port}',
      '--num_processes=2',
    )
    started = [
      start(*together, f'--process_id={index}', *flags) for index in range(2)
    ]
    return [_finish(process) for process in started]

  assert [code for code, _, _ in both()] == [0, 0]
  assert [row['value'] for row in _rows(tmp_path / 'w')] == [0.0, 0.5, 2.0]
  lines = (tmp_path / 'w' / 'rows.jsonl').read_text().splitlines()
  assert len(lines) == 3
  calls = (tmp_path / 'calls').read_text().split()
  assert sorted(calls) == ['0', '0', '1', '1', '2', '2']

  # Both know the finished rows, and both refuse another config.
  assert [code for code, _, _ in both()] == [0, 0]
  assert len((tmp_path / 'calls').read_text().split()) == 6
  refused = both('--config.decoding.temperature=1')
  for code, _, errors in refused:
    assert code == 1
    assert 'temperature is 0.5 there and 1.0 here' in errors


def test_programs_are_kept_where_experiments_keep_theirs(monkeypatch, tmp_path):
  monkeypatch.setenv('EFFICIENCY_JAX_CACHE', str(tmp_path))
  before = jax.config.jax_compilation_cache_dir
  try:
    launch.keep_programs()
    kept = jax.config.jax_compilation_cache_dir
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  assert kept == str(tmp_path / 'compiled')
  assert (tmp_path / 'compiled').is_dir()
