"""The whole benchmark on random weights; its numbers mean nothing here."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import drafts
from efficiency_jax.decoding import draft_model
from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from experiments import benchmark_cases
from experiments import benchmark_decode
from experiments import candidates
from experiments import launch
from experiments import peers
from experiments import workdir as workdirs

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
CONFIG = CONFIGS / 'benchmark_decode.py'


def _run(workdir, *flags, config=CONFIG):
  benchmark_decode.main(
    [
      'benchmark_decode',
      f'--config={config}:tiny',
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
    drafted = rows['n-gram', batch]
    assert plain['baseline'] == drafted['baseline'] == 'plain'
    assert plain['speedup'] == plain['own_speedup'] == 1
    assert plain['tokens_per_step'] == batch
    assert plain['texts_equal'] == drafted['texts_equal'] == 2
    assert drafted['tokens_per_second'] > 0
    assert drafted['roofline_fraction'] == pytest.approx(
      drafted['tokens_per_second'] / drafted['roofline_tokens_per_second']
    )
    assert drafted['own_speedup'] == drafted['speedup']
    assert rows['round of 0 drafts, plain', batch]['relative_cost'] == 1
    assert rows['round of 15 drafts, n-gram', batch]['relative_cost'] > 0
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


@pytest.mark.slow
def test_drafts_are_measured_one_prompt_at_a_time(tmp_path):
  workdir = tmp_path / 'run'
  _run(workdir, config=CONFIGS / 'benchmark_drafts.py')
  rows = {row['method']: row for row in _rows(workdir)}
  assert {row.get('batch') for row in rows.values()} == {1, None}
  drafted = rows['draft model, 3']
  assert drafted['texts_equal'] == drafted['texts'] == 2
  # Beside the target's weights, those of the draft are its own.
  assert drafted['weight_bytes'] > rows['plain']['weight_bytes']
  assert rows['round of 3 drafts, draft model, 3']['relative_cost'] > 0


def _sample(seconds, text):
  return candidates.Sample(
    tokens=[text],
    prefill_seconds=1.0,
    decode_seconds=seconds,
    decoded=len(text),
    steps=2,
  )


def test_a_tool_is_compared_with_its_own_plain_decoding(tmp_path, monkeypatch):
  config = launch.load_config(f'{CONFIG}:tiny')
  config.peers = (peers.TRANSFORMERS, peers.ASSISTED)
  made = {
    'plain': [_sample(1.0, [1, 2])],
    peers.TRANSFORMERS: [_sample(4.0, [1, 3])],
    peers.ASSISTED: [_sample(2.0, [1, 3])],
  }
  monkeypatch.setattr(peers, 'missing', lambda name: None)
  monkeypatch.setattr(benchmark_cases, 'load_peers', lambda *_: {})
  monkeypatch.setattr(candidates, 'take_turns', lambda *_, **__: made)
  workdir = workdirs.Workdir(
    tmp_path / 'run', experiment='x', config={}, command=['x']
  )
  monkeypatch.setattr(benchmark_cases, 'read_program', lambda *_: {})
  _, plain, assisted = benchmark_cases.speed_rows(
    config, workdir, untrained.language_model(), {'plain': None}, [[[1]]], []
  )
  assert (plain['speedup'], plain['own_speedup']) == (0.25, 1)
  assert (assisted['speedup'], assisted['own_speedup']) == (0.5, 2)
  assert (assisted['texts_equal'], assisted['own_texts_equal']) == (0, 1)


@pytest.mark.parametrize('trained', [False, True])
def test_the_assistant_of_others_is_our_draft_model(tmp_path, trained):
  lm = untrained.language_model()
  config = launch.load_config(f'{CONFIG}:tiny')
  config.methods = ('draft model, 3',)
  if trained:
    form = draft_model.Form(target=lm.config, layers=(1,), ffn_width=20)
    draft = draft_model.TrainedDraft(
      form=form, params=draft_model.init(form, lm.params)
    )
    path = tmp_path / 'draft.safetensors'
    drafts.save(path, draft, lm=lm, card={})
    config.trained.draft_model = str(path)
    # Others get what the integers stand for; rows of W8A8 are rounded too.
    config.trained.weights = 'int8'
  engine = benchmark_decode.load_engines(lm, config)['draft model, 3']
  small = benchmark_cases.assistant(lm, config)
  assert small.config.num_layers == 1
  tokens = jnp.array([[1, 2, 3]])
  ours, _ = engine.decoder.drafter.apply(engine.weights.draft, tokens)
  theirs, _ = transformer.apply_fn(small.config)(small.params, tokens)
  np.testing.assert_allclose(theirs.logits, ours.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.peers=("vllm",)', "peer 'vllm' is unknown; there are transf"),
    ('--config.peers=("transformers, assistant",)', 'name that too.'),
    ('--config.batch=0', '--config.batch must be >= 1, got 0.'),
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
