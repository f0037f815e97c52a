"""Trees that a draft grows: their arrays, their choice, and the real loop."""

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import dynamic_tree
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding import verifiers
from efficiency_jax.decoding.dynamic_tree import Growth
from efficiency_jax.evaluation import speed
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.decoding import draft_tables
from tests.efficiency_jax.decoding import eagle_models

# So few tokens that some guess is often right.
_VOCAB = 5
_TARGET = fixtures.config(vocab_size=_VOCAB)
_FORM = eagle.Form(target=_TARGET, vocabulary=4, ffn_width=20)
_GROWTH = Growth(nodes=9, expand=3, height=3)
_PROMPTS = [[1, 2, 3, 1, 2], [4], [0, 3, 3, 0, 3, 3, 0]]
_SLOTS = 160  # the cache has two blocks


# A forest is a tree a row.


def _random_trees(batch, nodes, height):
  rng = np.random.default_rng(0)
  trees = []
  while len(trees) < batch:
    parents = (-1, *(int(rng.integers(i)) for i in range(1, nodes)))
    tree = token_tree.TokenTree(parents)
    if tree.height <= height:
      trees.append(tree)
  return trees


_DEEPEST = token_tree.TokenTree((-1, 0, 1, 2, 3, 0, 1, 5))
_TREES = [_DEEPEST, *_random_trees(5, 8, 4)]
_FOREST = dynamic_tree.Forest(
  jnp.asarray([tree.parents for tree in _TREES], jnp.int32), 4
)


def test_a_forest_says_of_each_row_what_its_tree_says():
  values = np.arange(6 * 8 * 2).reshape(6, 8, 2)
  same = np.testing.assert_array_equal
  heights = set()

  @jax.jit
  def read(parents, values):
    forest = dynamic_tree.Forest(parents, 4)
    alone = [
      tree.at_parents(values[row : row + 1])[0]
      for row, tree in enumerate(_TREES)
    ]
    return forest.ancestors, forest.depth, forest.at_parents(values), alone

  @jax.jit
  def look(parents, at):
    forest = dynamic_tree.Forest(parents, 4)
    alone = [(tree.has_children(at[0]), tree.path_to(at[0])) for tree in _TREES]
    return forest.has_children(at), forest.path_to(at), alone

  ancestors, depth, above, alone = jax.tree.map(
    np.asarray, read(_FOREST.parents, values)
  )
  for row, tree in enumerate(_TREES):
    heights.add(tree.height)
    same(ancestors[row], tree.ancestors)
    same(depth[row], tree.depth)
    same(above[row], alone[row])
  for node in range(8):
    at = np.full((6,), node, np.int32)
    inner, paths, alone = jax.tree.map(np.asarray, look(_FOREST.parents, at))
    assert paths.shape == (6, 5)
    for row, tree in enumerate(_TREES):
      has_children, path = alone[row]
      assert inner[row] == tree.is_inner[node] == has_children
      end = tree.depth[node] + 1 + tree.is_inner[node]
      same(paths[row, :end], path[:end])
      assert (paths[row, end:] == paths[row, end - 1]).all()
  assert len(heights) > 1
  assert max(heights) == 4


@pytest.mark.parametrize('name', ['greedy', 'coupled', 'typical'])
def test_rules_decide_in_each_row_as_on_its_tree(name):
  verify = verifiers.named(name).verify
  rng = np.random.default_rng(1)
  tokens = jnp.asarray(rng.integers(0, 3, (6, 7)), jnp.int32)
  arguments = (
    sampling.row_keys(0, jnp.arange(6)),
    jnp.arange(6),
    jnp.asarray(2 * rng.standard_normal((6, 8, 3)), jnp.float32),
    verifiers.Proposal(tokens, jnp.full((6,), 7), None),
  )
  one = lambda tree, row: jax.tree.map(lambda x: x[row : row + 1], tree)

  @jax.jit
  def both(parents, *arguments):
    alone = [
      verify(*one(arguments, row), tree) for row, tree in enumerate(_TREES)
    ]
    return verify(*arguments, dynamic_tree.Forest(parents, 4)), alone

  verdict, alone = jax.tree.map(np.asarray, both(_FOREST.parents, *arguments))
  for row in range(6):
    chex.assert_trees_all_equal(one(verdict, row), alone[row])
  assert len(set(verdict.num_accepted.tolist())) > 2


