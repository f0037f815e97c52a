"""Small decoders of one bit and three values: rows, and mistakes."""

import json
import pathlib

import pytest

from experiments import train_bitnet

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def _run(workdir, *flags):
  train_bitnet.main(
    [
      'train_bitnet',
      f'--config={CONFIGS / "train_bitnet.py"}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


@pytest.mark.slow
def test_few_values_learn_and_rounding_afterwards_does_not(tmp_path):
  _run(tmp_path / 'run', '--config.epochs=10')
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  bits = {row['method']: row['bits_per_byte'] for row in rows}
  size = {row['method']: row['bytes'] for row in rows}
  # A byte of 257 takes 8 bits before training.
  assert bits['float32'] < 3
  assert bits['binary'] < 4
  assert bits['ternary'] < 4
  assert bits['ternary, float rows'] < 4
  assert bits['rounded to ternary'] > bits['ternary']
  assert (
    size['binary']
    < size['ternary']
    == size['rounded to ternary']
    < size['float32'] / 2
  )


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.width=100', '--config.width must be a multiple of 32, got 100'),
    ('--config.measured=100000', 'ask for fewer tokens'),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit):
    _run(tmp_path / 'run', '--config.tokens=100', flag)
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('error: ')
  assert message in error
