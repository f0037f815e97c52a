"""The folder of a run: what is written, refused, mended and read back."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from experiments import display
from experiments import workdir as workdirs

pytestmark = pytest.mark.short

CONFIG = ml_collections.ConfigDict({'seed': 1, 'model': {'width': 64}})


def _open(path, config=CONFIG, experiment='squares'):
  command = ('python', '-m', f'experiments.{experiment}', '--config=a b.py')
  return workdirs.Workdir(
    path, experiment=experiment, config=config, command=command
  )


def test_results_hold_what_was_run_and_where(tmp_path):
  _open(tmp_path / 'deep' / 'w').write_results([{'method': 'a', 'x': 1.5}])
  results = json.loads((tmp_path / 'deep' / 'w' / 'results.json').read_text())
  assert list(results) == ['experiment', 'config', 'environment', 'rows']
  assert results['experiment'] == 'squares'
  assert results['config'] == {'seed': 1, 'model': {'width': 64}}
  assert results['rows'] == [{'method': 'a', 'x': 1.5}]
  assert list(results['environment']) == [
    'python',
    'jax',
    'flax',
    'backend',
    'device',
    'cores',
    'peak_megabytes',
    'git',
    'date',
  ]
  assert results['environment']['backend'] == 'cpu'
  assert results['environment']['cores'] >= 1
  # No process is so small that it imports jax in less.
  assert results['environment']['peak_megabytes'] > 50


def test_results_are_strict_json(tmp_path):
  workdir = _open(tmp_path)
  workdir.write_results([{'a': float('nan'), 'b': np.float32('inf'), 'c': [1]}])

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  text = (tmp_path / 'results.json').read_text()
  rows = json.loads(text, parse_constant=refuse)['rows']
  assert rows == [{'a': None, 'b': None, 'c': [1]}]


@dataclasses.dataclass
class _Point:
  x: int
  y: tuple[float, ...]


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    (_Point(1, (2.0, float('-inf'))), {'x': 1, 'y': [2.0, None]}),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (jnp.float32(0.5), 0.5),
    (jnp.arange(3), [0, 1, 2]),
    (jnp.bfloat16(1.5), 1.5),
    ({'b', 'a'}, ['a', 'b']),
    (pathlib.Path('x'), 'x'),
    ({1: None}, {'1': None}),
  ],
)
def test_plain_values(value, expected):
  got = workdirs.plain(value)
  assert got == expected
  assert type(got) is type(expected)


def test_plain_refuses_what_json_cannot_hold():
  with pytest.raises(TypeError, match='has no form in JSON'):
    workdirs.plain({'f': lambda: None})


def test_a_finished_row_is_read_back_and_not_made_again(tmp_path):
  row = {'method': 'a', 'seconds': 0.1 + 0.2, 'missing': float('nan')}
  made = _open(tmp_path).row('a', lambda: row)
  again = _open(tmp_path)
  assert again.finished('a')
  assert not again.finished('b')
  assert again.row('a', pytest.fail) == made
  assert made == {'method': 'a', 'seconds': 0.1 + 0.2, 'missing': None}


def test_a_row_that_fails_is_not_finished(tmp_path):
  with pytest.raises(ZeroDivisionError):
    _open(tmp_path).row('a', lambda: {'x': 1 / 0})
  assert not _open(tmp_path).finished('a')


@pytest.mark.parametrize('torn', ['{"key": "b"', '{"key": "\u00e9'])
def test_a_torn_last_line_is_cut_off(tmp_path, torn):
  _open(tmp_path).row('a', lambda: {'x': 1})
  path = tmp_path / 'rows.jsonl'
  whole = path.read_bytes()
  path.write_bytes(whole + torn.encode()[:-1])
  again = _open(tmp_path)
  assert path.read_bytes() == whole
  again.row('b', lambda: {'x': 2})
  assert len(path.read_text().splitlines()) == 2


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path):
  _open(tmp_path)
  (tmp_path / 'rows.jsonl').write_text('{"key"\n')
  with pytest.raises(ValueError, match='rows.jsonl has a line that is not'):
    _open(tmp_path)


def test_lines_may_hold_any_text(tmp_path):
  text = 'a\nb\u2028c \udc80 \u00e9'
  _open(tmp_path).row('a', lambda: {'text': text})
  assert _open(tmp_path).row('a', pytest.fail) == {'text': text}


@pytest.mark.parametrize(
  ('config', 'difference'),
  [
    ({'seed': 2, 'model': {'width': 64}}, 'config.seed is 1 there and 2 here'),
    ({'seed': 1, 'model': {}}, 'config.model.width is only there'),
    (
      {'seed': 1, 'model': {'width': 64}, 'x': 0},
      'config.x is new here',
    ),
  ],
)
def test_another_config_is_refused_and_nothing_changes(
  tmp_path, config, difference
):
  _open(tmp_path).write_results([])
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}
  with pytest.raises(ValueError, match=f'another config: {difference}'):
    _open(tmp_path, ml_collections.ConfigDict(config))
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_run_without_a_result_binds_nobody(tmp_path):
  _open(tmp_path)
  _open(tmp_path, ml_collections.ConfigDict({'seed': 9})).write_results([])
  with pytest.raises(ValueError, match='another config'):
    _open(tmp_path)


def test_another_experiment_is_refused(tmp_path):
  _open(tmp_path).log({'step': 0})
  with pytest.raises(ValueError, match='experiment is "squares" there'):
    _open(tmp_path, experiment='cubes')


def test_a_folder_of_other_things_is_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(ValueError, match='it is not the folder of a run'):
    _open(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
  path = tmp_path / 'file'
  path.write_text('')
  with pytest.raises(ValueError, match=f'--workdir={path}: File exists'):
    _open(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
  workdir = _open(tmp_path)
  workdir.write_results([{'x': 1}])
  before = (tmp_path / 'results.json').read_bytes()
  with pytest.raises(TypeError, match='has no form in JSON'):
    workdir.write_results([{'x': object()}])
  assert (tmp_path / 'results.json').read_bytes() == before
  assert not list(tmp_path.glob('.*'))


def test_the_report_says_how_it_was_made(tmp_path):
  workdir = _open(tmp_path)
  workdir.write_report(display.table([{'method': 'a', 'x': 1}]).markdown())
  text = (tmp_path / 'report.md').read_text()
  assert text.startswith('# squares\n\n| method | x |\n')
  assert "python -m experiments.squares '--config=a b.py'\n" in text
  assert '- backend: cpu\n' in text


def test_a_figure_is_a_png(tmp_path):
  figure, axes = display.figure()
  axes.plot([1, 2])
  path = _open(tmp_path).save_figure(figure, 'line')
  assert path == tmp_path / 'line.png'
  assert path.read_bytes().startswith(b'\x89PNG')
