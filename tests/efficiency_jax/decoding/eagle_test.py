"""The one-layer draft alone, and through the real loop."""

import functools

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding import verifiers
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.decoding import eagle_models

_TARGET = fixtures.config()
_VOCAB = _TARGET.vocab_size
_SLOTS = 64
_PROMPTS = [[1, 2, 3, 1, 2], [7], [4, 9, 9, 4, 9, 9, 4]]
_MIXED = {'temperature': [0.0, 1.0, 0.7], 'top_p': [1.0, 1.0, 0.9]}
_TREE = token_tree.from_choices(
  [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 1), (1, 0, 0)]
)
_WHOLE = eagle.Form(target=_TARGET)
_REDUCED = eagle.Form(target=_TARGET, vocabulary=8, ffn_width=20, layers=(1, 0))


def _decoder(form, verifier, lengths, trees=(_TREE,)):
  return speculative.Decoder(
    apply=transformer.apply_fn(form.target, layers=form.layers),
    drafter=eagle.Eagle(form=form, trees=trees),
    verifier=verifiers.named(verifier),
    schedule=schedule.Schedule(lengths=lengths),
  )


def _begin(decoder, prompts, budget, weights=None, **options):
  form = decoder.drafter.form
  budget = np.broadcast_to(budget, (len(prompts),))
  longest = max(map(len, prompts)) + int(budget.max())
  return fixtures.begin(
    decoder,
    weights or eagle_models.weights(form),
    form.target,
    prompts,
    budget,
    extra=_SLOTS - longest - decoder.slack,
    **{'stop': (-1, -1), **options},
  )


def _proceed(decoder, state, weights=None, **options):
  weights = weights or eagle_models.weights(decoder.drafter.form)
  return fixtures.proceed(decoder, weights, state, **options)


# The loop. Length 2 is a chain, 9 the tree; all are chosen among adaptively.

_prompt = st.lists(st.integers(0, _VOCAB - 1), min_size=1, max_size=10)


@pytest.mark.parametrize(
  ('form', 'verifier'),
  [
    pytest.param(_WHOLE, 'greedy', marks=pytest.mark.slow, id='greedy'),
    pytest.param(_REDUCED, 'coupled', id='coupled'),
  ],
)
def test_text_is_that_of_plain_decoding(form, verifier):
  decoder = _decoder(form, verifier, (0, 2, 9))
  settings = sampling.make(3, **_MIXED) if verifier == 'coupled' else None

  @hypothesis.given(
    st.lists(_prompt, min_size=3, max_size=3),
    st.lists(st.integers(0, 24), min_size=3, max_size=3),
    st.tuples(st.integers(-1, _VOCAB - 1), st.integers(-1, 3)),
    st.integers(0, 100),
    st.integers(-1, 2),
  )
  @hypothesis.settings(max_examples=8)
  @hypothesis.example(_PROMPTS, [24, 0, 24], (-1, -1), 3, 1)
  @hypothesis.example(_PROMPTS, [24, 0, 24], (-1, -1), 3, 2)
  def check(prompts, budget, stop, seed, forced):
    options = {'stop': stop, 'seed': seed, 'settings': settings}
    room = _SLOTS - max(map(len, prompts))
    params = fixtures.params(_TARGET)
    expected = fixtures.plain_texts(
      _TARGET, params, prompts, budget, room=room, **options
    )
    state = _begin(decoder, prompts, budget, **options)
    state = _proceed(decoder, state, forced=forced, costs=[1.0, 1.1, 1.2])
    assert fixtures.texts(state) == expected

  check()


@pytest.mark.slow
def test_the_state_is_that_of_the_text():
  """After any pattern of drafts: chains, trees, and many rounds without."""
  form = _REDUCED
  decoder = _decoder(form, 'coupled', (0, 2, 9))
  settings = sampling.make(3, temperature=1.0)
  state = _begin(decoder, _PROMPTS, [40, 40, 30], settings=settings)
  accepted = set()
  for forced, rounds in ((2, 1), (1, 2), (0, 1), (1, 1), (0, 20), (2, 2)):
    before = np.asarray(state.length)
    state = _proceed(decoder, state, max_rounds=rounds, forced=forced)
    cache, features = eagle_models.recomputed(form, state)
    own = state.draft.cache
    for row, length in enumerate(np.asarray(state.length)):
      accepted.add((forced, int(length - before[row])))
      np.testing.assert_allclose(
        state.draft.features[row, :length], features[row, :length], atol=1e-5
      )
      known = int(own.length[row])
      assert known <= length
      if forced and rounds == 1 and length > before[row]:
        # All that the round could see.
        assert known == before[row]
      for got, right in zip(
        own.keys + own.values, cache.keys + cache.values, strict=True
      ):
        np.testing.assert_allclose(
          got[row, :, :known], right[row, :, :known], atol=1e-5
        )
  assert {(2, 1), (0, 20)} <= accepted
  assert any(forced and count > 1 for forced, count in accepted)


