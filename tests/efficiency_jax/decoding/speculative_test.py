"""The loop against slow decoding without cache, draft or loop.

Every row of every generation is compared with `fixtures.plain_texts`, and what
the counters and traces say with a simulation of the rounds. One compiled
program serves many examples: shapes never change, and lengths, budgets, stop
tokens, settings, seeds and forced draft lengths are data.
"""

import functools

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import trees
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import prefill
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.decoding import verifiers
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures

_TARGET = fixtures.config()
_DRAFT = fixtures.config(num_layers=1)
_VOCAB = _TARGET.vocab_size
_SLOTS = 48  # of the token buffer, always
_ROWS = 3
_DRAFTERS = {
  'n-gram': drafters.NGram(longest_match=3),
  'draft model': drafters.DraftModel(
    apply=transformer.apply_fn(_DRAFT), init_cache=kv_cache.initializer(_DRAFT)
  ),
  'early exit': drafters.EarlyExit(
    apply=transformer.apply_fn(_TARGET.truncated(1))
  ),
  'plain': drafters.Nothing(),
}


_ADAPTING = {
  'prior': (0.5,),
  'prior_weight': 2.0,
  'decay': 0.85,
  'recovery': 0.995,
  'loss': 9.0,  # any length may be tried at once
}


def _weights(dtype=jnp.float32):
  return drafters.Weights(
    trees.cast(fixtures.params(_TARGET), dtype),
    trees.cast(fixtures.params(_DRAFT, 1), dtype),
  )


def _decoder(drafter, verifier, *lengths, config=_TARGET, **choices):
  drafter = _DRAFTERS.get(drafter, drafter)
  return speculative.Decoder(
    apply=transformer.apply_fn(config),
    drafter=drafter,
    verifier=verifiers.named(verifier),
    schedule=schedule.Schedule(lengths=lengths, **{**_ADAPTING, **choices}),
  )


def _generate(decoder, prompts, budget, config=_TARGET, **options):
  """A finished state whose buffer has `_SLOTS` slots, so that shapes agree."""
  begin, run = _start(decoder, prompts, budget, config, **options)
  return run(begin)


def _start(
  decoder,
  prompts,
  budget,
  config=_TARGET,
  weights=None,
  slots=_SLOTS,
  **options,
):
  budget = np.broadcast_to(budget, (len(prompts),))
  longest = max(len(p) for p in prompts)
  ran = {
    name: options.pop(name)
    for name in ('max_rounds', 'forced', 'costs')
    if name in options
  }
  weights = weights or _weights()
  extra = slots - longest - int(budget.max()) - decoder.slack
  assert extra >= 0
  options.setdefault('stop', (-1, -1))
  begin = fixtures.begin(
    decoder, weights, config, prompts, budget, extra=extra, **options
  )
  return begin, functools.partial(fixtures.proceed, decoder, weights, **ran)


_WARM = {'temperature': [0.0, 1.0, 0.7]}
_MIXED = {**_WARM, 'top_p': [1.0, 1.0, 0.9]}


def _settings(**fields):
  return sampling.make(_ROWS, **fields)


def _plain(prompts, budget, **options):
  budget = np.broadcast_to(budget, (len(prompts),))
  room = _SLOTS - max(len(p) for p in prompts)
  return fixtures.plain_texts(
    _TARGET, fixtures.params(_TARGET), prompts, budget, room=room, **options
  )


# A simulation of the rounds of one row, given the text that must come out.


def _copied(text: list[int], longest: int, length: int) -> list[int]:
  """Prompt lookup as its docstring tells it, with lists."""
  for size in range(min(longest, len(text) - 1), 0, -1):
    for end in range(len(text) - 1, size - 1, -1):
      if text[end - size : end] == text[-size:]:
        grown = list(text)
        while len(grown) < len(text) + length:
          grown.append(grown[end + len(grown) - len(text)])
        return grown[len(text) :]
  return []


