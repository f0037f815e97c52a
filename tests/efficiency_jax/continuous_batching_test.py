"""Rows that end give their places to prompts that wait; no text changes."""

import heapq

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import speculative
from tests.efficiency_jax import draft_cases

PROMPTS = ['to be or not to be', 'x', 'abcabcabcabc', 'or not', 'yes']
OPTIONS = {'max_new_tokens': 20, 'slots': 64}


def _engine(drafter, **choices):
  lm = draft_cases.language_model()
  if drafter in draft_cases.KINDS:
    choices['heads'] = draft_cases.KINDS[drafter](lm)
    drafter = drafter.removesuffix(' of all tokens')
  return engine_lib.prepare(lm, drafter=drafter, **choices)


def _check_alike(rows, others):
  for a, b in zip(rows, others, strict=True):
    assert (a.text, a.finish, a.statistics) == (b.text, b.finish, b.statistics)
    for name in ('tokens', 'accepted_draft', 'run', 'refused'):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def _rounds(runs, batch):
  """Rounds until prompts of so many runs are done, each in the next place."""
  ends = [0] * batch
  for one in runs:
    heapq.heappush(ends, heapq.heappop(ends) + one)
  return max(ends)


@pytest.mark.parametrize(
  ('drafter', 'length'),
  [
    pytest.param('n-gram', 3, marks=pytest.mark.short),
    ('early exit', 2),
    ('eagle', 3),
    ('medusa', 3),
    ('draft model', 3),
    ('draft model of all tokens', 2),
    ('eagle of all tokens', 2),
    ('medusa of all tokens', 3),
  ],
)
def test_a_row_in_a_place_that_was_used_is_the_row_of_a_whole_batch(
  drafter, length
):
  engine = _engine(drafter, draft_length=length)
  whole = generation.generate(engine, PROMPTS, **OPTIONS)
  some = generation.generate(engine, PROMPTS, batch=2, **OPTIONS)
  _check_alike(some.rows, whole.rows)
  runs = [row.statistics.runs for row in some.rows]
  assert sum(some.rounds.values()) == _rounds(runs, 2)
  # Waiting for whole batches would have taken longer, or nothing is shown.
  waited = sum(max(runs[i : i + 2]) for i in range(0, len(runs), 2))
  assert sum(some.rounds.values()) < waited


@pytest.mark.parametrize(
  ('verifier', 'length'), [('coupled', None), ('block', 3), ('token', 3)]
)
def test_sampled_rows_keep_their_seeds_and_settings(
  verifier, length, monkeypatch
):
  monkeypatch.setattr(engine_lib, 'ADAPTIVE_LENGTHS', (0, 3))
  engine = _engine(
    'n-gram', draft_length=length, greedy=False, verifier=verifier
  )
  options = {
    'temperature': [0.7, 0.0, 2.0, 0.0, 1.0],
    'top_k': [0, 0, 3, 0, 0],
    'seed': 4,
    'costs': np.ones(len(engine.decoder.schedule.lengths)),
    **OPTIONS,
  }
  whole = generation.generate(engine, PROMPTS, **options)
  some = generation.generate(engine, PROMPTS, batch=2, **options)
  assert some.texts == whole.texts
  other = generation.generate(engine, PROMPTS, batch=2, **options | {'seed': 5})
  differ = [a != b for a, b in zip(some.texts, other.texts, strict=True)]
  assert differ == [True, False, True, False, True]


@pytest.mark.parametrize(
  ('batch', 'cache', 'penalty'),
  [(1, None, 1.0), (3, None, 1.0), (9, None, 1.0), (2, 'int8', 1.5)],
)
def test_every_size_of_batch_writes_the_same(batch, cache, penalty):
  engine = _engine('n-gram', draft_length=3, cache_dtype=cache)
  options = OPTIONS | {'repetition_penalty': penalty}
  whole = generation.generate(engine, PROMPTS, **options)
  some = generation.generate(engine, PROMPTS, batch=batch, **options)
  _check_alike(some.rows, whole.rows)


