"""Drafters: lists against prompt lookup, whole passes against chains."""

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import prefill
from efficiency_jax.decoding import sampling
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures

_DRAFTED = 5


def _lookup(text, shortest, longest):
  """Longest earlier match of the end of `text`, the latest; its size."""
  for size in range(min(longest, len(text) - 1), shortest - 1, -1):
    for end in range(len(text) - 1, size - 1, -1):
      if text[end - size : end] == text[-size:]:
        grown = list(text)
        while len(grown) < len(text) + _DRAFTED:
          grown.append(grown[end + len(grown) - len(text)])
        return grown[len(text) :], size
  return None, 0


_observe = jax.jit(
  lambda drafter, context: drafter.observe((), context, _DRAFTED),
  static_argnums=0,
)


@hypothesis.given(
  texts=st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=20),
    min_size=4,
    max_size=4,
  ),
  shortest=st.integers(1, 2),
)
def test_prompt_lookup_finds_the_longest_and_latest_match(texts, shortest):
  drafter = drafters.NGram(longest_match=4, shortest_match=shortest)
  context = fixtures.context(texts, room=24 - max(map(len, texts)))
  # What stands behind a text must not be read.
  behind = np.arange(24) >= np.asarray(context.length)[:, None]
  tokens = np.where(behind, 1, np.asarray(context.tokens))
  context = context._replace(tokens=jnp.asarray(tokens))
  state, forecast = _observe(drafter, context)
  proposal, kept, cache = drafter.propose(
    None, state, 'the cache', context, 3, sampling.Purpose.DRAFT
  )
  assert kept is state
  assert cache == 'the cache'
  assert proposal.logits is None
  chex.assert_shape(proposal.tokens, (4, 3))
  for row, text in enumerate(texts):
    draft, size = _lookup(text, shortest, 4)
    assert int(state.count[row]) == (_DRAFTED if draft else 0)
    assert int(proposal.count[row]) == (3 if draft else 0)
    assert 0 <= int(forecast.kind[row]) < drafter.num_kinds
    if draft:
      assert state.tokens[row].tolist() == draft
      assert proposal.tokens[row].tolist() == draft[:3]
      assert int(forecast.kind[row]) == size - shortest


@pytest.mark.parametrize(('shortest', 'longest'), [(0, 2), (3, 2), (-1, -1)])
def test_impossible_matches_are_refused(shortest, longest):
  with pytest.raises(ValueError, match='shortest_match must be in 1'):
    drafters.NGram(longest_match=longest, shortest_match=shortest)


_TARGET = fixtures.config()
_DRAFT = fixtures.config(num_layers=1)
_CUT = draft_model.Form(target=_TARGET, layers=(1,), vocabulary=7)
_TEXTS = [[1, 2, 3, 1, 2, 5], [7], [4, 9]]


