"""Means and deviations over seeds, method by method."""

import pytest

from experiments import seeds


def test_means_and_deviations_of_each_method():
  rows = [
    {'method': 'a', 'error': 2.0, 'loss': 1.0, 'equal': True},
    {'method': 'b', 'error': 5.0, 'loss': 2.0},
    {'method': 'a', 'error': 4.0, 'loss': 3.0, 'equal': False},
  ]
  a, b = seeds.summary(rows, ('error', 'loss', 'equal'), 'error')
  assert a == {
    'method': 'a',
    'seeds': 2,
    'deviation': pytest.approx(2**0.5),
    'error': 3.0,
    'loss': 2.0,
    'equal': False,
  }
  # One run has no deviation, and no field that it lacks.
  assert b == {
    'method': 'b',
    'seeds': 1,
    'deviation': None,
    'error': 5.0,
    'loss': 2.0,
  }
