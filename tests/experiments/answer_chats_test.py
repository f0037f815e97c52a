"""The whole experiment on a random model, and what reads its files."""

import json

import numpy as np
import pytest

from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from experiments import answer_chats
from experiments import answer_files


def _start(workdir, *flags):
  answer_chats.main(
    [
      'answer_chats',
      '--config=configs/answer_chats.py:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
      *flags,
    ]
  )


def test_rows_files_and_figure(tiny_answers):
  rows = json.loads((tiny_answers / 'results.json').read_text())['rows']
  made = {row['split']: row for row in rows}
  assert made['train']['answers'] == 8
  assert made['validation']['answers'] == 4
  for split, row in made.items():
    found = answer_files.load(tiny_answers, split)
    assert row['tokens'] == (found.length - found.start).sum()
  assert 'coverage.png' in (tiny_answers / 'report.md').read_text()
  assert (tiny_answers / 'coverage.png').stat().st_size > 5_000


def test_questions_of_the_two_splits_are_different(tiny_answers):
  prompts = [
    tokens[:start].tolist()
    for split in ('train', 'validation')
    for tokens, start in zip(
      *answer_files.load(tiny_answers, split)[:2], strict=True
    )
  ]
  assert len(prompts) == 12
  assert all(prompts.count(prompt) == 1 for prompt in prompts)


def test_a_finished_run_is_read_back(tiny_answers):
  before = {p: p.stat().st_mtime_ns for p in tiny_answers.glob('answers/*')}
  _start(tiny_answers)
  assert before == {
    p: p.stat().st_mtime_ns for p in tiny_answers.glob('answers/*')
  }


def test_every_token_of_an_answer_is_learnt_once(tiny_answers):
  made = answer_files.load(tiny_answers, 'train')
  arrays = answer_files.training_arrays(made)
  for row in range(len(made.tokens)):
    learnt = np.flatnonzero(arrays['loss_mask'][row]) + 1
    np.testing.assert_array_equal(
      learnt, np.arange(made.start[row], made.length[row])
    )
    np.testing.assert_array_equal(
      made.tokens[row][learnt], answer_files.texts(tiny_answers, 'train')[row]
    )


def test_coverage_is_the_probability_of_the_vocabulary(tiny_answers):
  lm = untrained.language_model()
  hidden = answer_files.load(tiny_answers, 'validation').hidden[:2, :5]
  vocabulary = np.array([7, 100, 3])
  found = answer_files.coverage(lm, hidden, vocabulary)
  logits = transformer.head_fn(lm.config)(lm.params, hidden.astype(np.float32))
  p = np.exp(np.asarray(logits, float))
  p /= p.sum(-1, keepdims=True)
  np.testing.assert_allclose(found, p[..., vocabulary].sum(-1), rtol=1e-5)


def test_answers_that_are_not_there(tmp_path):
  with pytest.raises(ValueError, match=r'holds no train answers: make them'):
    answer_files.load(tmp_path, 'train')
