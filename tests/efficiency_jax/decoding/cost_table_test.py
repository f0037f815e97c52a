"""The cost table times the loop that decodes, at every draft length."""

import numpy as np
import pytest

from efficiency_jax.decoding import cost_table
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.models import transformer
from tests import fixtures

CONFIG = fixtures.config()
DECODER = speculative.Decoder(
  apply=transformer.apply_fn(CONFIG),
  drafter=drafters.NGram(),
  schedule=schedule.Schedule(lengths=(0, 2)),
)
WEIGHTS = drafters.Weights(fixtures.params(CONFIG))


def test_every_length_is_forced_for_all_its_rounds(monkeypatch):
  seen = []
  run = speculative.run

  def watched(decoder, weights, state, rounds, costs, forced, waiting):
    before = np.asarray(state.account.rounds)
    state = run(decoder, weights, state, rounds, costs, forced, waiting)
    seen.append((int(forced), np.asarray(state.account.rounds) - before))
    return state

  monkeypatch.setattr(speculative, 'run', watched)
  # The first token that plain decoding would write stops a row: not here.
  prompt = [[1, 2, 3]]
  text = fixtures.plain_texts(CONFIG, WEIGHTS.target, prompt, 1)[0]
  stop = (int(text[-1]),)
  state = fixtures.begin(DECODER, WEIGHTS, CONFIG, prompt, 60, stop=stop)
  seconds = cost_table.measure(DECODER, WEIGHTS, state, rounds=3, repeats=2)
  assert seconds.shape == (2,)
  assert (seconds > 0).all()
  assert [index for index, _ in seen] == [0] + [0, 1] * 3
  # None to compile, one each to begin with, which takes no time here.
  wanted = [0, 1, 1] + [3] * 4
  for number, (index, chosen) in zip(wanted, seen, strict=True):
    assert chosen[index] == chosen.sum() == number


def test_a_long_round_is_enough_for_a_sample(monkeypatch):
  clock = iter(np.arange(100) * 0.15)
  monkeypatch.setattr(cost_table.time, 'perf_counter', lambda: next(clock))
  seen = []
  run = speculative.run

  def watched(decoder, weights, state, rounds, *rest):
    seen.append(int(rounds))
    return run(decoder, weights, state, rounds, *rest)

  monkeypatch.setattr(speculative, 'run', watched)
  state = fixtures.begin(DECODER, WEIGHTS, CONFIG, [[1, 2, 3]], 60)
  seconds = cost_table.measure(DECODER, WEIGHTS, state, rounds=6, repeats=2)
  # 0.15 s a reading of the clock: two such rounds are more than 0.2 s.
  assert seen == [0, 1, 1] + [2, 2] * 2
  np.testing.assert_allclose(seconds, 0.15 / 2, rtol=1e-5)


def test_lengths_are_compared_within_a_turn():
  turns = [[2.0, 3.0], [1.0, 1.6], [4.0, 4.1], [1.2, 1.8], [6.0, 9.0]]
  # A machine that was slow for both changes nothing; one odd turn neither.
  np.testing.assert_allclose(cost_table.combined(turns), [1.0, 1.5])
  np.testing.assert_allclose(cost_table.combined([[3.0], [2.0]]), [2.0])


def test_rows_without_room_are_refused():
  state = fixtures.begin(DECODER, WEIGHTS, CONFIG, [[1, 2, 3]], 8)
  with pytest.raises(ValueError, match='room for 3 rounds'):
    cost_table.measure(DECODER, WEIGHTS, state, rounds=3)
