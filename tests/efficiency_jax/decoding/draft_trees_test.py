"""Trees of a draft model: filled, against its law, and in the real loop."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_trees
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding import verifiers
from efficiency_jax.decoding.dynamic_tree import Growth
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.decoding import draft_tables

# A tree whose nodes do not stand level by level, and one that grows.
_TREE = token_tree.TokenTree((-1, 0, 1, 2, 0, 1, 4))
_GROWTH = Growth(nodes=8, expand=3, height=2)


@pytest.mark.parametrize(
  'tree',
  [
    _TREE,
    token_tree.TokenTree((-1, 0, 1, 2, 3, 0, 1, 5, 5, 0, 7)),
    token_tree.TokenTree((-1, 0, 0, 0)),
    token_tree.chain(3),
  ],
  ids=lambda tree: str(len(tree)),
)
def test_a_tree_is_filled_with_the_best_tokens_after_each_node(tree):
  table = draft_tables.random_table(4, 4, 3)
  tokens, calls = table.fill(tree)
  assert tokens.shape == (3, len(tree) - 1)
  for row, q in enumerate(table.q):
    paths = draft_tables.paths(tokens[row], tree.parents)
    for node in range(1, len(tree)):
      above = paths[tree.parents[node]]
      order = np.argsort(-q[above], kind='stable')
      assert paths[node][-1] == order[tree.rank[node]]
  # A pass a level, of the nodes with children alone.
  inner = tree.depth[tree.is_inner]
  assert calls == tree.height - 1
  assert table.fed == [
    int(((inner >= 1) & (inner <= depth)).sum())
    for depth in range(1, tree.height)
  ]


def test_shapes_are_known_by_their_length():
  shapes = _TREE, _GROWTH
  assert draft_trees.of_length(shapes, 6) is _TREE
  assert draft_trees.of_length(shapes, 8) is _GROWTH
  assert draft_trees.of_length(shapes, 7) == token_tree.chain(7)
  assert draft_trees.room(shapes, 8) == 8
  wide = Growth(nodes=3, expand=4, height=3)
  assert draft_trees.room((*shapes, wide), 6) == wide.expanded == 8
  with pytest.raises(ValueError, match=r'differ in size, got sizes \[7, 7\]'):
    draft_trees.check((_TREE, _TREE))
  draft_trees.check(shapes, 3)
  for shape, size in ((_TREE, 1), (_GROWTH, 2)):
    with pytest.raises(
      ValueError, match=f'at most {size} children, .*with {size + 1}'
    ):
      draft_trees.check((shape,), size)


# One layer of a target as its draft model, and so few tokens that some guess is
# often right. The layer sees no farther than a window.

_VOCAB = 5
_TARGET = fixtures.config(vocab_size=_VOCAB, windows=(None, 3))
_FORM = draft_model.Form(target=_TARGET, layers=(1,), vocabulary=4)
_VOCABULARY = jnp.asarray([3, 0, 4, 1], jnp.int32)
_PROMPTS = [[1, 2, 3, 1, 2], [4], [0, 3, 3, 0, 3, 3, 0]]
_SLOTS = 64
_DRAFTER = drafters.DraftModel(
  apply=draft_model.apply_fn(_FORM),
  init_cache=kv_cache.initializer(_FORM.config),
  head=transformer.head_fn(_FORM.config),
  trees=(_TREE, _GROWTH),
)


@functools.cache
def _weights():
  target = fixtures.params(_TARGET)
  own = draft_model.init(_FORM, target)
  draft = draft_model.weights(_FORM, own, target, _VOCABULARY)
  return drafters.Weights(target, draft)


def _read(tokens):
  """Logits of the draft on whole texts [B, T], and what they make a cache."""
  empty = _DRAFTER.init_cache(len(tokens), _SLOTS)
  apply = jax.jit(_DRAFTER.apply)
  output, cache = apply(_weights().draft, jnp.asarray(tokens), empty)
  return np.asarray(output.logits), cache


def _chance(prompt):
  """The draft's law after `prompt` and a path, by reading them anew."""

  @functools.cache
  def chance(path):
    text = np.zeros((1, 12), np.int32)
    text[0, : len(prompt) + len(path)] = [*prompt, *path]
    logits = _read(text)[0][0, len(prompt) + len(path) - 1]
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()

  return chance


def _proposal(length):
  """After the prompts, of which the last one leaves the most to be fed."""
  context = fixtures.context(_PROMPTS, room=_SLOTS - 7)
  weights = _weights()

  @jax.jit
  def propose(context):
    state = _DRAFTER.init(weights, context, 8)
    return _DRAFTER.propose(
      weights, state, 'its', context, length, sampling.Purpose.SAMPLE
    )[:2]

  proposal, cache = propose(context)
  assert proposal.logits is None
  assert proposal.count.tolist() == [length] * 3
  # Nothing of the tree is taken for text.
  assert cache.length.tolist() == context.length.tolist()
  return jax.tree.map(np.asarray, proposal)


def test_a_tree_holds_the_best_guesses_after_each_node():
  proposal = _proposal(6)
  assert proposal.parents is None
  for row, prompt in enumerate(_PROMPTS):
    chance = _chance(prompt)
    paths = draft_tables.paths(proposal.tokens[row], _TREE.parents)
    for node in range(1, len(_TREE)):
      order = np.argsort(-chance(paths[_TREE.parents[node]]))
      assert paths[node][-1] == order[_TREE.rank[node]]


