"""Tests of the logbook."""

import json

import pytest

from efficiency_jax.training import logbook


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_has_each_step_once(tmp_path):
  path = tmp_path / 'log.jsonl'
  book = logbook.Logbook(path)
  for step in (1, 2, 3):
    book.write(step, {'loss': step / 2})
  with path.open('ab') as file:
    file.write(b'{"step": 4, "lo')  # killed while writing
  again = logbook.Logbook(path)
  again.rewind(2)
  again.write(3, {'loss': 9.0})
  assert _lines(path) == [
    {'step': 1, 'loss': 0.5},
    {'step': 2, 'loss': 1.0},
    {'step': 3, 'loss': 9.0},
  ]


def test_numbers_that_are_not_finite_are_null(tmp_path):
  book = logbook.Logbook(tmp_path / 'log.jsonl')
  book.write(1, {'a': float('nan'), 'b': float('inf'), 'c': 1})
  line = _lines(tmp_path / 'log.jsonl')[0]
  assert line == {'step': 1, 'a': None, 'b': None, 'c': 1}


def test_rewinding_an_absent_file_does_nothing(tmp_path):
  logbook.Logbook(tmp_path / 'log.jsonl').rewind(3)
  assert not (tmp_path / 'log.jsonl').exists()


def test_a_missing_tensorboard_writer_is_named(tmp_path, monkeypatch):
  monkeypatch.setattr(logbook.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install tensorboardX'):
    logbook.Logbook(tmp_path / 'log.jsonl', tensorboard=True)
