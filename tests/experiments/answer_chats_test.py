"""The whole experiment on a random model, and what reads its files."""

import itertools
import json

import ml_collections
import numpy as np
import pytest

from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from experiments import answer_chats
from experiments import answer_files
from experiments import questions


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


def test_states_that_were_not_kept_are_computed(tiny_answers, tmp_path):
  _start(tmp_path / 'bare', '--config.keep_hidden=False')
  lm = untrained.language_model()
  config = ml_collections.ConfigDict({'answers': '', 'vocabulary': 20})
  found = {}
  for folder in (tiny_answers, tmp_path / 'bare'):
    config.answers = str(folder)
    found[folder.name] = answer_files.for_drafts(lm, config)
  (kept, vocabulary), (bare, same) = found.values()
  np.testing.assert_array_equal(vocabulary, same)
  assert 'hidden' not in bare['train']
  np.testing.assert_array_equal(
    bare['train']['tokens'], kept['train']['tokens']
  )
  learnt = kept['validation']['loss_mask'] > 0
  for name in ('hidden', 'coverage'):
    np.testing.assert_allclose(
      bare['validation'][name][learnt],
      kept['validation'][name][learnt].astype(np.float32),
      rtol=5e-3,
      atol=5e-3,
    )
  # A draft that sees inner layers finds none of them in what was kept.
  config.answers = str(tiny_answers)
  inner, _ = answer_files.for_drafts(lm, config, layers=(0,))
  assert 'hidden' not in inner['train']
  hidden = inner['validation']['hidden']
  assert hidden.shape[-1] == 2 * lm.config.width
  np.testing.assert_allclose(
    hidden[..., : lm.config.width], bare['validation']['hidden'], atol=1e-5
  )


def test_folders_with_commas_are_read_one_after_another(tiny_answers):
  once = answer_files.load(tiny_answers, 'train')
  twice = answer_files.load(f'{tiny_answers},{tiny_answers}', 'train')
  np.testing.assert_array_equal(twice.tokens, np.concatenate([once.tokens] * 2))


def test_a_model_answers_its_own_questions(tmp_path, monkeypatch):
  """Which a random one hardly ends: here they are given."""
  asked = lambda lm, **options: (f'is it {i}?' for i in itertools.count())
  monkeypatch.setattr(questions.answers, 'questions', asked)
  flags = '--config.chats=own', '--config.num_own=24'
  _start(tmp_path / 'own', *flags, '--config.num_train=4')
  made = answer_files.load(tmp_path / 'own', 'train')
  tokenizer = untrained.language_model().tokenizer
  prompts = [
    tokenizer.decode(row[:start].tolist())
    for row, start in zip(made.tokens, made.start, strict=True)
  ]
  assert len({text[text.index('is it') :][:9] for text in prompts}) == 4


def test_answers_that_are_not_there(tmp_path):
  with pytest.raises(ValueError, match=r'holds no train answers: make them'):
    answer_files.load(tmp_path, 'train')
