"""A draft trained on answers of a random model, and decoded with."""

import json

import pytest

from efficiency_jax import drafts
from efficiency_jax.decoding import eagle
from efficiency_jax.io import untrained
from experiments import decode
from experiments import train_draft


def _start(workdir, answers, *flags):
  train_draft.main(
    [
      'train_draft',
      '--config=configs/train_draft.py:tiny',
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
  assert isinstance(draft, eagle.TrainedDraft)
  assert [len(tree) for tree in draft.trees] == [4, 8]
  assert len(draft.vocabulary) == 128
  card = drafts.card(path)
  assert 'experiments.train_draft' in card['command']
  assert card['data'].startswith('8 answers of the target')
  assert card['steps'] == '4'


def test_rows_report_and_figure(finished):
  rows = json.loads((finished / 'results.json').read_text())['rows']
  guesses = [row for row in rows if 'alpha' in row]
  assert [row['method'] for row in guesses] == [
    f'drafted token {i}' for i in (1, 2, 3)
  ]
  # A longer right prefix is never more frequent.
  joint = [row['joint'] for row in guesses]
  assert joint == sorted(joint, reverse=True)
  trees = [row for row in rows if 'nodes' in row]
  assert {row['method'] for row in trees} == {'chain', 'independent', 'joint'}
  for row in trees:
    assert 1 <= row['expected'] <= 1 + row['height']
  report = (finished / 'report.md').read_text()
  assert 'training.png' in report
  assert (finished / 'training.png').stat().st_size > 5_000
  log = (finished / 'training.jsonl').read_text().splitlines()
  steps = [json.loads(line) for line in log]
  assert [e['step'] for e in steps if 'gradient_norm' in e] == [1, 2, 3, 4]


def test_training_begins_with_another_draft(finished, tmp_path, tiny_answers):
  path = finished / 'draft.safetensors'
  _start(tmp_path / 'run', tiny_answers, f'--config.start={path}')
  first = (tmp_path / 'run' / 'training.jsonl').read_text().splitlines()[0]
  before = (finished / 'training.jsonl').read_text().splitlines()
  losses = [json.loads(line).get('loss') for line in before]
  assert json.loads(first)['loss'] < losses[0]


def test_a_draft_of_another_form_is_no_beginning(
  finished, tmp_path, tiny_answers, capsys
):
  path = finished / 'draft.safetensors'
  flags = (f'--config.start={path}', '--config.ffn_width=8')
  with pytest.raises(SystemExit):
    _start(tmp_path / 'run', tiny_answers, *flags)
  assert 'is a draft of another form' in capsys.readouterr().err


def test_answers_of_another_model_are_refused(tmp_path, tiny_answers, capsys):
  with pytest.raises(SystemExit):
    _start(tmp_path / 'run', tmp_path / 'nowhere')
  assert 'holds no train answers' in capsys.readouterr().err


@pytest.mark.slow
def test_decode_takes_it(finished, tmp_path):
  decode.main(
    [
      'decode',
      '--config=configs/decode_tiny.py',
      f'--workdir={tmp_path / "run"}',
      f'--config.trained.eagle={finished / "draft.safetensors"}',
      "--config.methods=('eagle, 3', 'eagle chain, 3', 'eagle')",
      '--config.batches=(1,)',
      '--nocompilation_cache',
    ]
  )
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  assert {row['method']: row['nodes'] for row in rows} == {
    'plain': 1,
    'eagle, 3': 4,
    'eagle chain, 3': 4,
    'eagle': None,
  }
  assert all(row['exact'] for row in rows)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--config.trained.eagle=nothing', "no draft 'nothing' is shipped"),
    ('--config.trained.eagle=no.safetensors', 'there is no such file'),
    ('--config.trained.eagle=', "method 'eagle' needs --config.trained.eagle"),
    ("--config.methods=('eagle dynamic',)", "'eagle dynamic' needs a length"),
  ],
)
def test_a_draft_that_is_not_there(tmp_path, capsys, finished, flag, message):
  with pytest.raises(SystemExit):
    decode.main(
      [
        'decode',
        '--config=configs/decode_tiny.py',
        f'--workdir={tmp_path / "run"}',
        f'--config.trained.eagle={finished / "draft.safetensors"}',
        "--config.methods=('eagle, 3',)",
        '--nocompilation_cache',
        flag,
      ]
    )
  assert message in capsys.readouterr().err
