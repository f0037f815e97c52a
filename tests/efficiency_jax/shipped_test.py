"""The drafts that are part of the package."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from efficiency_jax import drafts
from efficiency_jax import generation
from efficiency_jax.data import prompts as prompt_sets
from efficiency_jax.io import pretrained


def test_every_shipped_file_is_a_draft_of_a_card_and_all_are_small():
  paths = sorted(drafts._SHIPPED.glob('*.safetensors'))
  assert {path.stem for path in paths} == {
    'smollm2-135m-eagle',
    'smollm2-135m-medusa',
  }
  for path in paths:
    card = drafts.card(drafts.shipped(path.stem))
    assert card['licence'] == 'Apache-2.0'
    assert card['command'].startswith('python -m experiments.train_')
    assert json.loads(card['validation'])[0]['top1'] > 20
  assert sum(path.stat().st_size for path in paths) <= 12e6


@pytest.mark.model
@pytest.mark.parametrize('kind', ['eagle', 'medusa'])
def test_shipped_drafts_change_no_text_and_save_runs(kind):
  lm = pretrained.load('smollm2-135m')
  chats = [
    lm.tokenizer.apply_chat_template(
      [{'role': 'user', 'content': prompt.message}]
    )
    for prompt in prompt_sets.load('mt-bench')[:3]
  ]
  prompts = [lm.tokenizer.encode(chat) for chat in chats]
  draft = drafts.load(drafts.shipped(f'smollm2-135m-{kind}'), lm)
  options = {'max_new_tokens': 48, 'slots': 256}
  plain = generation.generate(lm, prompts, drafter='plain', **options)
  fast = generation.generate(
    lm, prompts, drafter=kind, heads=draft, draft_length=7, **options
  )
  for mine, theirs in zip(fast.rows, plain.rows, strict=True):
    np.testing.assert_array_equal(mine.tokens, theirs.tokens)
  runs = [row.statistics.tokens_per_run for row in fast.rows]
  assert np.mean(runs) > 1.3  # a tree of 8 nodes: 1.5 and 1.4 here


def test_shipped_drafts_are_installed(tmp_path):
  pytest.importorskip('setuptools')
  root = pathlib.Path(__file__).parents[2]
  shutil.copy(root / 'setup.py', tmp_path)
  folder = tmp_path / 'efficiency_jax' / 'shipped'
  folder.mkdir(parents=True)
  (tmp_path / 'efficiency_jax' / '__init__.py').touch()
  (folder / 'a.safetensors').touch()
  subprocess.run(
    [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', 'built'],
    cwd=tmp_path,
    check=True,
  )
  built = tmp_path / 'built' / 'efficiency_jax' / 'shipped'
  assert [path.name for path in built.iterdir()] == ['a.safetensors']
