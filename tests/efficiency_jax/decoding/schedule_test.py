"""The choice of the draft length is the best expected rate, and adapts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import cost_model
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures


def _observe(rule, estimate, kind, accepted, tested, times=1):
  for _ in range(times):
    estimate = schedule.observe(
      rule,
      estimate,
      jnp.asarray(kind),
      jnp.asarray(accepted),
      jnp.asarray(tested),
    )
  return estimate


def test_counts_fade_as_documented():
  rule = schedule.Schedule(lengths=(0, 4), decay=0.5, recovery=0.9)
  estimate = schedule.init(2, 2)
  estimate = _observe(rule, estimate, [0, 1], [3, 0], [4, 0])
  np.testing.assert_allclose(estimate.accepted, [[3, 0], [0, 0]])
  np.testing.assert_allclose(estimate.refused, [[1, 0], [0, 0]])
  # Row 0 sees its other kind: the first kind only recovers.
  estimate = _observe(rule, estimate, [1, 1], [2, 0], [2, 1])
  np.testing.assert_allclose(estimate.accepted, [[2.7, 2], [0, 0]])
  np.testing.assert_allclose(estimate.refused, [[0.9, 0], [0, 1]], atol=1e-7)
  # Again: decay and recovery. A row that tested nothing only recovers.
  estimate = _observe(rule, estimate, [1, 1], [0, 0], [1, 0])
  np.testing.assert_allclose(
    estimate.accepted, [[2.43, 0.9], [0, 0]], rtol=1e-6
  )
  np.testing.assert_allclose(estimate.refused, [[0.81, 1], [0, 0.9]], rtol=1e-6)


@pytest.mark.parametrize('seed', range(5))
def test_the_choice_is_the_best_expected_rate(seed):
  rng = np.random.default_rng(seed)
  lengths = (0, 1, 3, 7)
  rule = schedule.Schedule(
    lengths=lengths, prior=(0.3, 0.8), prior_weight=2.0, urgency=3.0
  )
  estimate = schedule.Estimate(
    *jnp.asarray(rng.gamma(2.0, 2.0, (2, 4, 3)), jnp.float32)
  )
  kind, count = rng.integers(0, 3, 4), rng.integers(0, 9, 4)
  remaining = rng.integers(1, 50, 4) * (rng.random(4) < 0.7)
  costs = 1 + np.cumsum(rng.random(4)) * 0.4
  rates = []
  for length, cost in zip(lengths, costs, strict=True):
    tokens = 0.0
    for row in range(4):
      prior = (0.3, 0.8, 0.8)[kind[row]]
      accepted = float(estimate.accepted[row, kind[row]])
      refused = float(estimate.refused[row, kind[row]])
      alpha = (accepted + 2 * prior) / (accepted + refused + 2)
      worth = (remaining[row] / max(remaining.max(), 1)) ** 3
      drafts = min(length, count[row])
      tokens += worth * sum(alpha**i for i in range(drafts + 1))
    rates.append(tokens / cost)
  chosen = schedule.choose(
    rule,
    estimate,
    jnp.asarray(kind),
    jnp.asarray(count),
    jnp.asarray(remaining),
    jnp.asarray(costs, jnp.float32),
  )
  assert int(chosen) == int(np.argmax(rates))


def test_a_tree_wins_no_more_tokens_than_it_is_high():
  rule = schedule.Schedule(lengths=(0, 2, 9), prior=(0.6,), margin=0.0)
  one = jnp.asarray([1])
  choose = lambda costs, heights: int(
    schedule.choose(
      rule, schedule.init(1, 1), one - 1, 99 * one, one, costs, heights
    )
  )
  costs = jnp.asarray([1.0, 1.3, 1.6])
  assert choose(costs, None) == 2  # 1, 1.96, 2.48 tokens
  assert choose(costs, (0, 1, 2)) == 1  # 1, 1.6, 1.96
  assert choose(costs, (0, 1, 5)) == 2  # 1, 1.6, 2.38


def test_failures_lead_to_plain_decoding_and_time_to_another_try():
  rule = schedule.Schedule(
    lengths=(0, 4), prior=(0.5,), prior_weight=2.0, decay=0.85, recovery=0.995
  )
  costs = jnp.asarray([1.0, 1.5])
  choose = lambda estimate, count=4: int(
    schedule.choose(
      rule,
      estimate,
      jnp.asarray([0]),
      jnp.asarray([count]),
      jnp.asarray([9]),
      costs,
    )
  )
  estimate = schedule.init(1, 1)
  assert choose(estimate) == 1
  # Nothing to draft: a longer round can only cost more.
  assert choose(estimate, count=0) == 0
  estimate = _observe(rule, estimate, [0], [0], [1], times=8)
  assert choose(estimate) == 0
  waited = _observe(rule, estimate, [0], [0], [0], times=600)
  assert choose(waited) == 1
  # A draft that always stands is finite too.
  estimate = _observe(rule, estimate, [0], [4], [4], times=200)
  assert choose(estimate) == 1


@pytest.mark.parametrize('seed', range(8))
def test_no_generation_is_a_loss_whatever_is_accepted(seed):
  """Rows of random budgets and luck: time within 1.05 of plain decoding's."""
  rng = np.random.default_rng(seed)
  lengths = (0, 1, 3, 7)
  # It believes in every draft, so that only what is affordable holds it back.
  rule = schedule.Schedule(lengths=lengths, prior=(0.99,), prior_weight=1e6)
  costs = np.array([1.0, *np.sort(1 + 1.5 * rng.random(3))])
  batch = int(rng.integers(1, 5))
  limit, luck = rng.integers(1, 200, batch), rng.random(batch) ** 4
  emitted, rounds = np.zeros(batch, int), np.zeros(4, int)
  while (emitted < limit).any():
    live = emitted < limit
    account = schedule.Account(jnp.asarray(rounds), jnp.asarray(emitted))
    fits = schedule.affordable(
      rule, jnp.asarray(costs), account, jnp.asarray(live)
    )
    chosen = int(
      schedule.choose(
        rule,
        schedule.init(batch, 1),
        jnp.zeros(batch, int),
        jnp.full(batch, 99),
        jnp.asarray(np.where(live, limit - emitted, 0)),
        jnp.asarray(costs),
        allowed=fits,
      )
    )
    rounds[chosen] += 1
    won = (rng.random((batch, lengths[chosen])) < luck[:, None]).cumprod(1)
    emitted += np.where(live, 1 + won.sum(1), 0)
    emitted = np.minimum(emitted, limit)
    # Any of the rows that were live may be the one that ends last.
    assert rounds @ costs <= 1.05 * emitted[live].min() * (1 + 1e-6)
  assert rounds[0] < rounds.sum() or limit.max() < 30


