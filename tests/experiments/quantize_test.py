"""The ladder on random weights: rows, report, and mistakes."""

import json
import pathlib

import numpy as np
import pytest

from configs import quantize_smollm2
from configs import quantize_smollm2_quick
from efficiency_jax.quantization import recipes
from experiments import quantize

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def _run(workdir, *flags):
  quantize.main(
    [
      'quantize',
      f'--config={CONFIGS / "quantize_smollm2.py"}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


@pytest.mark.slow
def test_a_row_says_size_quality_and_speed(tmp_path):
  _run(tmp_path / 'run')
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  assert [row['method'] for row in rows] == ['float32', 'W8A8', 'GPTQ int4']
  whole, w8a8, gptq = rows
  assert whole['bits_per_weight'] == 32
  assert 8 < w8a8['bits_per_weight'] < 9
  assert 4.5 < gptq['bits_per_weight'] < 5
  assert whole['kl'] == 0
  assert whole['perplexity_ratio'] == 1
  for row in rows:
    assert row['baseline'] == 'float32'
    assert row['tokens'] == 128
    assert row['perplexity'] > 1
    # There is one text, so its perplexity is that of all.
    np.testing.assert_allclose(row['perplexity_inline'], row['perplexity'])
    for field in (
      'bytes',
      'perplexity_ci',
      'prefill_tokens_per_second',
      'decode_tokens_per_second',
    ):
      assert row[field] > 0
  report = (tmp_path / 'run/report.md').read_text()
  assert '| W8A8 |' in report
  assert 'perplexity_by_bytes.png' in report
  assert (tmp_path / 'run/perplexity_by_bytes.png').stat().st_size > 10_000


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.methods=("int9",)', "there is no recipe 'int9'; there are fp16"),
    ('--config.tokens=0', '--config.tokens must be >= 1, got 0'),
    ('--config.tokens=100000', 'ask for fewer tokens'),
    (
      '--config.calibration.tokens=90000',
      '--config.calibration.tokens=90000 are more than',
    ),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, message):
  methods = '--config.methods=("GPTQ int4",)'
  with pytest.raises(SystemExit):
    _run(tmp_path / 'run', *([methods] * ('methods' not in flag)), flag)
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('error: ')
  assert message in error


def test_configs_name_recipes_that_exist():
  for config in (
    quantize_smollm2.get_config(),
    quantize_smollm2_quick.get_config(),
  ):
    for method in config.methods:
      recipes.named(method)
  assert not quantize_smollm2.get_config('every').methods
  with pytest.raises(ValueError, match="'quick', 'every', 'tiny'"):
    quantize_smollm2.get_config('small')
