"""Timings of whole networks: rows, and that the programs compute."""

import json
import pathlib

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark_binary
from experiments import binary_programs

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


def _run(workdir, *flags):
  benchmark_binary.main(
    [
      'benchmark_binary',
      f'--config={CONFIGS / "benchmark_binary.py"}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


def test_a_row_a_network_batch_and_kind(tmp_path):
  _run(tmp_path / 'run')
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  assert [(row['method'], row['batch']) for row in rows] == [
    (method, batch)
    for batch in (1, 3)
    for method in ('float32', 'int8', 'bits')
  ]
  for row in rows:
    assert row['milliseconds'] > 0
  real, int8, bits = rows[:3]
  assert real['speed_up'] == 1
  assert bits['bytes'] < int8['bytes'] < real['bytes'] / 2


def test_int8_computes_what_floats_do():
  programs = binary_programs.made((4, 4, 1), 64, 2)
  pixels = np.random.default_rng(0).integers(0, 256, (32, 4, 4, 1), np.uint8)
  real, int8, bits = (run(jnp.asarray(pixels)) for run, _ in programs.values())
  chex.assert_shape((real, int8, bits), (32, 10))
  assert np.corrcoef(np.ravel(real), np.ravel(int8))[0, 1] > 0.999


def test_widths_must_be_positive(tmp_path, capsys):
  with pytest.raises(SystemExit):
    _run(tmp_path / 'run', '--config.width=(64, 0)')
  error = capsys.readouterr().err.splitlines()[-1]
  assert error == 'error: --config.width must be >= 1, got 0.'
