"""Heads trained on answers of a random model, and decoded with."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import train_medusa as train_medusa_config
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


def test_random_outputs_are_as_long_as_the_target_s(tiny_answers):
  table = np.random.default_rng(0).normal(0, 3, (400, 64)).astype(np.float32)
  drawn = train_medusa._random(jax.random.key(0), jnp.asarray(table))
  assert drawn.shape == table.shape
  # 25,600 squares: their mean has an error of one percent.
  np.testing.assert_allclose(np.mean(np.square(drawn)), 9, rtol=0.05)
  assert abs(np.mean(np.asarray(drawn) * table)) < 0.3
  config = train_medusa_config.get_config('tiny')
  config.answers = str(tiny_answers)
  config.random_outputs = True
  with pytest.raises(ValueError, match='is for output heads of their own'):
    train_medusa.experiment(config, None)


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