def _simulate(text, prompt_size, drafted, draft_of):
  """Counters and traces of a rule that follows `text`."""
  seen = {'runs': 0, 'drafted': 0, 'accepted': 0}
  tested_at, accepted_at = np.zeros((2, drafted), int)
  accepted_draft, run, refused = [], [], []
  length = prompt_size
  while length < len(text):
    draft = draft_of(text[:length])
    n = 0
    while n < len(draft) and text[length + n : length + n + 1] == [draft[n]]:
      n += 1
    left = len(text) - length
    committed = min(n + 1, left)
    kept = min(n, left)
    # Beyond the end of the text no draft was kept or refused.
    is_cut = committed <= n
    seen['runs'] += 1
    seen['drafted'] += kept if is_cut else len(draft)
    seen['accepted'] += kept
    accepted_at[:kept] += 1
    tested_at[: kept if is_cut else min(n + 1, len(draft))] += 1
    accepted_draft += [i < n for i in range(committed)]
    run += [seen['runs']] * committed
    refused += [-1] * kept
    if not is_cut:
      refused.append(draft[n] if n < len(draft) else -1)
    length += committed
  return seen, tested_at, accepted_at, accepted_draft, run, refused


def _check_consistent(state, prompts):
  """What must hold of counters and traces whatever the rule."""
  c = jax.tree.map(np.asarray, state.counters)
  for row, prompt in enumerate(prompts):
    span = slice(len(prompt), int(state.length[row]))
    run = np.asarray(state.run)[row, span]
    accepted = np.asarray(state.accepted_draft)[row, span]
    refused = np.asarray(state.refused)[row, span]
    # Each pass of the target committed something; the sum of all is the text.
    passes = range(1, c.runs[row] + 1)
    assert sorted(set(run.tolist())) == list(passes)
    assert (np.diff(run) >= 0).all()
    assert accepted.sum() == c.accepted[row] <= c.drafted[row]
    assert c.accepted_at[row].sum() == c.accepted[row]
    assert (c.tested_at[row] >= c.accepted_at[row]).all()
    assert (c.tested_at[row, 1:] <= c.accepted_at[row, :-1]).all()
    assert c.tested_at[row, :1].sum() <= c.runs[row]
    # Drafts first, then at most one token of the target.
    for index in passes:
      assert accepted[run == index][:-1].all()
    own = sum(not accepted[run == index][-1] for index in passes)
    assert len(run) == c.accepted[row] + own
    tests = c.tested_at[row].sum()
    assert (refused >= 0).sum() == tests - c.accepted[row]
    assert not (accepted & (refused >= 0)).any()


_prompt = st.lists(st.integers(0, _VOCAB - 1), min_size=1, max_size=12)


@st.composite
def _request(draw):
  return {
    'prompts': draw(st.lists(_prompt, min_size=_ROWS, max_size=_ROWS)),
    'budget': draw(
      st.lists(st.integers(0, 24), min_size=_ROWS, max_size=_ROWS)
    ),
    'seed': draw(st.integers(0, 1000)),
    # Stop tokens that are frequent and that are not.
    'stop': (draw(st.integers(-1, _VOCAB - 1)), draw(st.integers(-1, 3))),
  }


@pytest.mark.parametrize('verifier', ['greedy', 'coupled'])
@pytest.mark.parametrize('drafter', list(_DRAFTERS))
def test_text_and_counters_are_those_of_plain_decoding(drafter, verifier):
  """Greedy text, or the text of plain sampling with the same seed."""
  drafted = 0 if drafter == 'plain' else 4
  decoder = _decoder(drafter, verifier, drafted)

  @hypothesis.given(_request())
  @hypothesis.example(
    {
      # One row ends at once, one is long, one has a one-token prompt; a buffer
      # that is full to its limit.
      'prompts': [[1, 2, 3] * 4, [5], [4, 4, 4]],
      'budget': [0, 24, _SLOTS - 24 - 17],
      'seed': 3,
      'stop': (-1, -1),
    }
  )
  def check(request):
    prompts, budget = request['prompts'], request['budget']
    options = {k: request[k] for k in ('seed', 'stop')}
    if verifier == 'coupled':
      options['settings'] = _settings(**_MIXED)
    expected = _plain(prompts, budget, **options)
    state = _generate(decoder, prompts, budget, **options)
    assert fixtures.texts(state) == expected
    assert np.asarray(state.done).all()
    _check_consistent(state, prompts)
    if drafter in ('n-gram', 'plain'):
      copied = lambda text: _copied(text, 3, 4)
      draft_of = copied if drafter == 'n-gram' else lambda text: []
      _check_simulated(state, prompts, expected, drafted, draft_of)

  check()