def test_a_tree_holds_the_best_guesses_after_each_node():
  """Each node's children are those that a chain through it would rank."""
  form = _REDUCED
  weights = eagle_models.weights(form)
  decoder = _decoder(form, 'greedy', (9,))
  state = _begin(decoder, _PROMPTS, 20)
  context = drafters.Context(
    state.tokens, state.length, state.keys, state.sampling
  )

  @jax.jit
  def propose(draft):
    return decoder.drafter.propose(
      weights, draft, None, context, 9, sampling.Purpose.SAMPLE
    )

  proposal, draft, _ = propose(state.draft)
  assert proposal.logits is None
  assert proposal.count.tolist() == [9] * 3
  assert draft.cache.length.tolist() == [len(p) for p in _PROMPTS]
  _, features = eagle_models.recomputed(form, state)
  for row, prompt in enumerate(_PROMPTS):
    tokens = proposal.tokens[row].tolist()
    for node in np.flatnonzero(_TREE.is_inner):
      way = _TREE.paths[node][1 : _TREE.depth[node] + 1]
      text = prompt + [tokens[n - 1] for n in way]
      scores = eagle_models.scores_after(
        form, state, features, row, text, len(prompt)
      )
      order = eagle_models.VOCABULARY[np.argsort(-scores)]
      for child in np.flatnonzero(np.asarray(_TREE.parents) == node):
        assert tokens[child - 1] == order[_TREE.rank[child]]


def test_a_greedy_chain_holds_the_best_guess_after_each_token():
  """Whether scores stay in the vocabulary or, with a penalty, leave it."""
  form = _REDUCED
  weights = eagle_models.weights(form)
  decoder = _decoder(form, 'greedy', (3,), trees=())
  state = _begin(decoder, _PROMPTS, 20)
  _, features = eagle_models.recomputed(form, state)
  none = state.sampling
  for settings in (none, none._replace(repetition_penalty=jnp.ones(3))):
    context = drafters.Context(state.tokens, state.length, state.keys, settings)
    proposal, _, _ = decoder.drafter.propose(
      weights, state.draft, None, context, 3, sampling.Purpose.SAMPLE
    )
    for row, prompt in enumerate(_PROMPTS):
      text = list(prompt)
      for token in proposal.tokens[row].tolist():
        scores = eagle_models.scores_after(
          form, state, features, row, text, len(prompt)
        )
        assert token == eagle_models.VOCABULARY[scores.argmax()]
        text.append(token)


# Drafts that know the target, which has one layer.

_SHALLOW = fixtures.config(
  num_layers=1, norm_epsilon=1e-12, tie_embeddings=False
)


def _sure(target_config, target, fuse, block):
  """Drafts with everything of the target but the first product."""
  draft = {
    'embedding_norm': {'scale': jnp.ones(target_config.width)},
    'feature_norm': {'scale': jnp.ones(target_config.width)},
    'fuse': {'kernel': jnp.asarray(fuse, jnp.float32)},
    'layers_0': block,
    'final_norm': target['final_norm'],
  }
  return drafters.Weights(target, draft)


def _counted(form, weights, prompts, verifier, length, **options):
  """Runs and accepted tokens of 24 tokens a row; and if none were refused."""
  decoder = _decoder(form, verifier, (length,))
  height = decoder.drafter.tree(length).height
  state = _begin(decoder, prompts, 24, weights, **options)
  state = _proceed(decoder, state, weights)
  rounds = -(-24 // (height + 1))
  accepted = 24 // (height + 1) * height + 24 % (height + 1)
  found = state.counters.runs.tolist(), state.counters.accepted.tolist()
  return found, ([rounds] * len(prompts), [accepted] * len(prompts))


@pytest.mark.parametrize(
  ('verifier', 'length'),
  [('greedy', 3), ('greedy', 9), ('coupled', 3), ('token', 3), ('block', 2)],
)
def test_a_draft_that_is_the_target_is_always_right(verifier, length):
  """Here the draft reads nothing but tokens."""
  config = _SHALLOW
  table = np.asarray(fixtures.params(config)['embedding']['table'])
  # Unit embeddings, which their norm does not change.
  unit = table / np.sqrt((table**2).mean(-1, keepdims=True))
  embedding = {'table': jnp.asarray(unit)}
  params = fixtures.params(config)
  params = {**params, 'embedding': embedding, 'head': embedding}
  fuse = np.concatenate([np.eye(16), np.zeros((16, 16))])
  weights = _sure(config, params, fuse, params['layers_0'])
  settings = None
  if verifier != 'greedy':
    settings = sampling.make(3, temperature=0.7, repetition_penalty=1.3)
  form = eagle.Form(target=config)
  found, none_refused = _counted(
    form, weights, _PROMPTS, verifier, length, settings=settings
  )
  assert found == none_refused


@pytest.mark.parametrize('length', [3, 9])
def test_a_draft_that_reads_states_alone_is_right_where_they_tell_all(length):
  """Each token names the next one, and h_{t-1} names x_{t-1}, hence x_t.

  A draft fed with another state than that before its token is never right.
  """
  config = _SHALLOW
  follows = np.random.default_rng(0).permutation(_VOCAB)
  assert (follows[follows] != follows).all()
  rows = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0]
  rows = 4 * rows[:_VOCAB]  # orthogonal, of mean square 1
  head = np.zeros_like(rows)
  head[follows] = rows
  params = jax.tree.map(jnp.zeros_like, fixtures.params(config))
  params = {
    **params,
    'embedding': {'table': jnp.asarray(rows, jnp.float32)},
    'head': {'table': jnp.asarray(head, jnp.float32)},
    'final_norm': {'scale': jnp.ones(16)},
  }
  # From the token before to this one.
  fuse = np.concatenate([np.zeros((16, 16)), rows.T @ rows[follows] / 16])
  weights = _sure(config, params, fuse, params['layers_0'])
  prompts = [[5, 5, 2], [7, 7], [1, 3]]
  prompts = [[*p, int(follows[p[-1]])] for p in prompts]
  form = eagle.Form(target=config)
  found, none_refused = _counted(form, weights, prompts, 'greedy', length)
  assert found == none_refused


