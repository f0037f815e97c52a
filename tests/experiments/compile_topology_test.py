"""The experiment on made-up programs, and on two real small ones."""

import json
import pathlib

import jax
import pytest

from efficiency_jax.distributed import topology
from experiments import compile_topology
from experiments import topology_figure

CONFIG = pathlib.Path(__file__).parents[2] / 'configs/compile_topology.py'


def _tables(report):
  """The tables of a report, each a list of rows by heading."""
  tables, before = [], ''
  for line in report.read_text().splitlines():
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    if not line.startswith('|'):
      pass
    elif not before.startswith('|'):
      heading = cells
      tables.append([])
    elif not cells[0].startswith('---'):
      tables[-1].append(dict(zip(heading, cells, strict=True)))
    before = line
  return tables


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
  memory, time = _tables(tmp_path / 'run/report.md')
  assert [line['fits'] for line in memory] == ['yes', 'no']
  assert [line['in all GB'] for line in memory] == ['8.59', '68.72']
  assert [line['step >= ms'] for line in time] == ['1,000']
  assert (tmp_path / 'run/memory.png').stat().st_size > 10_000
  # A second run compiles nothing.
  assert _run(tmp_path / 'run') == [fits, does_not]
  assert len(seen) == 2


RIGHT = ('tiny', 'v5e:2x2', 1, 4, 1, 1, 'none', 'reference')


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({0: 'large'}, "no 'large'"),
    ({1: 'v9:2x2'}, "'v9:2x2' must be a grid of v5e or v6e"),
    ({2: 3, 3: 1}, 'data=3, fsdp=1, tensor=1 is for 3 devices'),
    ({3: 8}, 'is for 8 devices, and there are 4'),
    ({3: 'all'}, 'is (model: str, topology: str, data: int,'),
    ({3: 2, 4: 2, 7: 'mosaic_tpu'}, 'take the attention reference'),
    ({5: 0}, 'rows a chip must be >= 1, got 0'),
    ({6: 'some'}, 'remat must be one of'),
  ],
)
def test_a_wrong_case_ends_in_one_line_before_any_is_compiled(
  tmp_path, monkeypatch, capsys, changed, message
):
  def devices(name):
    topology.grid(name)
    return jax.devices()[:4]

  monkeypatch.setattr(topology, 'devices', devices)
  monkeypatch.setattr(topology, 'compile_step', None)
  wrong = tuple(changed.get(n, field) for n, field in enumerate(RIGHT))
  with pytest.raises(SystemExit) as ended:
    _run(tmp_path / 'run', f'--config.cases={(RIGHT, wrong)}')
  assert ended.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('cases=()', 'cases is empty'),
    ('cases=5', 'got 5'),
    ("cases=(('tiny', 'v5e:2x2'),)", "got ('tiny', 'v5e:2x2')"),
    ('sequence_length=0', 'must be >= 1, got 0'),
  ],
)
def test_a_wrong_config_ends_in_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit) as ended:
    _run(tmp_path / 'run', f'--config.{flag}')
  assert ended.value.code == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert message in line


@pytest.mark.parametrize('tensor', [1, 2])
def test_the_figure_marks_what_does_not_fit(tensor):
  row = {'model': 'm', 'topology': 'v5e:2x2', 'chips': 4, 'tensor': 1}
  rows = [
    row | {'fits': False, 'hbm_gigabytes': 20},
    row | {'chips': 16, 'fits': True, 'hbm_gigabytes': 8, 'tensor': tensor},
  ]
  (axis,) = topology_figure.memory(rows).axes
  drawn = {
    (line.get_marker(), tuple(line.get_xdata()), tuple(line.get_ydata()))
    for line in axis.lines
    if line.get_marker() in ('o', 'x') and len(line.get_xdata())
  }
  crosses = {('x', (4,), (20,))}
  if tensor == 1:
    assert drawn == crosses | {('o', (4, 16), (20, 8))}
  else:  # another layout is another line
    assert drawn == crosses | {('o', (4,), (20,)), ('o', (16,), (8,))}


@pytest.mark.aot
def test_small_steps_compile_and_agree_with_closed_forms(tmp_path):
  split, spanning = _run(tmp_path / 'run')
  assert split['fits']
  assert spanning['fits']
  assert split['copied_axes'] == spanning['copied_axes'] == 0
  table, down = 512 * 128, 2 * 256 * 128
  matrices = split['parameters'] - 5 * 128  # all but the norms
  # In bfloat16, weights of blocks are put together for the forward and for the
  # backward pass, the table once; gradients are taken apart once.
  assert split['all_gather_sent_bytes'] == 2 * (2 * matrices - table) * 3 / 4
  assert split['reduce_scatter_sent_bytes'] == 2 * matrices * 3 / 4
  # Parameters and two moments in float32, a quarter on each chip; the norms
  # are whole on all. Two int32 count the steps.
  held = 12 * (matrices / 4 + 5 * 128) + 8
  assert 1e9 * split['state_gigabytes'] == pytest.approx(held)
  # The batch, and rows of less than a tile, come on top.
  assert held <= 1e9 * split['argument_gigabytes'] < 1.01 * held
  # FLOPs of a token: 6 a number of the table; 8 of the blocks, whose products
  # run twice forwards, but for 2 of the last one, which nothing needs twice;
  # attention of one tile, 2 products forwards, twice, and 5 backwards. What is
  # not a product comes on top.
  attention = 2 * (2 * 2 + 5) * 2 * 128 * 128
  products = 6 * table + 8 * (matrices - table) - 2 * down + attention
  assert 128 * products < 1e12 * split['teraflops'] < 1.1 * 128 * products
  assert split['model_teraflops'] == pytest.approx(6e-12 * 128 * 393_856)
