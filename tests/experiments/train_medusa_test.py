"""Heads trained on answers of a random model, and decoded with."""

import json

import pytest

from efficiency_jax import drafts
from efficiency_jax.decoding import medusa
from efficiency_jax.io import untrained
from experiments import decode
from experiments import train_medusa


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny_answers):
  workdir = tmp_path_factory.mktemp('runs') / 'heads'
  train_medusa.main(
    [
      'train_medusa',
      '--config=configs/train_medusa.py:tiny',
      f'--workdir={workdir}',
      f'--config.answers={tiny_answers}',
      '--nocompilation_cache',
    ]
  )
  return workdir


def test_the_heads_are_saved_with_their_trees_and_card(finished):
  path = finished / 'draft.safetensors'
  heads = drafts.load(path, untrained.language_model())
  assert isinstance(heads, medusa.TrainedHeads)
  assert heads.form.count == 3
  assert heads.form.token
  assert heads.form.layers == (0,)
  assert [len(tree) for tree in heads.trees] == [4, 8]
  assert 'experiments.train_medusa' in drafts.card(path)['command']
  rows = json.loads((finished / 'results.json').read_text())['rows']
  assert [row['method'] for row in rows if 'alpha' in row] == [
    f'head {k}' for k in (1, 2, 3)
  ]
  assert (finished / 'training.png').stat().st_size > 5_000


@pytest.mark.slow
def test_decode_takes_them(finished, tmp_path):
  decode.main(
    [
      'decode',
      '--config=configs/decode_tiny.py',
      f'--workdir={tmp_path / "run"}',
      f'--config.trained.medusa={finished / "draft.safetensors"}',
      "--config.methods=('medusa, 3', 'medusa chain, 3', 'medusa')",
      '--config.batches=(1,)',
      '--nocompilation_cache',
    ]
  )
  rows = json.loads((tmp_path / 'run/results.json').read_text())['rows']
  assert {row['method'] for row in rows} == {
    'plain',
    'medusa, 3',
    'medusa chain, 3',
    'medusa',
  }
  assert all(row['exact'] for row in rows)