def _check_simulated(state, prompts, expected, drafted, draft_of):
  c = state.counters
  for row, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
    simulated = _simulate(text, len(prompt), drafted, draft_of)
    seen, tested_at, accepted_at, accepted, run, refused = simulated
    got = {name: int(getattr(c, name)[row]) for name in seen}
    assert got == seen
    assert c.tested_at[row].tolist() == tested_at.tolist()
    assert c.accepted_at[row].tolist() == accepted_at.tolist()
    span = slice(len(prompt), len(text))
    assert state.accepted_draft[row, span].tolist() == accepted
    assert state.run[row, span].tolist() == run
    assert state.refused[row, span].tolist() == refused


_PROMPTS = [[1, 2, 3, 1, 2], [7], [4, 9, 9, 4, 9, 9, 4]]


@pytest.mark.parametrize('verifier', ['token', 'block'])
def test_sampled_rounds_count_right_and_greedy_rows_are_exact(verifier):
  decoder = _decoder('early exit', verifier, 3)
  settings = _settings(**_MIXED)
  plain = _plain(_PROMPTS, 20)
  for seed in range(8):
    state = _generate(decoder, _PROMPTS, 20, settings=settings, seed=seed)
    _check_consistent(state, _PROMPTS)
    assert fixtures.texts(state)[0] == plain[0]


@pytest.mark.parametrize(
  ('drafter', 'costs'),
  [('n-gram', {0: 1.0, 2: 1.2, 4: 1.5}), ('draft model', {1: 1.0, 4: 1.25})],
)
def test_coupled_text_is_plain_text_whatever_the_draft_length(drafter, costs):
  """Also in another batch, in pieces, and where the length adapts."""
  decoder = _decoder(drafter, 'coupled', *costs)
  costs = list(costs.values())
  settings = _settings(**_MIXED)
  expected = _plain(_PROMPTS, 24, settings=settings, seed=5)
  generate = functools.partial(
    _generate, decoder, _PROMPTS, 24, settings=settings, seed=5
  )
  for forced in range(len(costs)):
    state = generate(forced=forced)
    assert fixtures.texts(state) == expected
    chosen = np.asarray(state.account.rounds)
    assert chosen[forced] == chosen.sum() > 0
  # Adaptive: several lengths were used, and the text stays.
  state = generate(costs=costs)
  assert fixtures.texts(state) == expected
  assert (np.asarray(state.account.rounds) > 0).sum() >= 2
  _check_consistent(state, _PROMPTS)

  # In pieces of two rounds, the whole state is the same.
  begin, run = _start(
    decoder, _PROMPTS, 24, settings=settings, seed=5, costs=costs
  )
  pieces = 0
  while not np.asarray(begin.done).all():
    begin, pieces = run(begin, max_rounds=2), pieces + 1
  assert pieces > 2
  chex.assert_trees_all_equal(_visible(begin), _visible(state))

  # The order of the rows, and what stands beside them, does not matter.
  turned = lambda x: [x[i] for i in (2, 0, 1)]
  state = _generate(
    decoder,
    turned(_PROMPTS),
    24,
    seed=5,
    rows=np.array([2, 0, 1]),
    forced=len(costs) - 1,
    settings=_settings(**{k: turned(v) for k, v in _MIXED.items()}),
  )
  assert fixtures.texts(state) == turned(expected)


