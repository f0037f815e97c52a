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
  apply = transformer.apply_fn(target, layers=layers)
  drafter = eagle.Eagle(form=form)

  @jax.jit
  def propose(context):
    hidden = apply(weights.target, context.tokens)[0].hidden
    state = drafter.init(weights, context, _STEPS, hidden)
    return drafter.propose(
      weights, state, None, context, _STEPS, sampling.Purpose.DRAFT
    )[0]

  proposal = jax.tree.map(np.asarray, propose(context))
  # The drafted texts behind one another in one row.
  whole = [
    text + draft
    for text, draft in zip(_TEXTS, proposal.tokens.tolist(), strict=True)
  ]
  ends = np.cumsum([len(text) for text in whole])
  segments = np.repeat(np.arange(len(whole)), [len(text) for text in whole])

  @jax.jit
  def train(tokens, segments):
    hidden = apply(weights.target, tokens, segments=segments)[0].hidden
    states = eagle_training.rollout(
      form, weights.draft, weights.target, tokens, hidden, _STEPS, segments
    )
    masks = eagle_training.reached(tokens.shape, _STEPS, segments)
    return [eagle_models.scores(form, weights, x) for x in states], masks

  scores, masks = jax.tree.map(
    np.asarray,
    train(np.concatenate(whole)[None], segments.astype(np.int32)[None]),
  )
  for row, (text, end) in enumerate(zip(_TEXTS, ends, strict=True)):
    first = end - len(whole[row]) + len(text) - 1
    for i in range(_STEPS):
      assert bool(masks[i][0, first + i])
      logits = np.full(target.vocab_size, -np.inf)
      columns = eagle_models.VOCABULARY[:size] if size else slice(None)
      logits[columns] = scores[i][0, first + i]
      right = proposal.logits[row, i]
      np.testing.assert_allclose(logits, right, atol=2e-5)


def test_no_step_begins_before_its_text():
  segments = np.asarray([[0, 0, 0, 1, 1, 2]])
  reached = jax.jit(eagle_training.reached, static_argnums=(0, 1))
  masks = reached((1, 6), 3, segments)
  assert masks[0].tolist() == [[True] * 6]
  assert masks[1][0].tolist() == [False, True, True, False, True, False]
  assert masks[2][0].tolist() == [False, False, True, False, False, False]
  assert reached((1, 3), 2)[1].tolist() == [[False, True, True]]


