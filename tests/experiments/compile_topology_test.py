"""The experiment on made-up programs, and on two real small ones."""

import json
import pathlib

import jax
import pytest

from efficiency_jax.distributed import topology
from experiments import compile_topology

CONFIG = pathlib.Path(__file__).parents[2] / 'configs/compile_topology.py'


def _run(workdir, *flags):
  compile_topology.main(
    [
      'compile_topology',
      f'--config={CONFIG}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )
  return json.loads((workdir / 'results.json').read_text())['rows']


def test_rows_table_and_figure(tmp_path, monkeypatch):
  fitting = topology.Program(
    fits=True,
    hbm_bytes=2**33,
    flops=197e12,
    collectives={'all-gather': topology.Collective(2, 10e9)},
  )
  made = [fitting, topology.Program(fits=False, hbm_bytes=2**36)]
  seen = []

  def compile_step(step, mesh, state, frozen, batch):
    jax.eval_shape(step, state, frozen, batch)
    seen.append(dict(mesh.shape))
    return made[len(seen) - 1]

  monkeypatch.setattr(topology, 'devices', lambda name: jax.devices()[:4])
  monkeypatch.setattr(topology, 'compile_step', compile_step)
  fits, does_not = _run(tmp_path / 'run')
  assert seen == [
    {'data': 1, 'fsdp': 4, 'tensor': 1},
    {'data': 1, 'fsdp': 2, 'tensor': 2},
  ]
  assert fits['method'] == 'tiny, v5e:2x2, 1 x 4 x 1, 1'
  assert fits['bound_milliseconds'] == pytest.approx(1000)
  assert fits['bound_tokens_per_second'] == pytest.approx(4 * 128)
  assert not does_not['fits']
  assert does_not['hbm_fraction'] == 2
  report = (tmp_path / 'run/report.md').read_text()
  assert '2 all-gather' in report
  assert (tmp_path / 'run/memory.png').stat().st_size > 10_000
  # A second run compiles nothing.
  assert _run(tmp_path / 'run') == [fits, does_not]
  assert len(seen) == 2


@pytest.mark.parametrize(
  ('case', 'message'),
  [
    (('large', 'v5e:2x2', 1, 4, 1, 1, 'none', 'x'), "no 'large'"),
    (('tiny', 'v9:2x2', 1, 4, 1, 1, 'none', 'x'), "'v9:2x2' must be of v5e"),
    (('tiny', 'v5e:2x2', 3, 1, 1, 1, 'none', 'reference'), 'is for 3 devices'),
    (('tiny', 'v5e:2x2', 1, 4, 1, 1, 'some', 'reference'), 'remat must be one'),
  ],
)
def test_a_wrong_case_ends_in_one_line(
  tmp_path, monkeypatch, capsys, case, message
):
  if case[1] != 'v9:2x2':
    monkeypatch.setattr(topology, 'devices', lambda name: jax.devices()[:4])
  with pytest.raises(SystemExit) as ended:
    _run(tmp_path / 'run', f'--config.cases=({case},)')
  assert ended.value.code == 1
  # The progress bar is above it.
  assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.aot
def test_small_steps_compile_and_every_matrix_travels_once(tmp_path):
  split, spanning = _run(tmp_path / 'run')
  assert split['fits']
  assert spanning['fits']
  assert split['copied_axes'] == spanning['copied_axes'] == 0
  matrices = split['parameters'] - 5 * 128  # all but the norms
  # Weights are put together, and gradients taken apart, in bfloat16.
  for kind in ('all_gather', 'reduce_scatter'):
    assert split[f'{kind}_sent_bytes'] == 2 * matrices * 3 / 4
  # Parameters and two moments in float32, a quarter on each chip.
  held = 12 * matrices / 4
  assert held < 1e9 * split['argument_gigabytes'] < 1.1 * held