# What is kept, against search in the whole tree of a draft's probabilities.


@pytest.mark.parametrize(
  'growth',
  [
    Growth(nodes=1, expand=3, height=1),
    Growth(nodes=3, expand=1, height=3),
    Growth(nodes=6, expand=2, height=4),
    Growth(nodes=10, expand=3, height=4),
    Growth(nodes=21, expand=3, height=3),
  ],
  ids=lambda growth: f'{growth.nodes}-{growth.expand}-{growth.height}',
)
def test_the_best_paths_of_the_draft_are_kept(growth):
  table = draft_tables.random_table(4, 4, 3)
  tokens, parents, calls = table.grow(growth)
  assert tokens.shape == (3, growth.nodes)
  assert calls == growth.height - 1
  assert table.fed == [growth.expand * (i + 1) for i in range(calls)]
  assert max([0, *table.fed]) == growth.expanded
  shapes = set()
  for row in range(3):
    # It is a tree, and the one of the best paths.
    parents_of_row = tuple(parents[row].tolist())
    assert token_tree.TokenTree(parents_of_row).height <= growth.height
    found = draft_tables.paths(tokens[row], parents_of_row)
    assert len(set(found)) == growth.nodes + 1
    assert set(found) == set(draft_tables.best_paths(growth, table.row(row)))
    shapes.add(parents_of_row)
  if growth.expand > 1 and 3 < growth.nodes < 21:
    assert len(shapes) > 1


def test_a_tree_that_expands_all_is_the_best_of_all_trees():
  """What the other search finds, which knows nothing of levels."""
  table = draft_tables.random_table(4, 2, 3)
  tokens, parents, _ = table.grow(Growth(nodes=6, expand=4, height=2))
  for row, q in enumerate(table.q):
    best = token_tree.grow(lambda c, q=q: _choices(q, c)[1], 6, 4, 2)
    found = draft_tables.paths(tokens[row], parents[row].tolist())
    assert set(found) == {(), *(_choices(q, c)[0] for c in best.choices)}


def _choices(q, choices):
  """The path of these choices under a law, and its probability."""
  path, worth = (), 1.0
  for choice in choices:
    token = int(np.argsort(-q[path])[choice])
    worth *= q[path][token]
    path = (*path, token)
  return path, worth


def test_parents_win_ties():
  # After the unlikely token 0 a sure one: three paths are worth the same.
  q = np.asarray([1e-30, 1.0])
  table = draft_tables.Table([{(): q, (0,): q, (1,): q}], 2, 2)
  tokens, parents, _ = table.grow(Growth(nodes=3, expand=2, height=2))
  assert tokens.tolist() == [[1, 0, 1]]
  assert parents.tolist() == [[-1, 0, 0, 1]]


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ((4, 0, 2), 'expand must be >= 1'),
    ((4, 2, 0), 'height in 1..nodes'),
    ((2, 2, 3), 'height in 1..nodes'),
    ((7, 2, 2), 'nodes must be <= 6, the candidates'),
  ],
)
def test_what_cannot_grow_is_refused(fields, message):
  names = ('nodes', 'expand', 'height')
  with pytest.raises(ValueError, match=message):
    Growth(**dict(zip(names, fields, strict=True)))


def test_drafters_know_growths_as_they_know_trees():
  make = lambda: eagle.Eagle(form=_FORM, trees=(_GROWTH,))
  assert make() == make()
  assert hash(make()) == hash(make())
  assert make().tree(9) is _GROWTH
  assert make().tree(3) == token_tree.chain(3)
  with pytest.raises(ValueError, match='at most 4 children, the tokens'):
    eagle.Eagle(form=_FORM, trees=(Growth(nodes=5, expand=5, height=1),))
  with pytest.raises(ValueError, match="verifier 'block' takes no trees"):
    _decoder('block')


