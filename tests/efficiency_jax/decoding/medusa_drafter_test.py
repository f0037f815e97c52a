"""Guesses of Medusa's heads as trees of tokens, through the real loop."""

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import medusa_drafter
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding import verifiers
from efficiency_jax.decoding.dynamic_tree import Growth
from efficiency_jax.evaluation import speed
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.decoding import draft_tables
from tests.efficiency_jax.decoding import medusa_models

_TARGET = medusa_models.TARGET
_VOCAB = _TARGET.vocab_size
_SLOTS = 64
_PROMPTS = [[1, 2, 3, 1, 2], [7], [4, 9, 9, 4, 9, 9, 4]]
_MIXED = {'temperature': [0.0, 1.0, 0.7], 'top_p': [1.0, 1.0, 0.9]}
_TREE = token_tree.from_choices(
  [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1), (1, 0, 0)]
)
_GROWTH = Growth(nodes=8, expand=3, height=3)
_HEADS = medusa_models.FORMS[0]
_FEW = medusa_models.FORMS[-1]  # with a vocabulary, and a bias


def _weights(heads=_HEADS):
  return medusa_models.weights(heads)


def _drafter(heads, *trees, least=0.0):
  choices = {'trees': trees, 'least_chance': least}
  head = transformer.head_fn(_TARGET)
  return medusa_drafter.Medusa(heads=heads, output_head=head, **choices)


def _decoder(verifier, *trees, drafter=None, heads=_HEADS, **options):
  drafter = drafter or _drafter(heads, *trees)
  lengths = tuple(sorted(len(tree) - 1 for tree in trees))
  return speculative.Decoder(
    apply=transformer.apply_fn(_TARGET, layers=heads.layers),
    drafter=drafter,
    verifier=verifiers.named(verifier),
    schedule=schedule.Schedule(lengths=options.get('lengths', lengths)),
  )


def _generate(decoder, prompts, budget, weights=None, **options):
  budget = np.broadcast_to(budget, (len(prompts),))
  longest = max(map(len, prompts)) + int(budget.max())
  extra = _SLOTS - longest - decoder.slack
  return fixtures.generate(
    decoder,
    weights or _weights(getattr(decoder.drafter, 'heads', _HEADS)),
    _TARGET,
    prompts,
    budget,
    extra=extra,
    **{'stop': (-1, -1), **options},
  )


def _plain(prompts, budget, **options):
  room = _SLOTS - max(map(len, prompts))
  params = fixtures.params(_TARGET)
  return fixtures.plain_texts(
    _TARGET, params, prompts, budget, room=room, **options
  )


@pytest.mark.parametrize(
  'heads', medusa_models.FORMS[3::2] + medusa_models.FORMS[6:], ids=str
)
def test_confidence_is_the_formula_and_ends_chains(heads):
  """Tokens count while reaching and keeping them is likely enough."""
  weights = _weights(heads)
  shape = 3, 9, medusa_models.hidden_width(heads)
  states = np.random.default_rng(1).standard_normal(shape)
  context = fixtures.context(_PROMPTS, room=30)

  def draft(least, length=3):
    drafter = _drafter(heads, token_tree.chain(3), _TREE, least=least)
    begun = drafter.init(weights, context, 9, jnp.asarray(states, jnp.float32))
    arguments = weights, begun, (), context, length
    return drafter.propose(*arguments, sampling.Purpose.SAMPLE)[0]

  drafted = jax.jit(draft, static_argnums=0)(0.0)
  assert drafted.count.tolist() == [3] * 3
  chances = np.ones((3, 4))
  for row, prompt in enumerate(_PROMPTS):
    hidden = states[row, len(prompt) - 2] * (len(prompt) > 1)
    before = [prompt[-1], *drafted.tokens[row].tolist()]
    for k in (1, 2, 3):
      trust = medusa_models.trust(heads, hidden, k, before[k - 1], before[0])
      chances[row, k] = chances[row, k - 1] * trust
  chances = chances[:, 1:]
  limits = [*(0.999 * chances.ravel()), *(1.001 * chances.ravel())]
  cuts, tree = jax.jit(
    lambda: ([draft(float(x)) for x in limits], draft(0.9, length=9))
  )()
  for least, cut in zip(limits, cuts, strict=True):
    np.testing.assert_array_equal(cut.tokens, drafted.tokens)
    assert cut.count.tolist() == (chances >= least).sum(axis=1).tolist()
  assert tree.count.tolist() == [9] * 3


