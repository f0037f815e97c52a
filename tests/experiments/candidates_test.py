"""Turns and medians of candidates that take the time they say."""

import dataclasses
import json

import pytest

from experiments import candidates
from experiments import workdir as workdirs

pytestmark = pytest.mark.short


def _sample(seconds, tokens=((1, 2, 3, 4),), steps=2):
  return candidates.Sample(
    tokens=[list(row) for row in tokens],
    prefill_seconds=1.0,
    decode_seconds=seconds,
    decoded=4,
    steps=steps,
  )


def test_turns_alternate_and_the_first_is_not_counted(tmp_path):
  calls = []

  def candidate(name):
    def run():
      calls.append(name)
      return _sample(len(calls))

    return run

  workdir = workdirs.Workdir(
    tmp_path / 'run', experiment='x', config={}, command=['x']
  )
  samples = candidates.take_turns(
    {'a': candidate('a'), 'b': candidate('b')},
    repeats=2,
    workdir=workdir,
    label='batch 1',
    read=lambda: 10.0 * len(calls),
  )
  assert calls == ['b', 'a', 'a', 'b', 'b', 'a']
  assert [s.decode_seconds for s in samples['a']] == [3, 6]
  assert [s.decode_seconds for s in samples['b']] == [4, 5]
  # After the sample, when memory was faster than before it.
  assert [s.bytes_per_second for s in samples['a']] == [30, 60]
  lines = (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()
  assert json.loads(lines[0]) == {
    'group': 'batch 1',
    'turn': 1,
    'method': 'a',
    'tokens_per_second': 4 / 3,
  }


def test_a_speedup_is_the_median_of_ratios_within_a_turn():
  # The machine was twice as slow in the second turn, for both.
  ours = [_sample(1.0), _sample(2.0), _sample(1.0)]
  plain = [_sample(3.0), _sample(6.0), _sample(4.0)]
  row = candidates.summary(ours, plain)
  assert row['tokens_per_second'] == 4
  assert row['speedup'] == 3
  assert row['speedup_spread'] == pytest.approx(0.5)
  assert row['milliseconds_per_step'] == 500
  assert row['tokens_per_step'] == 2


def test_a_rate_is_compared_with_memory_around_it():
  """Half as fast in the second turn, as memory was."""
  ours = [
    dataclasses.replace(_sample(seconds), bytes_per_second=speed)
    for seconds, speed in ((1.0, 16.0), (2.0, 8.0), (1.0, 4.0))
  ]
  assert candidates.summary(ours, ours)['tokens_per_byte'] == 4 / 16


def test_texts_are_compared_token_for_token():
  mine = _sample(1.0, [(1, 2, 3, 4), (5, 6, 7, 8)])
  plain = _sample(1.0, [(1, 2, 3, 4), (5, 6, 0, 8)])
  row = candidates.summary([mine], [plain])
  assert (row['texts_equal'], row['texts'], row['tokens_equal']) == (1, 2, 3)


def test_prompts_one_after_another_add_up():
  whole = candidates.total([_sample(1.0, steps=4), _sample(3.0, steps=1)])
  assert whole.tokens == [[1, 2, 3, 4]] * 2
  assert (whole.decoded, whole.steps, whole.decode_seconds) == (8, 5, 4.0)
  assert whole.tokens_per_second == 2
