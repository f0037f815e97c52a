"""A draft model distilled on answers of a random model, and decoded with."""

import json

import pytest

from efficiency_jax import drafts
from efficiency_jax.decoding import draft_model
from efficiency_jax.io import untrained
from experiments import decode
from experiments import distill_draft


def _start(workdir, answers, *flags):
  distill_draft.main(
    [
      'distill_draft',
      '--config=configs/distill_draft.py:tiny',
      f'--workdir={workdir}',
      f'--config.answers={answers}',
      '--nocompilation_cache',
      *flags,
    ]
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny_answers):
  workdir = tmp_path_factory.mktemp('runs') / 'draft'
  _start(workdir, tiny_answers)
  return workdir


def test_the_draft_is_saved_with_its_trees_and_card(finished):
  path = finished / 'draft.safetensors'
  draft = drafts.load(path, untrained.language_model())
  assert isinstance(draft, draft_model.TrainedDraft)
  assert draft.form.layers == (1,)
  assert draft.form.ffn_width == 96
  assert [len(tree) for tree in draft.trees] == [4, 8]
  assert len(draft.vocabulary) == 128
  card = drafts.card(path)
  assert 'experiments.distill_draft' in card['command']
  assert card['steps'] == '4'


def test_rows_report_and_figure(finished):
  rows = json.loads((finished / 'results.json').read_text())['rows']
  guesses = [row for row in rows if 'alpha' in row]
  assert [row['method'] for row in guesses] == [
    f'drafted token {i}' for i in (1, 2, 3)
  ]
  assert 0 < guesses[0]['alpha'] < 1
  trees = [row for row in rows if 'nodes' in row]
  assert [(row['method'], row['nodes']) for row in trees] == [
    (kind, nodes)
    for nodes in (4, 8)
    for kind in ('chain', 'independent', 'joint')
  ]
  for row in trees:
    assert 1 <= row['expected'] <= 1 + row['height'] <= 4
  assert 'training.png' in (finished / 'report.md').read_text()
  assert (finished / 'training.png').stat().st_size > 5_000


def test_layers_that_are_not_there(tmp_path, tiny_answers, capsys):
  with pytest.raises(SystemExit):
    _start(tmp_path / 'run', tiny_answers, '--config.layers=(0, 2)')
  assert 'layers must name blocks in 0..1' in capsys.readouterr().err


@pytest.mark.slow
def test_decode_takes_it(finished, tmp_path):
  decode.main(
    [
      'decode',
      '--config=configs/decode_tiny.py',
      f'--workdir={tmp_path / "run"}',
      f'--config.trained.draft_model={finished / "draft.safetensors"}',
      "--config.methods=('draft model, 3', 'draft model dynamic, 4')",
      '--config.batches=(1,)',
      '--nocompilation_cache',
    ]
  )
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  assert {row['method']: row['nodes'] for row in rows} == {
    'plain': 1,
    'draft model, 3': 4,
    'draft model dynamic, 4': 5,
  }
  assert all(row['exact'] for row in rows)
