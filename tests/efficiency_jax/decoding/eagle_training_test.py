"""The training of a draft against what the drafter computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import eagle_training
from efficiency_jax.decoding import sampling
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.decoding import eagle_models

_STEPS = 3
_TEXTS = [[1, 2, 3, 1, 2, 5], [7], [4, 9]]


@pytest.mark.parametrize(
  ('every', 'size'),
  [pytest.param(False, None, marks=pytest.mark.slow), (True, 6)],
)
def test_step_i_of_training_is_the_ith_drafted_token(every, size):
  """For the text that the drafter wrote, whatever stands beside it in a row."""
  target = fixtures.every_option() if every else fixtures.config()
  layers = (2, 0) if every else ()
  form = eagle.Form(target=target, vocabulary=size, ffn_width=20, layers=layers)
  weights = eagle_models.weights(form)
  context = fixtures.context(
    _TEXTS, room=10, settings=sampling.make(3, temperature=1.0)
  )
  apply = jax.jit(transformer.apply_fn(target, layers=layers))
  hidden = apply(weights.target, context.tokens)[0].hidden
  drafter = eagle.Eagle(form=form)

  @jax.jit
  def propose(context, hidden):
    state = drafter.init(weights, context, _STEPS, hidden)
    return drafter.propose(
      weights, state, None, context, _STEPS, sampling.Purpose.DRAFT
    )[0]

  proposal = propose(context, hidden)
  # The drafted texts behind one another in one row.
  whole = [
    text + draft
    for text, draft in zip(_TEXTS, proposal.tokens.tolist(), strict=True)
  ]
  ends = np.cumsum([len(text) for text in whole])
  segments = np.repeat(np.arange(len(whole)), [len(text) for text in whole])
  tokens = jnp.asarray(np.concatenate(whole))[None]
  segments = jnp.asarray(segments, jnp.int32)[None]
  hidden = apply(weights.target, tokens, segments=segments)[0].hidden
  states = jax.jit(
    functools.partial(eagle_training.rollout, form), static_argnames='steps'
  )(weights.draft, weights.target, tokens, hidden, _STEPS, segments)
  masks = eagle_training.reached(tokens.shape, _STEPS, segments)
  scores = eagle.scores_fn(form)
  head = eagle_models.head(weights)
  for row, (text, end) in enumerate(zip(_TEXTS, ends, strict=True)):
    first = end - len(whole[row]) + len(text) - 1
    for i in range(_STEPS):
      assert bool(masks[i][0, first + i])
      logits = np.full(target.vocab_size, -np.inf)
      columns = eagle_models.VOCABULARY[:size] if size else slice(None)
      logits[columns] = scores(head, states[i][0, first + i])
      right = proposal.logits[row, i]
      np.testing.assert_allclose(logits, right, atol=2e-5)


def test_no_step_begins_before_its_text():
  segments = jnp.asarray([[0, 0, 0, 1, 1, 2]])
  masks = eagle_training.reached((1, 6), 3, segments)
  assert masks[0].tolist() == [[True] * 6]
  assert masks[1][0].tolist() == [False, True, True, False, True, False]
  assert masks[2][0].tolist() == [False, False, True, False, False, False]
  assert eagle_training.reached((1, 3), 2)[1].tolist() == [[False, True, True]]


def _batch(target, params, layers=()):
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(0, target.vocab_size, (2, 9)), jnp.int32)
  segments = jnp.asarray([[0] * 4 + [1] * 5, [0] * 9], jnp.int32)
  apply = jax.jit(transformer.apply_fn(target, layers=layers))
  output, _ = apply(params, tokens, segments=segments)
  mask = jnp.asarray(rng.integers(0, 2, (2, 9)), jnp.float32)
  return {
    'tokens': tokens,
    'hidden': output.hidden,
    'loss_mask': mask,
    'segments': segments,
  }, output.logits


def _softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def test_the_loss_is_its_formula():
  target = fixtures.config()
  form = eagle.Form(target=target, vocabulary=6, layers=(1,))
  weights = eagle_models.weights(form)
  batch, logits = _batch(target, weights.target, form.layers)
  vocabulary = weights.draft['vocabulary']
  options = {
    'vocabulary': vocabulary,
    'objectives': (('cross_entropy', 0.1), ('total_variation', 0.9)),
  }
  whole = np.asarray(jax.nn.softmax(logits), float)
  coverage = whole[..., np.asarray(vocabulary)].sum(-1)
  loss = jax.jit(
    functools.partial(eagle_training.loss, form, steps=3, **options)
  )
  value, metrics = loss(weights.draft, weights.target, batch)
  states = jax.jit(functools.partial(eagle_training.rollout, form, steps=3))(
    weights.draft,
    weights.target,
    batch['tokens'],
    batch['hidden'],
    segments=batch['segments'],
  )
  masks = eagle_training.reached((2, 9), 3, batch['segments'])
  p = _softmax(np.asarray(logits, float)[..., np.asarray(vocabulary)])
  total, alphas = 0, []
  _, covered = loss(
    weights.draft, weights.target, {**batch, 'coverage': jnp.asarray(coverage)}
  )
  for i in range(3):
    scores = eagle.scores_fn(form)(eagle_models.head(weights), states[i])
    q = _softmax(np.asarray(scores, float))
    mask = np.asarray(batch['loss_mask'] * masks[i])
    mean = lambda x, mask=mask: (x * mask).sum() / mask.sum()
    cross = mean(-(p * np.log(q)).sum(-1))
    variation = mean(np.abs(p - q).sum(-1) / 2)
    total += 0.8**i * (0.1 * cross + 0.9 * variation)
    alphas.append(1 - variation)
    np.testing.assert_allclose(
      metrics['loss'][i], 0.1 * cross + 0.9 * variation, rtol=1e-5
    )
    np.testing.assert_allclose(
      metrics['agreement'][i], mean(p.argmax(-1) == q.argmax(-1)), rtol=1e-5
    )
    full = whole[..., np.asarray(vocabulary)]
    np.testing.assert_allclose(
      covered['alpha'][i], mean(np.minimum(full, q).sum(-1)), rtol=1e-5
    )
  np.testing.assert_allclose(value, total, rtol=1e-5)
  np.testing.assert_allclose(metrics['alpha'], alphas, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['tokens_per_run'], 1 + np.cumprod(alphas).sum(), rtol=1e-5
  )


def test_gradients_reach_the_draft_alone_and_are_right():
  target = fixtures.every_option()
  form = eagle.Form(target=target, layers=(1, 2))
  weights = eagle_models.weights(form)
  batch, _ = _batch(target, weights.target, form.layers)

  def loss(params, others):
    target_params, hidden = others
    value, _ = eagle_training.loss(
      form,
      params,
      target_params,
      {**batch, 'hidden': hidden},
      steps=2,
      feature_weight=0.3,
    )
    return value

  others = weights.target, batch['hidden']
  own, foreign = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights.draft, others)
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(foreign))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(own))
  rng = np.random.default_rng(1)
  way = jax.tree.map(
    lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), own
  )
  slope = sum(
    (a * b).sum()
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(way), strict=True)
  )
  step = 3e-4
  value = jax.jit(
    lambda by: loss(
      jax.tree.map(lambda x, w: x + by * w, weights.draft, way), others
    )
  )
  ends = value(step), value(-step)
  np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, rtol=0.03)


def test_a_draft_learns():
  """A few steps of descent raise what the draft is worth, at every step."""
  target = fixtures.config()
  form = eagle.Form(target=target)
  params = fixtures.params(target)
  batch, _ = _batch(target, params)
  batch = {**batch, 'loss_mask': jnp.ones((2, 9))}
  draft = eagle.init(form, jax.random.key(0), params)

  @jax.jit
  def step(draft):
    loss = lambda draft: eagle_training.loss(form, draft, params, batch)
    (_, metrics), slope = jax.value_and_grad(loss, has_aux=True)(draft)
    # Descent of one length, whatever the slope.
    size = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(slope)))
    return jax.tree.map(lambda x, g: x - 0.3 * g / size, draft, slope), metrics

  seen = []
  for _ in range(60):
    draft, metrics = step(draft)
    seen.append(metrics)
  assert (seen[-1]['alpha'] > seen[0]['alpha'] + 0.2).all()
  assert seen[-1]['tokens_per_run'] > seen[0]['tokens_per_run'] + 0.5


def test_a_vocabulary_that_the_form_does_not_say_is_refused():
  form = eagle.Form(target=fixtures.config(), vocabulary=6)
  with pytest.raises(ValueError, match='must have 6 tokens as the form says'):
    eagle_training.loss(form, {}, {}, {}, vocabulary=jnp.arange(5))
  with pytest.raises(ValueError, match='vocabulary must be in 1..11 or None'):
    eagle.Form(target=fixtures.config(), vocabulary=12)


def test_ranks_are_places_among_the_guesses_of_the_draft_itself():
  """Token by token: the draft fed with the text and its own states."""
  target = fixtures.config()
  form = eagle.Form(target=target, vocabulary=6)
  weights = eagle_models.weights(form)
  batch, _ = _batch(target, weights.target)
  del batch['segments']
  tokens = batch['tokens']
  output, _ = transformer.apply_fn(target)(weights.target, tokens)
  batch |= {
    'hidden': output.hidden,
    'loss_mask': jnp.ones((2, 9)).at[1, 6].set(0),
  }
  vocabulary = np.asarray(weights.draft['vocabulary'])
  found, mask = jax.jit(
    functools.partial(eagle_training.ranks, form, steps=3, most=4)
  )(weights.draft, weights.target, batch, vocabulary=jnp.asarray(vocabulary))
  # The token after position t + i must be one that is learnt.
  expected = np.zeros((2, 9), bool)
  expected[:, :6] = True
  expected[1, 4:] = False
  np.testing.assert_array_equal(mask, expected)
  step = jax.jit(functools.partial(eagle.apply, form))
  for row, t in zip(*np.nonzero(expected), strict=True):
    text = tokens[row : row + 1]
    before = jnp.pad(output.hidden[row : row + 1, :t], ((0, 0), (1, 0), (0, 0)))
    cache = kv_cache.init(form.config, 1, 16, jnp.float32)
    own, cache = step(
      weights.draft, weights.target, text[:, : t + 1], before, cache
    )
    state = own[:, -1:]
    for i in range(3):
      scores = eagle.scores_fn(form)(eagle_models.head(weights), state[0, 0])
      order = vocabulary[np.argsort(-np.asarray(scores))[:4]].tolist()
      right = int(text[0, t + i + 1])
      place = order.index(right) if right in order else -1
      assert found[row, t, i] == place
      if i < 2:
        state, cache = step(
          weights.draft,
          weights.target,
          text[:, t + i + 1 : t + i + 2],
          state,
          cache,
        )


@pytest.mark.parametrize('every', [False, True])
def test_least_squares_begins_as_the_best_linear_draft(every):
  target = fixtures.every_option() if every else fixtures.config()
  form = eagle.Form(target=target, layers=(1,))
  params = fixtures.params(target)
  batch, _ = _batch(target, params, form.layers)
  del batch['segments']
  begun = eagle.init(form, jax.random.key(0), params)
  halves = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in (0, 1)]
  found = eagle_training.least_squares(form, begun, params, halves, ridge=0.5)
  # The rows of the regression, one by one.
  scale = np.asarray(begun['final_norm']['scale']) + target.norm_plus_one
  table = np.asarray(params['embedding']['table'])
  hidden = np.asarray(batch['hidden'])[..., :16]

  def normed(x):
    return x / np.sqrt((x**2).mean() + target.norm_epsilon)

  inputs, outputs = [], []
  for row in range(2):
    for t in range(1, 9):
      if batch['loss_mask'][row, t]:
        embedded = normed(table[batch['tokens'][row, t]])
        before = normed(hidden[row, t - 1])
        inputs.append(np.concatenate([embedded, before]))
        outputs.append(hidden[row, t] / scale)
  width = target.width
  # A ridge is so many more rows that ask for zero.
  inputs = np.concatenate([inputs, np.sqrt(0.5) * np.eye(2 * width)])
  outputs = np.concatenate([outputs, np.zeros((2 * width, width))])
  kernel = np.linalg.lstsq(inputs, outputs)[0]
  np.testing.assert_allclose(found['fuse']['kernel'], kernel, atol=2e-4)
  # The block adds nothing yet.
  states = eagle_training.rollout(
    form, found, params, batch['tokens'], batch['hidden'], 1
  )[0]
  linear = normed(inputs[0] @ kernel) * scale
  row, t = np.argwhere(np.asarray(batch['loss_mask'])[:, 1:])[0]
  np.testing.assert_allclose(states[row, t + 1], linear, atol=2e-3)
