"""Outliers of random weights: rows, figures, and mistakes."""

import json
import pathlib

import pytest

from experiments import outliers

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def _run(workdir, *flags):
  outliers.main(
    [
      'outliers',
      f'--config={CONFIGS / "outliers_smollm2.py"}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


@pytest.mark.slow
def test_kinds_thresholds_and_figures(tmp_path):
  _run(tmp_path / 'run')
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  rows = {row['method']: row for row in rows}
  assert rows['ffn/down']['columns'] == 128
  assert 0 < rows['attention/qkv']['share_of_numbers'] < 1
  assert rows['threshold 0']['share_of_columns'] == 1
  assert rows['threshold inf']['share_of_columns'] == 0
  # What is kept in floats is not rounded.
  assert rows['threshold 0']['kl'] < rows['threshold inf']['kl']
  report = (tmp_path / 'run/report.md').read_text()
  for name in ('outlier_map.png', 'errors.png'):
    assert name in report
    assert (tmp_path / 'run' / name).stat().st_size > 10_000


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.methods=("int9",)', "there is no recipe 'int9'"),
    ('--config.methods=("GPTQ int4",)', "'GPTQ int4' needs calibration text"),
    ('--config.methods=()', 'must name at least one recipe'),
    ('--config.threshold=0.0', '--config.threshold must be above 0, got 0.0'),
    ('--config.layer=7', 'no layers_7/ffn/gate_up/kernel'),
    ('--config.tokens=100000', 'ask for fewer tokens'),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit):
    _run(tmp_path / 'run', flag)
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('error: ')
  assert message in error
