"""Prompts are read from the data sets' own layouts."""

import gzip
import json

import pytest

from efficiency_jax.data import prompts
from efficiency_jax.io.errors import FileFormatError


@pytest.fixture
def files(tmp_path, monkeypatch):
  paths = {
    'mt-bench': tmp_path / 'question.jsonl',
    'humaneval': tmp_path / 'HumanEval.jsonl.gz',
  }
  monkeypatch.setattr(prompts.assets, 'fetch', lambda name: paths[name])
  return paths


def test_mt_bench_gives_first_turns_and_categories(files):
  record = {'question_id': 81, 'category': 'writing', 'turns': ['one', 'two']}
  files['mt-bench'].write_text(json.dumps(record) + '\n')
  (prompt,) = prompts.load('mt-bench')
  assert prompt == prompts.Prompt(
    name='mt-bench/81', category='writing', message='one'
  )


def test_humaneval_asks_to_complete_the_function(files):
  record = {'task_id': 'HumanEval/0', 'prompt': 'def f():\n    """Doc."""\n'}
  with gzip.open(files['humaneval'], 'wt') as file:
    file.write(json.dumps(record))
  (prompt,) = prompts.load('humaneval')
  assert prompt.name == 'HumanEval/0'
  assert prompt.message.endswith('def f():\n    """Doc."""\n```')


def test_damaged_lines_are_named(files):
  files['mt-bench'].write_text('{}\n')
  with pytest.raises(FileFormatError, match='line 1 is not a prompt'):
    prompts.load('mt-bench')


def test_unknown_sets_are_refused():
  with pytest.raises(ValueError, match="prompts 'x' are unknown"):
    prompts.load('x')


@pytest.mark.model
def test_the_real_sets_have_their_known_sizes():
  assert len(prompts.load('mt-bench')) == 80
  assert len({p.category for p in prompts.load('mt-bench')}) == 8
  assert len(prompts.load('humaneval')) == 164
