"""The kernel benchmark on tiny shapes; its numbers mean nothing here."""

import json
import pathlib

import pytest

from experiments import benchmark_kernels

CONFIG = pathlib.Path(__file__).parents[2] / 'configs/benchmark_kernels_cpu.py'


def _run(workdir, *flags):
  benchmark_kernels.main(
    [
      'benchmark_kernels',
      f'--config={CONFIG}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


def test_rows_table_and_figure(tmp_path):
  _run(tmp_path / 'run')
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  assert len(rows) == 2 * (2 + 1 + 1)
  for row in rows:
    assert row['milliseconds'] > 0
    assert row['peak_bytes'] > 0
    assert 0 < row['roofline_fraction'] < 2
    first = row['implementation'] == row['baseline']
    assert (row['speedup'] == 1) or not first
  errors = [row['max_error'] for row in rows if row['max_error'] is not None]
  assert len(errors) == 6
  assert max(errors) < 1e-4
  assert {row['sequence_length'] for row in rows} == {64, 128, 512}
  assert (tmp_path / 'run/attention.png').stat().st_size > 10_000
  assert 'of roofline' in (tmp_path / 'run/report.md').read_text()


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.forward=(0,)', '--config.forward must hold sizes >= 1, got 0.'),
    ('--config.sparse_density=0.0', 'sparse_density must be in (0, 1]'),
    ('--config.repeats=0', '--config.repeats must be >= 1'),
    ('--config.kv_heads=2', '--config.kv_heads=2 must divide'),
  ],
)
def test_a_wrong_field_ends_in_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit) as ended:
    _run(tmp_path / 'run', flag)
  assert ended.value.code == 1
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1
  assert message in error[0]
