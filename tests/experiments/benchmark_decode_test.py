"""The whole benchmark on random weights; its numbers mean nothing here."""

import json
import pathlib

import pytest

from efficiency_jax.io import untrained
from experiments import benchmark_cases
from experiments import benchmark_decode
from experiments import launch
from experiments import peers

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'benchmark_decode.py'


def _run(workdir, *flags):
  benchmark_decode.main(
    [
      'benchmark_decode',
      f'--config={CONFIG}:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """The folder of a run without one of the peers."""
  folder = tmp_path_factory.mktemp('benchmark') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(peers, 'missing', lambda name: f'{name} not installed')
    _run(folder, '--config.peers=("transformers",)')
  return folder


def _rows(folder):
  return json.loads((folder / 'results.json').read_text())['rows']


@pytest.mark.slow
def test_every_candidate_has_a_row(made):
  rows = {(row['method'], row.get('batch')): row for row in _rows(made)}
  assert rows['memory read', None]['bytes_per_second'] > 0
  for batch in (1, 2):
    plain = rows['plain', batch]
    drafted = rows['n-gram, adaptive', batch]
    assert plain['baseline'] == drafted['baseline'] == 'plain'
    assert plain['speedup'] == 1
    assert plain['tokens_per_step'] == batch
    assert plain['texts_equal'] == drafted['texts_equal'] == 2
    assert drafted['tokens_per_second'] > 0
    assert drafted['roofline_fraction'] == pytest.approx(
      drafted['tokens_per_second'] / drafted['roofline_tokens_per_second']
    )
    assert rows['round of 0 drafts', batch]['relative_cost'] == 1
  assert rows['transformers', 1]['note'] == 'transformers not installed'
  assert ('transformers', 2) not in rows


@pytest.mark.slow
def test_the_compiled_loop_copies_no_cache_and_converts_no_weight(made):
  read = [row for row in _rows(made) if 'temporary_bytes' in row]
  assert len(read) == 4
  assert [row['cache_copies_in_loop'] for row in read] == [0] * 4
  assert [row['weight_converts_in_loop'] for row in read] == [0] * 4


@pytest.mark.slow
def test_the_report_shows_all_of_it(made):
  report = (made / 'report.md').read_text()
  for phrase in (
    'tokens_per_second.png',
    'transformers not installed',
    'cache copies in loop',
    'draft length',
  ):
    assert phrase in report
  image = (made / 'tokens_per_second.png').read_bytes()
  assert image.startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_finished_run_measures_nothing_again(made, monkeypatch):
  def measured(*_, **__):
    raise AssertionError('nothing is left to measure')

  for module, name in (
    (benchmark_cases.candidates, 'take_turns'),
    (benchmark_cases.engine_lib, 'measured_costs'),
    (benchmark_cases.engine_lib, 'compiled'),
  ):
    monkeypatch.setattr(module, name, measured)
  monkeypatch.setattr(peers, 'missing', lambda name: 'still missing')
  before = _rows(made)
  _run(made, '--config.peers=("transformers",)')
  after = _rows(made)
  assert [row for row in after if 'note' not in row] == [
    row for row in before if 'note' not in row
  ]
  # A peer may have been installed since.
  assert [r['note'] for r in after if 'note' in r] == ['still missing']


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.peers=("vllm",)', "peer 'vllm' is unknown; there are transf"),
    ('--config.batch=1', '--config.batch must be >= 2, got 1.'),
    ('--config.batch=9', 'leaves 2 of the 9 prompts that are needed'),
    ('--config.max_prompt_tokens=3', 'leaves 0 of the 2 prompts'),
  ],
)
def test_a_wrong_field_ends_in_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit) as ended:
    _run(tmp_path / 'run', flag)
  assert ended.value.code == 1
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1
  assert message in error[0]


def test_llama_cpp_wants_a_gguf_file():
  config = launch.load_config(f'{CONFIG}:tiny')
  config.model = 'a/folder'
  with pytest.raises(ValueError, match='reads GGUF files only'):
    benchmark_cases.file_of(config)


def test_prompts_come_from_all_sets_in_turns(monkeypatch):
  sets = {
    'one': [('', [1]), ('', [2]), ('', [3])],
    'two': [('', [4]), ('', [5])],
  }
  monkeypatch.setattr(
    benchmark_decode.inputs, 'load_prompts', lambda lm, config, name: sets[name]
  )
  config = launch.load_config(f'{CONFIG}:tiny')
  config.prompts, config.batch = ('one', 'two'), 3
  lm = untrained.language_model()
  assert benchmark_decode.load_prompts(lm, config) == [[1], [4], [2]]