def _visible(state):
  """What a reader of a state may rely on."""
  live = np.arange(state.tokens.shape[1]) < np.asarray(state.length)[:, None]
  masked = lambda x: np.where(live, np.asarray(x), -1)
  traces = (state.tokens, state.accepted_draft, state.run, state.refused)
  return [masked(x) for x in traces] + [
    state.length,
    state.done,
    state.counters,
    state.account,
    state.estimate,
  ]


def test_a_row_alone_in_a_wider_buffer_is_the_row_in_the_batch():
  decoder = _decoder('n-gram', 'coupled', 4)
  settings = _settings(**_MIXED)
  expected = _plain(_PROMPTS, 24, settings=settings, seed=5)
  one = sampling.make(1, temperature=[0.7], top_p=[0.9])
  state = _generate(
    decoder,
    _PROMPTS[2:],
    24,
    seed=5,
    rows=np.array([2]),
    settings=one,
    slots=61,
  )
  assert fixtures.texts(state) == expected[2:]


# Of the mixed batch one row is greedy: there coupled rounds are greedy ones.
@pytest.mark.parametrize(
  'verifier',
  [pytest.param('greedy', marks=pytest.mark.slow), 'block', 'coupled'],
)
def test_a_draft_by_the_target_itself_is_always_accepted(verifier):
  """Also behind rounds without a draft: the drafter must not miss tokens."""
  drafter = drafters.DraftModel(
    apply=transformer.apply_fn(_TARGET),
    init_cache=kv_cache.initializer(_TARGET),
  )
  decoder = _decoder(drafter, verifier, 0, 3)
  target = fixtures.params(_TARGET)
  weights = drafters.Weights(target, target)
  settings = None if verifier == 'greedy' else _settings(**_MIXED)
  begin, run = _start(
    decoder, _PROMPTS, 35, settings=settings, weights=weights, slots=64
  )
  state = run(begin, max_rounds=3, forced=1)
  assert state.counters.accepted.tolist() == [9] * _ROWS
  state = run(state, max_rounds=6, forced=0)
  assert state.length.tolist() == [len(p) + 18 for p in _PROMPTS]
  state = run(state, forced=1)
  c = state.counters
  assert c.drafted.tolist() == c.accepted.tolist()
  # 4 a round, but for one token at the end and the six rounds without drafts.
  assert c.runs.tolist() == [3 + 6 + 5] * _ROWS
  assert c.accepted.tolist() == [9 + 13] * _ROWS