@pytest.mark.parametrize('kind', ['draft model', 'few tokens', 'early exit'])
@pytest.mark.parametrize('purpose', list(sampling.Purpose)[:2])
def test_a_chain_draws_from_the_law_that_it_reports(kind, purpose):
  """q is the drafter's own processed law after every drafted prefix."""
  weights = drafters.Weights(
    fixtures.params(_TARGET), fixtures.params(_DRAFT, 1)
  )
  settings = sampling.make(
    3,
    temperature=[1.0, 0.0, 0.7],
    top_p=[1.0, 1.0, 0.9],
    repetition_penalty=[1.0, 1.3, 2.0],
  )
  context = fixtures.context(_TEXTS, room=10, settings=settings)
  cache = kv_cache.init(_TARGET, 3, 64)
  target = transformer.apply_fn(_TARGET)
  cache, _ = prefill.prefill(
    target, weights.target, context.tokens, context.length, cache
  )
  if kind == 'draft model':
    params = weights.draft
    drafter = drafters.DraftModel(
      apply=transformer.apply_fn(_DRAFT),
      init_cache=kv_cache.initializer(_DRAFT),
    )
  elif kind == 'few tokens':
    own = draft_model.init(_CUT, weights.target)
    vocabulary = jnp.asarray([3, 0, 9, 2, 10, 7, 5], jnp.int32)
    params = draft_model.weights(_CUT, own, weights.target, vocabulary)
    weights = drafters.Weights(weights.target, params)
    drafter = drafters.DraftModel(
      apply=draft_model.apply_fn(_CUT),
      init_cache=kv_cache.initializer(_CUT.config),
    )
  else:
    params = weights.target
    drafter = drafters.EarlyExit(
      apply=transformer.apply_fn(_TARGET.truncated(1))
    )

  def propose(context, cache):
    state = drafter.init(weights, context, 4)
    state, forecast = drafter.observe(state, context, 4)
    proposal, state, cache = drafter.propose(
      weights, state, cache, context, 4, purpose
    )
    return proposal, forecast, cache

  proposal, forecast, after = jax.jit(propose)(context, cache)
  assert proposal.count.tolist() == forecast.count.tolist() == [4] * 3
  # The target's cache is given back with its cursor where it was.
  assert after.length.tolist() == cache.length.tolist()
  apply = jax.jit(drafter.apply)
  for row, text in enumerate(_TEXTS):
    draft = proposal.tokens[row].tolist()
    whole = jnp.asarray([text + draft])
    logits = np.asarray(apply(params, whole)[0].logits[0])
    for i in range(4):
      q = fixtures.processed_probabilities(
        logits[len(text) - 1 + i],
        temperature=settings.temperature[row],
        top_p=float(settings.top_p[row]),
        penalty=float(settings.repetition_penalty[row]),
        seen=text + draft[:i],
      )
      got = np.asarray(jax.nn.softmax(proposal.logits[row, i]))
      np.testing.assert_allclose(got, q, atol=1e-5)
    # And each token is the draw of its place, from the reported law.
    places = jnp.asarray([[len(text) + i for i in range(4)]])
    start = None
    if purpose == sampling.Purpose.DRAFT:
      start = context.length[row : row + 1]
    keys = sampling.position_keys(
      context.keys[row : row + 1], places, purpose, start
    )
    drawn = sampling.draw(keys, proposal.logits[row : row + 1])
    assert drawn[0].tolist() == draft


def test_greedy_chains_need_no_law():
  weights = drafters.Weights(fixtures.params(_TARGET))
  context = fixtures.context(_TEXTS, room=10)
  config = _TARGET.truncated(1)
  drafter = drafters.EarlyExit(apply=transformer.apply_fn(config))
  cache, _ = prefill.prefill(
    transformer.apply_fn(_TARGET),
    weights.target,
    context.tokens,
    context.length,
    kv_cache.init(_TARGET, 3, 64),
  )
  proposal, _, _ = jax.jit(
    lambda cache: drafter.propose(
      weights, (), cache, context, 4, sampling.Purpose.SAMPLE
    )
  )(cache)
  assert proposal.logits is None
  expected = fixtures.plain_texts(config, weights.target, _TEXTS, 4)
  for row, text in enumerate(_TEXTS):
    assert text + proposal.tokens[row].tolist() == expected[row]


def test_nothing_drafts_nothing():
  context = fixtures.context(_TEXTS, room=10)
  drafter = drafters.Nothing()
  state, forecast = drafter.observe(drafter.init(None, context, 2), context, 2)
  proposal, _, _ = drafter.propose(
    None, state, None, context, 2, sampling.Purpose.DRAFT
  )
  chex.assert_shape(proposal.tokens, (3, 2))
  assert proposal.count.tolist() == forecast.count.tolist() == [0, 0, 0]


def test_drafters_are_static_arguments():
  make = lambda: drafters.DraftModel(
    apply=transformer.apply_fn(fixtures.config(num_layers=1)),
    init_cache=kv_cache.initializer(fixtures.config(num_layers=1)),
  )
  assert make() == make()
  assert hash(make()) == hash(make())
  assert drafters.NGram() == drafters.NGram()
  assert drafters.NGram() != drafters.NGram(longest_match=2)
