"""An encoder of random weights in fewer bits: rows, figures, and mistakes."""

import json
import pathlib

import pytest

from experiments import quantize_encoder

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def _run(workdir, *flags):
  quantize_encoder.main(
    [
      'quantize_encoder',
      f'--config={CONFIGS / "quantize_encoder.py"}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


@pytest.mark.slow
def test_every_part_leaves_its_rows(tmp_path):
  _run(tmp_path / 'run')
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  by_name = {row['method']: row for row in rows}
  assert list(by_name) == [
    'float32',
    'W8A8',
    'GOBO 3 bits',
    'GOBO, 3 bits',
    'k-means, 3 bits',
    'fine-tuned',
    'int3, rounded',
    'int3, trained',
    *(
      f'{key} 3 bits, {when}'
      for key in ('uniform', 'by Hessian', 'against Hessian')
      for when in ('rounded', 'trained')
    ),
  ]
  assert by_name['float32']['cosine'] == pytest.approx(1)
  assert by_name['GOBO 3 bits']['cosine'] < by_name['W8A8']['cosine'] < 1
  assert by_name['GOBO, 3 bits']['most'] < by_name['k-means, 3 bits']['most']
  # Training moved the model, and rounding the trained one moved it again.
  losses = [by_name[name]['loss'] for name in ('float32', 'fine-tuned')]
  assert losses[1] < losses[0]
  assert by_name['int3, rounded']['loss'] != losses[1]
  for when in ('rounded', 'trained'):
    alike, shared = (
      by_name[f'{key} 3 bits, {when}'] for key in ('uniform', 'by Hessian')
    )
    assert 2.5 < shared['bits'] <= alike['bits']
    assert shared['loss'] != alike['loss']
  assert by_name['fine-tuned']['bits'] == 32
  report = (tmp_path / 'run/report.md').read_text()
  for name in ('accuracy', 'training', 'hessian'):
    assert f'{name}.png' in report
    assert (tmp_path / 'run' / f'{name}.png').stat().st_size > 5_000
  before = (tmp_path / 'run/rows.jsonl').read_text()
  _run(tmp_path / 'run')  # reads everything back
  assert (tmp_path / 'run/rows.jsonl').read_text() == before


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.methods=("int9",)', "there is no recipe 'int9'"),
    ('--config.methods=("GPTQ int4",)', "'GPTQ int4' is calibrated on text"),
    ('--config.trained_methods=("AWQ int4",)', "'AWQ int4' is calibrated"),
    ('--config.hessian.mean=2.5', 'must be a whole number of bits from 2 to 4'),
    ('--config.sentences=0', '--config.sentences must be >= 1, got 0'),
    ('--config.seeds=-1', '--config.seeds must be >= 0, got -1'),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit):
    _run(tmp_path / 'run', flag)
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('error: ')
  assert message in error
  assert not list((tmp_path / 'run').glob('*.png'))