def _batch(target, params, layers=(), packed=True):
  """Texts, what the target makes of them, and its logits; in numpy."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, target.vocab_size, (2, 9)).astype(np.int32)
  segments = np.asarray([[0] * 4 + [1] * 5, [0] * 9], np.int32)
  packed = {'segments': segments} if packed else {}
  apply = jax.jit(transformer.apply_fn(target, layers=layers))
  output, _ = apply(params, tokens, **packed)
  mask = rng.integers(0, 2, (2, 9)).astype(np.float32)
  return {
    'tokens': tokens,
    'hidden': np.asarray(output.hidden),
    'loss_mask': mask,
    **packed,
  }, np.asarray(output.logits)


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
  whole = _softmax(np.asarray(logits, float))
  coverage = whole[..., np.asarray(vocabulary)].sum(-1)

  @jax.jit
  def both(batch, coverage):
    loss = functools.partial(
      eagle_training.loss, form, weights.draft, weights.target, **options
    )
    states = eagle_training.rollout(
      form,
      weights.draft,
      weights.target,
      batch['tokens'],
      batch['hidden'],
      steps=3,
      segments=batch['segments'],
    )
    masks = eagle_training.reached((2, 9), 3, batch['segments'])
    logits = [eagle_models.scores(form, weights, x) for x in states]
    covered = {**batch, 'coverage': coverage}
    return loss(batch, steps=3), loss(covered, steps=3), logits, masks

  (value, metrics), (_, covered), drafted, masks = jax.tree.map(
    np.asarray, both(batch, coverage.astype(np.float32))
  )
  p = _softmax(np.asarray(logits, float)[..., np.asarray(vocabulary)])
  total, alphas = 0, []
  for i in range(3):
    q = _softmax(np.asarray(drafted[i], float))
    mask = batch['loss_mask'] * masks[i]
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
  slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  _, (own, foreign) = jax.tree.map(np.asarray, slopes(weights.draft, others))
  assert all((x == 0).all() for x in jax.tree.leaves(foreign))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(own))
  rng = np.random.default_rng(1)
  way = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32), own
  )
  slope = sum(
    (a * b).sum()
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(way), strict=True)
  )
  step = np.float32(3e-4)
  moved = lambda by: jax.tree.map(
    lambda x, w: np.asarray(x) + by * w, weights.draft, way
  )
  ends = [float(slopes(moved(by), others)[0]) for by in (step, -step)]
  np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), slope, rtol=0.03)


def test_a_draft_learns():
  """A few steps of descent raise what the draft is worth, at every step."""
  target = fixtures.config()
  form = eagle.Form(target=target)
  params = fixtures.params(target)
  batch, _ = _batch(target, params)
  batch = {**batch, 'loss_mask': np.ones((2, 9), np.float32)}
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
  seen = jax.tree.map(np.asarray, [seen[0], seen[-1]])
  assert (seen[-1]['alpha'] > seen[0]['alpha'] + 0.2).all()
  assert seen[-1]['tokens_per_run'] > seen[0]['tokens_per_run'] + 0.5


def test_a_vocabulary_that_the_form_does_not_say_is_refused():
  form = eagle.Form(target=fixtures.config(), vocabulary=6)
  with pytest.raises(ValueError, match='must have 6 tokens as the form says'):
    eagle_training.loss(form, {}, {}, {}, vocabulary=np.arange(5))
  with pytest.raises(ValueError, match='vocabulary must be in 1..11 or None'):
    eagle.Form(target=fixtures.config(), vocabulary=12)


def test_ranks_are_places_among_the_guesses_of_the_draft_itself():
  """Token by token: the draft fed with the text and its own states."""
  target = fixtures.config()
  form = eagle.Form(target=target, vocabulary=6)
  weights = eagle_models.weights(form)
  batch, _ = _batch(target, weights.target, packed=False)
  batch['loss_mask'] = np.ones((2, 9), np.float32)
  batch['loss_mask'][1, 6] = 0
  vocabulary = np.asarray(weights.draft['vocabulary'])
  found, mask = jax.jit(
    functools.partial(eagle_training.ranks, form, steps=3, most=4)
  )(weights.draft, weights.target, batch, vocabulary=vocabulary)
  found = np.asarray(found)
  # The token after position t + i must be one that is learnt.
  expected = np.zeros((2, 9), bool)
  expected[:, :6] = True
  expected[1, 4:] = False
  np.testing.assert_array_equal(mask, expected)

  @jax.jit
  def read(tokens, before):
    cache = kv_cache.init(form.config, len(tokens), 16, jnp.float32)
    own, _ = eagle.apply(
      form, weights.draft, weights.target, tokens, before, cache
    )
    return own, eagle_models.scores(form, weights, own)

  # A row for each place, whose text is read anew for each token.
  rows, places = np.nonzero(expected)
  every = np.arange(len(rows))
  before = np.pad(batch['hidden'], ((0, 0), (1, 0), (0, 0)))[rows, :-1]
  # Of what the target says, nothing behind the place.
  before[np.arange(9) > places[:, None]] = 0
  for i in range(3):
    own, scores = map(np.asarray, read(batch['tokens'][rows], before))
    for at, (row, t) in enumerate(zip(rows, places, strict=True)):
      order = vocabulary[np.argsort(-scores[at, t + i])[:4]].tolist()
      right = int(batch['tokens'][row, t + i + 1])
      place = order.index(right) if right in order else -1
      assert found[row, t, i] == place
    before[every, places + i + 1] = own[every, places + i]


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
  (states,) = jax.jit(functools.partial(eagle_training.rollout, form, steps=1))(
    found, params, batch['tokens'], batch['hidden']
  )
  states = np.asarray(states)
  linear = normed(inputs[0] @ kernel) * scale
  row, t = np.argwhere(np.asarray(batch['loss_mask'])[:, 1:])[0]
  np.testing.assert_allclose(states[row, t + 1], linear, atol=2e-3)