def test_bfloat16_text_is_that_of_plain_decoding_of_the_same_width():
  """Bit for bit: the products have the same shapes."""
  weights = _weights(jnp.bfloat16)
  draft_model = drafters.DraftModel(
    apply=transformer.apply_fn(_DRAFT),
    init_cache=kv_cache.initializer(_DRAFT, jnp.bfloat16),
  )
  settings = _settings(**_WARM)
  found = {}
  for name, drafter in {**_DRAFTERS, 'draft model': draft_model}.items():
    state = _generate(
      _decoder(drafter, 'coupled', 3),
      _PROMPTS,
      30,
      weights=weights,
      settings=settings,
      dtype=jnp.bfloat16,
      seed=1,
    )
    found[name] = fixtures.texts(state)
    # The cached keys and values are equal in every bit as well.
    for row, text in enumerate(found[name]):
      found[name, row] = [
        np.asarray(x[row, :, : len(text) - 1], np.float32)
        for x in (*state.cache.keys, *state.cache.values)
      ]
  plain = found.pop('plain')
  for name, text in found.items():
    if isinstance(name, str):
      assert text == plain
    else:
      chex.assert_trees_all_equal(text, found['n-gram', name[1]])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_logits_of_equal_width_are_equal_in_every_bit(dtype):
  """A token's logits depend neither on its slot nor on what stands behind."""
  apply = jax.jit(transformer.apply_fn(_TARGET))
  params = trees.cast(fixtures.params(_TARGET), dtype)
  rng = np.random.default_rng(0)
  text = jnp.asarray(rng.integers(0, _VOCAB, (4, 24)), jnp.int32)
  cache = kv_cache.init(_TARGET, 4, 64, dtype)
  behind = jnp.asarray([0, 3, 1, 2], jnp.int32)  # ragged cursors

  one_by_one, step_cache = [], cache
  for i in range(20):
    fed = jnp.pad(text[:, i : i + 1], ((0, 0), (0, 3)))
    output, step_cache = apply(params, fed, step_cache)
    step_cache = kv_cache.roll_back(step_cache, step_cache.length - 3)
    one_by_one.append(output.logits[:, 0])
  blocks = []
  for i in range(0, 20, 4):
    output, cache = apply(params, text[:, i : i + 4], cache)
    blocks.append(output.logits)
  one_by_one = np.stack(one_by_one, 1)
  np.testing.assert_array_equal(one_by_one, np.concatenate(blocks, 1))
  cache = kv_cache.roll_back(cache, behind)
  ragged = apply(
    params,
    jnp.take_along_axis(text, behind[:, None] + jnp.arange(4), axis=1),
    cache,
  )[0].logits
  for row, first in enumerate(behind.tolist()):
    np.testing.assert_array_equal(
      ragged[row], one_by_one[row, first : first + 4]
    )


def test_the_draft_length_is_chosen_before_the_draft():
  """With other noise, the same history gives the same choice."""
  adapting = {'prior': (0.6,), 'decay': 0.5, 'urgency': 0.0}
  decoder = _decoder('draft model', 'block', 1, 4, **adapting)
  settings = _settings(temperature=1.2)
  costs = [1.0, 1.45]
  begin, run = _start(
    decoder, _PROMPTS, 24, settings=settings, costs=costs, seed=0
  )
  used = set()
  for rounds in range(1, 6):
    chosen = []
    for seed in range(4):
      state, _ = _start(decoder, _PROMPTS, 24, settings=settings, seed=0)
      state = run(state, max_rounds=rounds)
      before = np.asarray(state.account.rounds)
      # The history is that of seed 0; the next noise is not.
      keys = sampling.row_keys(seed, jnp.arange(_ROWS))
      state = run(state._replace(keys=keys), max_rounds=1)
      after = np.asarray(state.account.rounds)
      chosen.append((after - before).argmax())
    assert len(set(chosen)) == 1
    used.update(chosen)
  assert len(used) > 1


def test_no_program_is_compiled_again_for_another_request():
  decoder = _decoder('n-gram', 'coupled', 4)
  sizes = []
  for prompts, temperature, forced, stop in (
    (_PROMPTS, 1.0, -1, (-1, -1)),
    ([[3], [1] * 12, [2, 5]], 0.4, 0, (7, -1)),
    ([[3], [1], [2]], 2.0, 0, (2, -1)),
  ):
    settings = _settings(temperature=[0.0, temperature, 1.0], top_p=0.8)
    options = {'forced': forced, 'stop': stop, 'seed': forced}
    _generate(decoder, prompts, 10, settings=settings, max_rounds=7, **options)
    programs = prefill.prefill, speculative._first_state, speculative.run
    sizes.append([program._cache_size() for program in programs])
  assert sizes[0] == sizes[1] == sizes[2]
  # An equal decoder, built anew, is the same static argument.
  assert _decoder('n-gram', 'coupled', 4) == decoder
  assert hash(_decoder('n-gram', 'coupled', 4)) == hash(decoder)


def test_a_decoder_with_a_drafter_needs_a_draft_length():
  with pytest.raises(ValueError, match='draft length must be >= 1'):
    _decoder('n-gram', 'greedy', 0)
  assert _decoder('n-gram', 'greedy', 0, 5).slack == 6