@pytest.mark.parametrize('heads', medusa_models.FORMS, ids=str)
@pytest.mark.parametrize('shuffled', [False, True])
def test_guesses_stand_where_the_tree_has_a_place_for_them(heads, shuffled):
  """Children of a node at depth k - 1 are the best guesses of head k there."""
  tree = _TREE
  if shuffled:  # parents before children, but not level by level
    tree = token_tree.TokenTree((-1, 0, 1, 2, 0, 1, 4, 2, 0, 6))
  drafter = _drafter(heads, tree)
  weights = _weights(heads)
  shape = 3, 9, medusa_models.hidden_width(heads)
  states = np.random.default_rng(1).standard_normal(shape)
  states = jnp.asarray(states, jnp.float32)
  context = fixtures.context(_PROMPTS, room=30)

  @jax.jit
  def draft():
    begun = drafter.init(weights, context, 9, states)
    arguments = weights, begun, (), context, 9
    return begun, *drafter.propose(*arguments, sampling.Purpose.SAMPLE)

  begun, proposal, state, cache = draft()
  chex.assert_trees_all_equal(state, begun)
  assert cache == ()
  assert proposal.count.tolist() == [9] * 3
  states = np.asarray(states)
  for row, prompt in enumerate(_PROMPTS):
    hidden = states[row, len(prompt) - 2] * (len(prompt) > 1)
    tokens = [prompt[-1], *proposal.tokens[row].tolist()]
    for node in range(1, 10):
      parent = tokens[tree.parents[node]]
      scores = medusa_models.formula(
        heads, hidden, tree.depth[node], parent, tokens[0]
      )
      best = np.argsort(-scores)[tree.rank[node]]
      if heads.vocabulary is not None:
        best = medusa_models.VOCABULARY[best]
      assert tokens[node] == best


@pytest.mark.parametrize('heads', medusa_models.FORMS, ids=str)
def test_a_growing_tree_keeps_the_best_paths(heads):
  """By the product of what the heads think along them."""
  drafter = _drafter(heads, _GROWTH)
  weights = _weights(heads)
  shape = 3, 9, medusa_models.hidden_width(heads)
  states = np.random.default_rng(1).standard_normal(shape)
  context = fixtures.context(_PROMPTS, room=30)

  @jax.jit
  def draft():
    begun = drafter.init(weights, context, 8, jnp.asarray(states, jnp.float32))
    arguments = weights, begun, (), context, 8
    return drafter.propose(*arguments, sampling.Purpose.SAMPLE)[0]

  proposal = draft()
  assert proposal.count.tolist() == [8] * 3
  for row, prompt in enumerate(_PROMPTS):
    hidden = states[row, len(prompt) - 2] * (len(prompt) > 1)

    if not (hidden.any() or heads.token or heads.markov):
      continue  # all guesses are worth the same

    def chance(path, hidden=hidden, last=prompt[-1]):
      before = path[-1] if path else last
      scores = medusa_models.formula(heads, hidden, len(path) + 1, before, last)
      q = np.exp(scores - scores.max())
      if heads.vocabulary is None:
        return q / q.sum()
      wide = np.zeros(_VOCAB)
      wide[medusa_models.VOCABULARY] = q / q.sum()
      return wide

    parents = proposal.parents[row].tolist()
    found = draft_tables.paths(proposal.tokens[row], parents)
    assert set(found) == set(draft_tables.best_paths(_GROWTH, chance))