# The one-layer draft, and the loop.


_MIXED = {'temperature': [0.0, 1.0, 0.7], 'top_p': [1.0, 1.0, 0.9]}


def _decoder(verifier, growth=_GROWTH):
  return speculative.Decoder(
    apply=transformer.apply_fn(_TARGET),
    drafter=eagle.Eagle(form=_FORM, trees=(growth,)),
    verifier=verifiers.named(verifier),
    schedule=schedule.Schedule(lengths=(growth.nodes,)),
  )


def _begin(decoder, prompts, budget, **options):
  longest = max(map(len, prompts)) + int(np.max(budget))
  return fixtures.begin(
    decoder,
    eagle_models.weights(_FORM),
    _TARGET,
    prompts,
    np.broadcast_to(budget, (len(prompts),)),
    extra=_SLOTS - longest - decoder.slack,
    **{'stop': (-1, -1), **options},
  )


def _proceed(decoder, state, **options):
  weights = eagle_models.weights(_FORM)
  return fixtures.proceed(decoder, weights, state, **options)


_prompt = st.lists(st.integers(0, _VOCAB - 1), min_size=1, max_size=10)


def _settings(verifier):
  if verifier == 'greedy':
    return None
  return sampling.make(3, repetition_penalty=1.3, **_MIXED)


@pytest.mark.parametrize(
  'verifier', [pytest.param('greedy', marks=pytest.mark.slow), 'coupled']
)
def test_text_is_that_of_plain_decoding(verifier):
  decoder, settings = _decoder(verifier), _settings(verifier)

  @hypothesis.given(
    st.lists(_prompt, min_size=3, max_size=3),
    st.lists(st.integers(0, 24), min_size=3, max_size=3),
    st.tuples(st.integers(-1, _VOCAB - 1), st.integers(-1, 3)),
    st.integers(0, 100),
  )
  @hypothesis.settings(max_examples=4)
  @hypothesis.example(_PROMPTS, [24, 0, 24], (-1, -1), 3)
  def check(prompts, budget, stop, seed):
    options = {'stop': stop, 'seed': seed, 'settings': settings}
    room = _SLOTS - max(map(len, prompts))
    expected = fixtures.plain_texts(
      _TARGET, fixtures.params(_TARGET), prompts, budget, room=room, **options
    )
    state = _begin(decoder, prompts, budget, **options)
    state = _proceed(decoder, state)
    assert fixtures.texts(state) == expected
    counters = jax.tree.map(np.asarray, state.counters)
    assert (counters.accepted <= counters.drafted).all()

  check()


def _proposal(drafter, state, length):
  context = drafters.Context(
    state.tokens, state.length, state.keys, state.sampling
  )
  weights = eagle_models.weights(_FORM)

  @jax.jit
  def propose(draft):
    return drafter.propose(
      weights, draft, None, context, length, sampling.Purpose.SAMPLE
    )

  proposal, draft, _ = propose(state.draft)
  assert draft.cache.length.tolist() == state.length.tolist()
  assert proposal.count.tolist() == [length] * len(state.length)
  return proposal


def test_the_draft_keeps_the_best_paths_of_its_own_law():
  """Its probabilities are those found by reading every path anew."""
  decoder = _decoder('coupled')
  state = _begin(decoder, _PROMPTS, 20, settings=_settings('coupled'))
  proposal = _proposal(decoder.drafter, state, 9)
  assert proposal.logits is None
  _, features = eagle_models.recomputed(_FORM, state)
  proposal = jax.tree.map(np.asarray, proposal)
  for row, prompt in enumerate(_PROMPTS):

    def chance(path, row=row, prompt=prompt):
      scores = eagle_models.scores_after(
        _FORM, state, features, row, [*prompt, *path], len(prompt)
      )
      q = np.zeros(_VOCAB)
      drafted = list(eagle_models.vocabulary_of(_FORM))
      q[drafted] = np.exp(scores - scores.max())
      return q / q.sum()

    found = draft_tables.paths(
      proposal.tokens[row], proposal.parents[row].tolist()
    )
    assert set(found) == set(draft_tables.best_paths(_GROWTH, chance))
  assert len(set(map(tuple, proposal.parents.tolist()))) > 1