@pytest.mark.parametrize('seed', range(4))
def test_while_prompts_wait_all_places_together_are_no_loss(seed):
  """Rows without end, good and bad: time within 1.05 of T / B plain rounds."""
  rng = np.random.default_rng(seed)
  lengths, batch, waiting = (0, 1, 3), 4, jnp.bool_(True)
  rule = schedule.Schedule(lengths=lengths, prior=(0.99,), prior_weight=1e6)
  costs, luck = np.array([1.0, 1.3, 2.2]), np.array([0.0, 0.0, 0.9, 0.9])
  emitted, rounds = np.zeros(batch, int), np.zeros(3, int)
  live = jnp.ones(batch, bool)
  for _ in range(300):
    account = schedule.Account(jnp.asarray(rounds), jnp.asarray(emitted))
    together = schedule.affordable(
      rule, jnp.asarray(costs), account, live, waiting
    )
    alone = schedule.affordable(rule, jnp.asarray(costs), account, live)
    # It believes in every draft: the longest that may fail is its choice.
    chosen = int(np.flatnonzero(together)[-1])
    assert rounds @ costs + costs[chosen] <= 1.05 * (emitted.mean() + 1) + 1e-4
    rounds[chosen] += 1
    won = (rng.random((batch, lengths[chosen])) < luck[:, None]).cumprod(1)
    emitted += 1 + won.sum(1)
  # The bad rows for themselves could not have paid for what the good ones do.
  assert rounds @ costs > 1.05 * emitted[0]
  assert not np.asarray(alone)[1:].any()
  assert rounds @ costs < emitted.mean()


def test_while_prompts_wait_a_row_that_leads_counts_as_much():
  rule = schedule.Schedule(lengths=(0, 1), prior_weight=1.0, margin=0.0)
  estimate = schedule.Estimate(
    jnp.array([[20.0], [0.0]]), jnp.array([[0.0], [20.0]])
  )
  choose = lambda **options: int(
    schedule.choose(
      rule,
      estimate,
      jnp.zeros(2, int),
      jnp.full(2, 9),
      jnp.array([5, 40]),
      jnp.array([1.0, 1.3]),
      **options,
    )
  )
  assert choose() == 0
  assert choose(waiting=jnp.bool_(True)) == 1


_TARGET, _DRAFT = fixtures.config(), fixtures.config(num_layers=1)
_WEIGHTS = drafters.Weights(
  fixtures.params(_TARGET), fixtures.params(_DRAFT, 1)
)


def _drafting(**fields):
  """A draft model that guesses at random, for one token or none."""
  return speculative.Decoder(
    apply=transformer.apply_fn(_TARGET),
    drafter=drafters.DraftModel(
      apply=transformer.apply_fn(_DRAFT),
      init_cache=kv_cache.initializer(_DRAFT),
    ),
    schedule=schedule.Schedule(lengths=(0, 1), **fields),
  )


