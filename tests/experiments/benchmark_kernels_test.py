"""The kernel benchmark on tiny shapes; its numbers mean nothing here."""

import collections
import importlib.util
import json
import pathlib

import pytest

from configs import benchmark_kernels_cpu
from efficiency_jax.evaluation import speed
from experiments import benchmark_kernels
from experiments import figures
from experiments import kernel_baselines as baselines
from experiments import kernel_cases

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
  peers = importlib.util.find_spec('torch') is not None
  per_operation = collections.Counter(row['operation'] for row in rows)
  assert per_operation == {
    'attention forward': 2 * (3 + peers),
    'attention forward and backward': 3 + peers,
    'attention forward, not causal': 2,
    'decode attention, 1 queries, batch 1': 3,
    'product of few rows': 7,
    'int8 product': 2,
    'product with quantized weights': 4,
    'binary product': 2,
  }
  for row in rows:
    assert row['milliseconds'] > 0
    assert row['clock'] == 'host'
    assert row['implementation'] == 'torch' or row['peak_bytes'] > 0
    assert row['roofline_fraction'] > 0
    first = row['implementation'] == row['baseline']
    assert (row['speedup'] == 1) or not first
  for row in rows:
    narrow = any(n in row['method'] for n in ('int8', 'int4', 'nf4'))
    if row['operation'] == 'attention forward, not causal':
      assert row['max_error'] is None  # two different things are computed
    else:
      assert row['max_error'] < (0.2 if narrow else 1e-5)
  assert (tmp_path / 'run/attention.png').stat().st_size > 10_000
  assert 'of roofline' in (tmp_path / 'run/report.md').read_text()


@pytest.mark.parametrize('reason', [None, 'no compiler is installed'])
def test_a_kernel_that_cannot_run_here_is_left_out(monkeypatch, reason):
  monkeypatch.setattr(baselines.llvm_cpu, 'missing', lambda: reason)
  made = list(kernel_cases.cases(benchmark_kernels_cpu.get_config()))
  names = {name for case in made for name in case.candidates}
  assert any('llvm_cpu' in name for name in names) == (reason is None)
  assert all(case.candidates for case in made)


def test_only_what_grows_has_panels():
  row = lambda operation, n: {
    'operation': operation,
    'implementation': 'naive',
    'sequence_length': n,
    'milliseconds': 1.0 * n,
    'peak_megabytes': 1.0,
  }
  grown = [row('forward', 1), row('forward', 2)]
  drawn = figures.kernels([*grown, row('decode', 1)])
  assert [axis.get_title() for axis in drawn.axes] == ['forward', '']
  # Nothing grows: better one point than nothing.
  assert len(figures.kernels([row('decode', 1)]).axes) == 2


def test_the_clock_of_a_device_is_asked_first():
  told = speed.Timing(times=(2.0,), compile_seconds=0.0)

  def silent(repeats):
    raise speed.NoClock

  def broken(repeats):
    raise RuntimeError('out of memory')

  call = lambda: None
  ready = {
    'told': baselines.Ready(call, on_device=lambda repeats: told),
    'silent': baselines.Ready(call, on_device=silent),
    'another library': baselines.Ready(call),
  }
  times, clocks = kernel_cases.timings(ready, repeats=3)
  assert times['told'] is told
  assert list(map(clocks.get, ready)) == ['device', 'host', 'host']
  assert len(times['silent'].times) == len(times['another library'].times) == 3
  # What fails is not timed by another clock.
  with pytest.raises(RuntimeError, match='out of memory'):
    kernel_cases.timings({'x': baselines.Ready(call, on_device=broken)}, 3)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.forward=(0,)', '--config.forward must hold sizes >= 1, got 0.'),
    ('--config.sparse_density=0.0', 'sparse_density must be in (0, 1]'),
    ('--config.repeats=0', '--config.repeats must be >= 1'),
    ('--config.kv_heads=2', '--config.kv_heads=2 must divide'),
    ('--config.int8=((0, 1, 1),)', '--config.int8 must hold sizes (m, k, n)'),
    ("--config.attention=('flash',)", "--config.attention has no 'flash'"),
    ("--config.decode=('cudnn',)", "--config.decode has no 'cudnn'"),
    ('--config.machine_size=0', '--config.machine_size must hold sizes >= 1'),
  ],
)
def test_a_wrong_field_ends_in_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit) as ended:
    _run(tmp_path / 'run', flag)
  assert ended.value.code == 1
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1
  assert message in error[0]