def test_one_node_a_level_is_the_chain():
  decoder = _decoder('coupled')
  state = _begin(decoder, _PROMPTS, 20, settings=_settings('coupled'))
  state = state._replace(sampling=sampling.GREEDY)
  chain = _proposal(decoder.drafter, state, 3)
  assert chain.parents is None
  growth = Growth(nodes=3, expand=1, height=3)
  grown = _proposal(eagle.Eagle(form=_FORM, trees=(growth,)), state, 3)
  assert grown.parents.tolist() == [[-1, 0, 1, 2]] * 3
  assert grown.tokens.tolist() == chain.tokens.tolist()


def test_caches_hold_what_a_fresh_prefill_would():
  """Of the target and of the draft, after many rounds of ragged rows."""
  decoder, settings = _decoder('coupled'), _settings('coupled')
  state = _begin(decoder, _PROMPTS, [30, 30, 9], settings=settings, seed=7)
  state = _proceed(decoder, state, max_rounds=14)
  # Whole paths were kept, and parts of them.
  assert (state.counters.accepted_at[:, :3].sum(0) > 0).all()
  apply = jax.jit(transformer.apply_fn(_TARGET))
  empty = jax.tree.map(jnp.zeros_like, state.cache)
  output, cache = apply(fixtures.params(_TARGET), state.tokens, empty)
  own, _ = eagle_models.recomputed(_FORM, state)
  state = state._replace(keys=())
  state, output, cache, own = jax.tree.map(
    np.asarray, (state, output, cache, own)
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  for row, length in enumerate(state.length.tolist()):
    hidden = output.hidden[row, : length - 1]
    close(state.draft.features[row, 1:length], hidden)
    known = int(state.draft.cache.length[row])
    assert known >= length - _GROWTH.height - 1
    pairs = (state.cache, cache, length - 1), (state.draft.cache, own, known)
    for got, right, end in pairs:
      for a, b in zip(
        got.keys + got.values, right.keys + right.values, strict=True
      ):
        close(a[row, :, :end], b[row, :, :end])


def test_trees_may_read_more_nodes_than_they_keep():
  """The cache of the draft has room for them behind the longest text."""
  growth = Growth(nodes=3, expand=4, height=3)
  drafter = eagle.Eagle(form=_FORM, trees=(growth,))
  longest = kv_cache.BLOCK - 7
  context = fixtures.context([[1]], longest - 1 + growth.nodes + 1)
  assert context.tokens.shape[1] + growth.nodes == kv_cache.BLOCK
  hidden = np.zeros((*context.tokens.shape, _TARGET.width), np.float32)
  weights = eagle_models.weights(_FORM)
  init = lambda: drafter.init(weights, context, growth.nodes, hidden)
  slots = jax.eval_shape(init).cache.keys[0].shape[2]
  assert slots >= longest + growth.expanded


def test_a_round_copies_no_cache():
  decoder, settings = _decoder('coupled'), _settings('coupled')
  weights = eagle_models.weights(_FORM)
  state = jax.eval_shape(
    lambda: _begin(decoder, _PROMPTS, 20, settings=settings)
  )
  assert state.cache.keys[0].shape == (3, 2, 256, 4)
  numbers = jnp.int32(9), jnp.ones(1), jnp.int32(0), jnp.bool_(False)
  program = speculative.run.lower(decoder, weights, state, *numbers).compile()
  found = speed.loop_operations(program.as_text())
  assert found
  for kept in (state.cache, state.draft.cache):
    assert not found['copy', kept.keys[0].shape]
  assert not found['copy', state.draft.features.shape]