# What is declared.


def test_drafters_are_static_arguments_and_know_their_trees():
  make = lambda: eagle.Eagle(form=eagle.Form(target=_TARGET), trees=(_TREE,))
  assert make() == make()
  assert hash(make()) == hash(make())
  assert make().tree(9) is _TREE
  assert make().tree(4) == token_tree.chain(4)
  assert make().tree(0) == token_tree.chain(0)


def test_the_draft_is_one_layer_and_has_no_table_of_its_own():
  form = eagle.Form(target=fixtures.every_option(), vocabulary=5)
  target = fixtures.params(form.target)

  @jax.jit
  def both(key, target):
    return eagle.init(form, key), eagle.init(form, key, target)

  params, begun = both(jax.random.key(0), target)
  assert set(params) == {
    'embedding_norm',
    'feature_norm',
    'fuse',
    'layers_0',
    'final_norm',
  }
  assert params['fuse']['kernel'].shape == (32, 16)
  assert form.config.window(0) is None
  chex.assert_trees_all_equal(begun['final_norm'], target['final_norm'])
  assert (begun['final_norm']['scale'] != params['final_norm']['scale']).any()


@pytest.mark.parametrize('every', [False, True])
def test_gathered_states_are_their_formula(every):
  target = fixtures.every_option() if every else fixtures.config()
  form = eagle.Form(target=target, layers=(1, 0))
  weights = eagle_models.weights(form)
  assert weights.draft['gather']['kernel'].shape == (32, 16)
  hidden = np.random.default_rng(0).standard_normal((3, 48))
  hidden[1] = 0
  gathered = jax.jit(functools.partial(eagle.gathered, form))
  found = gathered(weights.draft, weights.target, hidden.astype(np.float32))
  right = hidden[:, :16].copy()
  kernel = np.asarray(weights.draft['gather']['kernel'], float)
  for place, layer in ((1, 1), (2, 0)):
    x = hidden[:, 16 * place : 16 * place + 16]
    scale = weights.target[f'layers_{layer}']['attention_norm']['scale']
    scale = np.asarray(scale, float) + target.norm_plus_one
    square = (x**2).mean(-1, keepdims=True)
    normed = x / np.sqrt(square + target.norm_epsilon) * scale
    right += normed @ kernel[16 * (place - 1) : 16 * place]
  np.testing.assert_allclose(found, right, atol=1e-5)
  assert not np.asarray(found[1]).any()


def test_inner_states_add_nothing_at_first():
  form = eagle.Form(target=_TARGET, layers=(1,))
  target = fixtures.params(_TARGET)
  hidden = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)

  @jax.jit
  def gathered(key, hidden):
    return eagle.gathered(form, eagle.init(form, key, target), target, hidden)

  found = gathered(jax.random.key(0), hidden)
  np.testing.assert_array_equal(found, hidden[:, :16])


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match=r'layers must be in 0\.\.1, got 2'):
    eagle.Form(target=_TARGET, layers=(2,))
  with pytest.raises(ValueError, match='differ in size'):
    eagle.Eagle(form=_WHOLE, trees=(_TREE, _TREE))
  with pytest.raises(ValueError, match="verifier 'block' takes no trees"):
    _decoder(_WHOLE, 'block', (9,))
  with pytest.raises(ValueError, match='must have 8 tokens as the form says'):
    eagle.TrainedDraft(form=_REDUCED, params={})