@pytest.mark.parametrize(
  'account',
  [
    # The one that is behind could not pay; both together can.
    schedule.Account(np.array([50, 0]), np.array([0, 104])),
    # Both could; but the row that accepts all is nearly done.
    schedule.Account(np.array([50, 0]), np.array([104, 104])),
  ],
)
def test_the_loop_tells_its_schedule_that_prompts_wait(account):
  decoder, chosen = _drafting(), {}
  for waiting in (False, True):
    state = fixtures.begin(
      decoder, _WEIGHTS, _TARGET, [[1, 2, 3], [4]], [5, 40]
    )
    state = state._replace(
      account=jax.tree.map(jnp.int32, account),
      estimate=schedule.Estimate(
        jnp.array([[20.0], [0.0]]), jnp.array([[0.0], [2.0]])
      ),
    )
    if account.tokens[0] == 0:  # both accept
      state = state._replace(
        estimate=schedule.Estimate(jnp.full((2, 1), 20.0), jnp.zeros((2, 1)))
      )
    state = fixtures.proceed(
      decoder,
      _WEIGHTS,
      state,
      max_rounds=1,
      costs=np.array([1.0, 1.3]),
      waiting=waiting,
    )
    chosen[waiting] = np.asarray(state.account.rounds) - account.rounds
  assert chosen[False].tolist() == [1, 0]
  assert chosen[True].tolist() == [0, 1]


def test_the_loop_keeps_its_drafts_affordable():
  """The schedule believes in drafts that are guesses."""
  costs, rounds = np.array([1.0, 1.4]), {}
  for loss in (0.05, 1e6):
    decoder = _drafting(prior=(0.99,), prior_weight=1e6, loss=loss)
    state = fixtures.begin(
      decoder, _WEIGHTS, _TARGET, [[1, 2, 3], [4]], [40, 24]
    )
    state = fixtures.proceed(decoder, _WEIGHTS, state, costs=costs)
    rounds[loss] = np.asarray(state.account.rounds)
    plain = int((state.length - np.array([3, 1])).max())
    assert plain == 40
    assert (rounds[loss] @ costs <= 1.05 * plain) == (loss == 0.05)
  # It drafts as soon as failing is affordable, and else always.
  assert 3 <= rounds[0.05][1] < rounds[1e6][1]
  assert rounds[1e6][0] == 0


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'lengths': ()}, 'draft lengths must be >= 0'),
    ({'lengths': (-1, 2)}, 'draft lengths must be >= 0'),
    ({'lengths': (3, 1)}, 'must ascend'),
    ({'lengths': (1, 1)}, 'must ascend'),
    ({'urgency': -1.0}, 'urgency must be >= 0'),
    ({'loss': -0.1}, 'loss must be >= 0'),
    ({'prior': (0.0,)}, 'prior must be inside'),
    ({'prior': ()}, 'prior must be inside'),
    ({'prior': (0.5, 1.0)}, 'prior must be inside'),
  ],
)
def test_impossible_schedules_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    schedule.Schedule(**fields)


def test_expected_tokens_is_the_sum_of_powers():
  for alpha in (0.0, 0.3, 0.9):
    for length in range(6):
      expected = sum(alpha**i for i in range(length + 1))
      got = cost_model.expected_tokens(alpha, length)
      np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(('promise', 'index'), [(1.04, 0), (1.06, 1)])
def test_a_draft_must_promise_a_margin(promise, index):
  plan = schedule.Schedule(lengths=(0, 1), prior=(0.5,), margin=0.05)
  estimate = schedule.init(1, 1)
  # With alpha 1/2 a draft of one emits 1.5 tokens.
  costs = jnp.asarray([1.0, 1.5 / promise])
  zero, one = jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32)
  chosen = schedule.choose(plan, estimate, zero, one, one, costs)
  assert int(chosen) == index


@pytest.mark.parametrize(('behind', 'index'), [(0, 1), (1, 0)])
def test_only_the_draft_of_a_row_that_is_behind_is_worth_a_round(behind, index):
  plan = schedule.Schedule(lengths=(0, 4), prior=(0.01, 0.9), urgency=16.0)
  # Row 0 has the good draft; a round of four costs less than it promises.
  kind, count = jnp.asarray([1, 0]), jnp.asarray([4, 4])
  remaining = jnp.where(jnp.arange(2) == behind, 60, 20)
  costs = jnp.asarray([1.0, 1.5])
  estimate = schedule.init(2, 2)
  chosen = schedule.choose(plan, estimate, kind, count, remaining, costs)
  assert int(chosen) == index
  alike = dataclasses.replace(plan, urgency=0.0)
  chosen = schedule.choose(alike, estimate, kind, count, remaining, costs)
  assert int(chosen) == 1