def test_trees_that_do_not_suit_the_heads_are_refused():
  with pytest.raises(ValueError, match='height 3 needs as many heads, got 2'):
    medusa_drafter.Medusa(
      heads=medusa.Heads(count=2), output_head=None, trees=(_TREE,)
    )
  tall = Growth(nodes=4, expand=2, height=4)
  with pytest.raises(ValueError, match='height 4 needs as many heads, got 3'):
    _drafter(_HEADS, tall)
  with pytest.raises(ValueError, match='trees must be given'):
    _drafter(_HEADS)
  with pytest.raises(ValueError, match='least_chance 0.5 needs heads with'):
    _drafter(_HEADS, _TREE, least=0.5)
  with pytest.raises(ValueError, match='differ in size'):
    medusa_drafter.Medusa(heads=_HEADS, output_head=None, trees=(_TREE, _TREE))
  few = medusa.Heads(count=3, vocabulary=2)
  with pytest.raises(ValueError, match='at most 2 children, .* a tree with 3'):
    medusa_drafter.Medusa(heads=few, output_head=None, trees=(_TREE,))
  with pytest.raises(ValueError, match="verifier 'block' takes no trees"):
    _decoder('block', _TREE)
  with pytest.raises(ValueError, match='no tree has 4 tokens'):
    _decoder('greedy', _TREE).drafter.tree(4)


# The loop.

_prompt = st.lists(st.integers(0, _VOCAB - 1), min_size=1, max_size=10)


@pytest.mark.parametrize(
  ('verifier', 'heads', 'tree'),
  [
    # Rows of the last cases are greedy; plain heads adapt below.
    pytest.param('greedy', _FEW, _TREE, marks=pytest.mark.slow, id='greedy'),
    pytest.param(
      'coupled', _HEADS, _TREE, marks=pytest.mark.slow, id='plain heads'
    ),
    pytest.param('coupled', _FEW, _TREE, id='coupled'),
    pytest.param('coupled', _FEW, _GROWTH, id='growing'),
  ],
)
def test_text_is_that_of_plain_decoding(verifier, heads, tree):
  decoder = _decoder(verifier, tree, heads=heads)
  settings = sampling.make(3, **_MIXED) if verifier == 'coupled' else None

  @hypothesis.given(
    st.lists(_prompt, min_size=3, max_size=3),
    st.lists(st.integers(0, 24), min_size=3, max_size=3),
    st.tuples(st.integers(-1, _VOCAB - 1), st.integers(-1, 3)),
    st.integers(0, 100),
  )
  @hypothesis.settings(max_examples=10)
  @hypothesis.example(_PROMPTS, [24, 0, 24], (-1, -1), 3)
  def check(prompts, budget, stop, seed):
    options = {'stop': stop, 'seed': seed, 'settings': settings}
    expected = _plain(prompts, budget, **options)
    state = _generate(decoder, prompts, budget, **options)
    assert fixtures.texts(state) == expected
    c = jax.tree.map(np.asarray, state.counters)
    for row, (prompt, text) in enumerate(zip(prompts, expected, strict=True)):
      span = slice(len(prompt), len(text))
      accepted = np.asarray(state.accepted_draft)[row, span]
      assert accepted.sum() == c.accepted[row] == c.accepted_at[row].sum()
      assert c.drafted[row] <= c.runs[row] * (len(tree) - 1)
      assert len(text) - len(prompt) <= c.accepted[row] + c.runs[row]
      assert (c.tested_at[row, 1:] <= c.accepted_at[row, :-1]).all()
      refused = np.asarray(state.refused)[row, span]
      refused = refused[refused >= 0]
      assert len(refused) == (c.tested_at - c.accepted_at)[row].sum()
      if heads.vocabulary is not None:
        drafted = {*refused, *np.asarray(text)[span][accepted]}
        assert drafted <= set(medusa_models.VOCABULARY)

  check()