def test_stop_strings_free_places():
  engine = _engine('plain', stop=False)
  whole = generation.generate(engine, PROMPTS, **OPTIONS)
  stop = [whole.texts[1][2:4]]
  assert not any(stop[0] in text for text in whole.texts[2:])
  cut = generation.generate(engine, PROMPTS, stop_strings=stop, **OPTIONS)
  some = generation.generate(
    engine, PROMPTS, stop_strings=stop, batch=2, **OPTIONS
  )
  assert some.texts == cut.texts
  assert some.rows[1].finish == 'stop'
  # Seen after eight rounds; the others have twenty each: 8 + 20 + 20.
  assert sum(some.rounds.values()) == 48


def test_pieces_grow_and_prompts_that_wait_have_no_text():
  engine = _engine('n-gram', draft_length=3, stop=False)
  whole = generation.generate(engine, PROMPTS, batch=2, **OPTIONS)
  pieces = list(
    generation.stream(engine, PROMPTS, batch=2, rounds=2, **OPTIONS)
  )
  _check_alike(pieces[-1].rows, whole.rows)
  assert pieces[-1].rounds == whole.rounds
  assert pieces[0].texts[2:] == [''] * 3
  runs = [row.statistics.runs for row in pieces[0].rows]
  assert runs == [2, 2, 0, 0, 0]
  for before, after in zip(pieces, pieces[1:], strict=False):
    rounds = sum(after.rounds.values()) - sum(before.rounds.values())
    assert 1 <= rounds <= 2
    for a, b in zip(before.texts, after.texts, strict=True):
      assert b.startswith(a)


def test_another_place_and_prompt_compile_nothing_new():
  engine = _engine('n-gram', draft_length=3)
  one = lambda prompts: generation.generate(engine, prompts, batch=2, **OPTIONS)
  programs = lambda: [
    function._cache_size()
    for function in (speculative.run, speculative.replace)
  ]
  one(PROMPTS[:3])
  before = programs()
  one(PROMPTS[::-1])
  assert programs() == before


def test_a_row_begins_anew_and_the_account_goes_on():
  engine = _engine('n-gram', draft_length=3)
  keys = sampling.row_keys(0, jnp.arange(2))
  begin = lambda prompts, rows: engine_lib.start(
    engine, prompts, 20, sampling.make(len(prompts)), keys[rows], 64
  )
  state = begin([[1, 2, 1, 2], [3]], np.array([0, 1]))
  state = engine_lib.run(engine, state, rounds=3)
  account = jax.tree.map(np.asarray, state.account)
  kept = np.asarray(state.tokens[0])
  state = speculative.replace(
    state, jnp.int32(1), begin([[4, 5]], np.array([1]))
  )
  chex.assert_trees_all_equal(state.account, account)
  assert account.rounds.tolist() == [3]
  assert (account.tokens >= 3).all()
  assert state.counters.runs.tolist() == [3, 0]
  assert state.length[1] == 2
  np.testing.assert_array_equal(state.tokens[0], kept)
  np.testing.assert_array_equal(state.tokens[1, :2], [4, 5])


def test_the_last_rows_have_an_account_of_their_own(monkeypatch):
  run, seen = engine_lib.run, []

  def watched(engine, state, *rest):
    seen.append((rest[-1], state.account.tokens.sum().item()))
    return run(engine, state, *rest)

  monkeypatch.setattr(generation, 'run', watched)
  engine = _engine('n-gram', draft_length=3, stop=False)
  made = generation.generate(engine, PROMPTS, batch=2, **OPTIONS)
  before = [tokens for waits, tokens in seen if waits]
  assert before == sorted(before)
  assert before[-1] > 0
  assert [tokens for waits, tokens in seen if not waits] == [0]
  runs = [row.statistics.runs for row in made.rows]
  assert sum(made.rounds.values()) == _rounds(runs, 2)


def test_no_rows_at_a_time_are_refused():
  with pytest.raises(ValueError, match='batch must be >= 1, got 0'):
    generation.generate(_engine('plain'), PROMPTS, batch=0, **OPTIONS)