def test_a_growing_tree_keeps_the_best_paths():
  proposal = _proposal(8)
  for row, prompt in enumerate(_PROMPTS):
    parents = proposal.parents[row].tolist()
    found = draft_tables.paths(proposal.tokens[row], parents)
    best = draft_tables.best_paths(_GROWTH, _chance(prompt))
    assert set(found) == set(best)
  assert len(set(map(tuple, proposal.parents.tolist()))) > 1


# The loop. Length 2 is a chain; all are chosen among adaptively.

_prompt = st.lists(st.integers(0, _VOCAB - 1), min_size=1, max_size=10)


def _decoder(verifier):
  return speculative.Decoder(
    apply=transformer.apply_fn(_TARGET),
    drafter=_DRAFTER,
    verifier=verifiers.named(verifier),
    schedule=schedule.Schedule(lengths=(0, 2, 6, 8)),
  )


def _settings(verifier):
  if verifier == 'greedy':
    return None
  return sampling.make(3, temperature=[0.0, 1.0, 0.7])


def _begin(verifier, prompts, budget, **options):
  decoder = _decoder(verifier)
  budget = np.broadcast_to(budget, (len(prompts),))
  longest = max(map(len, prompts)) + int(budget.max())
  return fixtures.begin(
    decoder,
    _weights(),
    _TARGET,
    prompts,
    budget,
    extra=_SLOTS - longest - decoder.slack,
    settings=_settings(verifier),
    **{'stop': (-1, -1), **options},
  )


def _proceed(verifier, state, **options):
  return fixtures.proceed(_decoder(verifier), _weights(), state, **options)


@pytest.mark.parametrize(
  'verifier', [pytest.param('greedy', marks=pytest.mark.slow), 'coupled']
)
def test_text_is_that_of_plain_decoding(verifier):
  @hypothesis.given(
    st.lists(_prompt, min_size=3, max_size=3),
    st.lists(st.integers(0, 24), min_size=3, max_size=3),
    st.tuples(st.integers(-1, _VOCAB - 1), st.integers(-1, 3)),
    st.integers(0, 100),
    st.integers(-1, 3),
  )
  @hypothesis.settings(max_examples=2)
  @hypothesis.example(_PROMPTS, [24, 0, 24], (-1, -1), 3, 2)
  @hypothesis.example(_PROMPTS, [24, 0, 24], (-1, -1), 3, 3)
  def check(prompts, budget, stop, seed, forced):
    expected = fixtures.plain_texts(
      _TARGET,
      _weights().target,
      prompts,
      budget,
      stop=stop,
      seed=seed,
      settings=_settings(verifier),
      room=_SLOTS - max(map(len, prompts)),
    )
    state = _begin(verifier, prompts, budget, stop=stop, seed=seed)
    state = _proceed(verifier, state, forced=forced, costs=[1.0, 1.1, 1.2, 1.3])
    assert fixtures.texts(state) == expected

  check()


def test_caches_hold_what_a_fresh_prefill_would():
  """Of the target and of the draft, after rounds of every kind."""
  verifier = 'coupled'
  state = _begin(verifier, _PROMPTS, [40, 40, 30], seed=7)
  apply = jax.jit(transformer.apply_fn(_TARGET))
  gained = {2: set(), 3: set()}
  kinds = (2, 1), (3, 2), (1, 1), (2, 2), (0, 9), (3, 1), (2, 1), (1, 3)
  for forced, rounds in kinds:
    before = np.asarray(state.length)
    state = _proceed(verifier, state, max_rounds=rounds, forced=forced)
    length = np.asarray(state.length)
    if forced in gained and rounds == 1:
      gained[forced] |= set((length - before).tolist())
    empty = jax.tree.map(jnp.zeros_like, state.cache)
    _, target = apply(_weights().target, state.tokens, empty)
    _, own = _read(state.tokens)
    known = np.asarray(state.draft.length)
    assert (known < length).all()
    pairs = (state.cache, target, length - 1), (state.draft, own, known)
    for got, right, ends in jax.tree.map(np.asarray, pairs):
      for a, b in zip(
        got.keys + got.values, right.keys + right.values, strict=True
      ):
        for row, end in enumerate(ends):
          np.testing.assert_allclose(
            a[row, :, :end], b[row, :, :end], atol=1e-5
          )
  # Tokens beyond the first node were kept.
  assert all(max(counts) > 2 for counts in gained.values()), gained


def test_what_does_not_fit_is_refused():
  apply, init_cache = _DRAFTER.apply, _DRAFTER.init_cache
  with pytest.raises(ValueError, match='trees need head='):
    drafters.DraftModel(apply=apply, init_cache=init_cache, trees=(_TREE,))
  with pytest.raises(ValueError, match='trees must differ in size'):
    drafters.DraftModel(
      apply=apply,
      init_cache=init_cache,
      head=_DRAFTER.head,
      trees=(_TREE, _TREE),
    )
  wide = Growth(nodes=5, expand=5, height=1)
  with pytest.raises(ValueError, match='at most 4 children'):
    draft_model.TrainedDraft(
      form=_FORM, params={}, vocabulary=_VOCABULARY, trees=(wide,)
    )
  with pytest.raises(ValueError, match="verifier 'block' takes no trees"):
    _decoder('block')