@pytest.mark.parametrize(
  ('verifier', 'least'),
  [
    # Rows of the last case are greedy, and its chains end.
    pytest.param('greedy', 0.0, marks=pytest.mark.slow),
    pytest.param('greedy', 0.3, marks=pytest.mark.slow),
    pytest.param('coupled', 0.0, marks=pytest.mark.slow),
    ('coupled', 0.3),
  ],
)
def test_text_does_not_depend_on_where_chains_end(verifier, least):
  heads = _FEW
  mixed = sampling.make(3, **_MIXED)
  options = {'settings': mixed if verifier == 'coupled' else None, 'seed': 4}
  drafter = _drafter(heads, token_tree.chain(3), least=least)
  shape = token_tree.chain(3)
  decoder = _decoder(verifier, shape, drafter=drafter, heads=heads)
  state = _generate(decoder, _PROMPTS, 24, **options)
  assert fixtures.texts(state) == _plain(_PROMPTS, 24, **options)
  # Whole chains are put in every round but the last of a row.
  runs, drafted = (np.asarray(x) for x in state.counters[:2])
  assert (drafted.sum() >= 3 * (runs - 1).sum()) == (least == 0)


@pytest.mark.parametrize('node', [0, 2, 5, 9])
def test_the_accepted_path_is_kept_and_the_cache_is_that_of_a_text(node):
  """Whichever path is right; keys and values stand where decoding puts them."""
  texts = _plain(_PROMPTS, 26)
  decoder = _decoder('greedy', _TREE, drafter=medusa_models.Knowing(_TREE))
  weights = medusa_models.knowing(texts, _TREE.ancestors[node])
  state = _generate(decoder, _PROMPTS, 20, weights)
  expected = [t[: len(p) + 20] for t, p in zip(texts, _PROMPTS, strict=True)]
  assert fixtures.texts(state) == expected
  depth = int(_TREE.depth[node])
  rounds = -(-20 // (depth + 1))
  assert state.counters.runs.tolist() == [rounds] * 3
  # The last round is cut at the budget.
  accepted = 20 // (depth + 1) * depth + 20 % (depth + 1)
  assert state.counters.accepted.tolist() == [accepted] * 3
  plain = _generate(
    _decoder('greedy', drafter=drafters.Nothing(), lengths=(0,)), _PROMPTS, 20
  )
  caches = jax.tree.map(np.asarray, (state.cache, plain.cache))
  for row, text in enumerate(expected):
    for got, right in zip(
      *(cache.keys + cache.values for cache in caches), strict=True
    ):
      seen = slice(0, len(text) - 1)
      np.testing.assert_allclose(
        got[row, :, seen], right[row, :, seen], atol=1e-5
      )


class _Branching(token_tree.TokenTree):
  """A chain that goes the way of trees."""

  is_chain = False


def test_a_tree_with_one_path_is_the_chain():
  # Two right, one wrong.
  weights = medusa_models.knowing(_plain(_PROMPTS, 30), np.arange(4) < 3)
  states = []
  for shape in (token_tree.chain(3), _Branching((-1, 0, 1, 2))):
    decoder = _decoder('greedy', shape, drafter=medusa_models.Knowing(shape))
    state = _generate(decoder, _PROMPTS, 20, weights)
    states.append(
      [
        fixtures.texts(state),
        state.counters,
        *(
          np.where(np.asarray(state.run) > 0, x, 0)
          for x in (state.accepted_draft, state.run, state.refused)
        ),
      ]
    )
  chex.assert_trees_all_equal(*states)


def test_trees_adapt_and_stop_at_plain_decoding():
  small = token_tree.from_choices([(0,), (1,)])
  decoder = _decoder('coupled', _TREE, small, lengths=(0, 2, 9))
  settings = sampling.make(3, **_MIXED)
  expected = _plain(_PROMPTS, 24, settings=settings, seed=5)
  for forced in range(3):
    state = _generate(
      decoder, _PROMPTS, 24, settings=settings, seed=5, forced=forced
    )
    assert fixtures.texts(state) == expected
    chosen = state.account.rounds
    assert int(chosen[forced]) == chosen.sum()


def test_a_repetition_penalty_follows_each_branch():
  """What stands on other branches was not said."""
  settings = sampling.make(3, **_MIXED, repetition_penalty=1.7)
  options = {'settings': settings, 'seed': 2}
  texts = _plain(_PROMPTS, 30, **options)
  decoder = _decoder('coupled', _TREE, drafter=medusa_models.Knowing(_TREE))
  weights = medusa_models.knowing(texts, _TREE.ancestors[-1])  # the deepest
  state = _generate(decoder, _PROMPTS, 24, weights, **options)
  expected = [t[: len(p) + 24] for t, p in zip(texts, _PROMPTS, strict=True)]
  assert fixtures.texts(state) == expected
  assert state.counters.runs.tolist() == [24 // (_TREE.height + 1)] * 3


def test_the_state_that_drafts_is_that_of_the_text():
  """Guesses come from the position before the last committed token."""
  # The loop of another test: it is compiled once.
  decoder = _decoder('coupled', _TREE, heads=_FEW)
  settings = sampling.make(3, **_MIXED)
  apply = jax.jit(transformer.apply_fn(_TARGET, layers=_FEW.layers))
  for rounds in (0, 1, 4):
    state = _generate(
      decoder, _PROMPTS, 24, settings=settings, max_rounds=rounds
    )
    output, _ = apply(_weights().target, state.tokens)
    hidden, got = np.asarray(output.hidden), np.asarray(state.draft.hidden)
    for row, text in enumerate(fixtures.texts(state)):
      right = hidden[row, len(text) - 2] if len(text) > 1 else 0
      np.testing.assert_allclose(got[row], right, atol=1e-5)


def test_a_round_of_a_tree_copies_no_cache():
  decoder = _decoder('greedy', _TREE)
  weights = _weights()
  state = jax.eval_shape(
    lambda: fixtures.begin(decoder, weights, _TARGET, _PROMPTS, 170)
  )
  cache = state.cache.keys[0].shape
  arguments = (
    decoder,
    weights,
    state,
    jnp.int32(9),
    jnp.ones(1),
    jnp.int32(0),
    jnp.bool_(False),
  )
  program = speculative.run.lower(*arguments).compile().as_text()
  found = speed.loop_operations(program)
  assert found
  assert not found['copy', cache]


# Typical acceptance.


def test_typical_acceptance_is_that_of_the_paper():
  rng = np.random.default_rng(0)
  shape = (40, len(_TREE), _VOCAB)
  logits = 2 * rng.standard_normal(shape).astype(np.float32)
  tokens = rng.integers(0, 4, (40, len(_TREE) - 1)).astype(np.int32)
  verdict = jax.jit(verifiers.TYPICAL.verify, static_argnums=4)(
    sampling.row_keys(0, jnp.arange(40)),
    jnp.arange(40),
    jnp.asarray(logits),
    verifiers.Proposal(jnp.asarray(tokens), jnp.full((40,), 9), None),
    _TREE,
  )
  verdict = jax.tree.map(np.asarray, verdict)
  depths = set()
  for row in range(40):
    p = np.exp(logits[row] - logits[row].max(-1, keepdims=True), dtype=float)
    p /= p.sum(-1, keepdims=True)
    bound = np.minimum(0.09, 0.3 * np.exp((p * np.log(p)).sum(-1)))
    best = (0, 0.0, 0)
    for node in range(len(_TREE)):
      way = _TREE.paths[node][: _TREE.depth[node] + 1]
      chances = [
        (p[a, tokens[row, b - 1]], bound[a])
        for a, b in zip(way[:-1], way[1:], strict=True)
      ]
      if all(chance > limit for chance, limit in chances):
        weight = sum(np.log(chance) for chance, _ in chances)
        best = max(best, (len(chances), weight, -node))
    assert verdict.num_accepted[row] == best[0]
    if best[0]:
      assert verdict.node[row] == -best[2]
    depths.add(best[0])
  assert depths >= {0, 1, 2}


def test_typical_greedy_rows_are_exact():
  decoder = _decoder('typical', _TREE)
  settings = sampling.make(3, temperature=[0.0, 1.0, 0.0])
  state = _generate(decoder, _PROMPTS, 24, settings=settings)
  expected = _plain(_PROMPTS, 24)
  texts = fixtures.texts(state)
  assert [texts[0], texts[2]] == [expected[0], expected[2]]
  assert decoder.verifier.guarantee == 'none'
