"""Rates are ratios of counts, and sums of rows weigh every run alike."""

import math

import numpy as np
import pytest

from efficiency_jax.decoding import statistics
from efficiency_jax.decoding.speculative import Counters

pytestmark = pytest.mark.short


def row(**changes) -> statistics.Statistics:
  counts = {
    'generated': 10,
    'runs': 4,
    'drafted': 12,
    'accepted': 6,
    'tested_at': (4, 3, 2),
    'accepted_at': (3, 2, 1),
  }
  return statistics.Statistics(**{**counts, **changes})


def test_rates():
  one = row()
  assert one.tokens_per_run == 2.5  # the lecture's TAR, bonus included
  assert one.accepted_drafts_per_run == 1.5
  assert one.acceptance_rate == 0.5
  assert one.conditional_acceptance == (0.75, 2 / 3, 0.5)
  assert one.alpha == 6 / 9


def test_nothing_drafted_is_not_a_number():
  plain = row(drafted=0, accepted=0, tested_at=(), accepted_at=())
  assert math.isnan(plain.acceptance_rate)
  assert math.isnan(plain.alpha)
  assert math.isnan(row(runs=0).tokens_per_run)


def test_total_adds_counts_of_different_draft_lengths():
  both = statistics.total([row(), row(tested_at=(4,), accepted_at=(1,))])
  assert both.generated == 20
  assert both.runs == 8
  assert both.tested_at == (8, 3, 2)
  assert both.accepted_at == (4, 2, 1)
  with pytest.raises(ValueError, match='at least one'):
    statistics.total([])


def test_of_rows_reads_the_counters_of_each_row():
  counters = Counters(
    runs=np.array([4, 1]),
    drafted=np.array([12, 0]),
    accepted=np.array([6, 0]),
    tested_at=np.array([[4, 3, 2], [0, 0, 0]]),
    accepted_at=np.array([[3, 2, 1], [0, 0, 0]]),
  )
  first, second = statistics.of_rows(counters, np.array([10, 1]))
  assert first == row()
  assert second.tokens_per_run == 1
