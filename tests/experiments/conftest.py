"""Answers of a random model, made once for all experiments that read them."""

import pathlib

import pytest

from experiments import answer_chats


@pytest.fixture(scope='session')
def tiny_answers(tmp_path_factory) -> pathlib.Path:
  """The folder that `configs/answer_chats.py:tiny` leaves."""
  workdir = tmp_path_factory.mktemp('answers') / 'run'
  answer_chats.main(
    [
      'answer_chats',
      '--config=configs/answer_chats.py:tiny',
      f'--workdir={workdir}',
      '--nocompilation_cache',
    ]
  )
  return workdir
