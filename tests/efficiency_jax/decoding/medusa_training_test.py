"""The training of heads against loops over texts; trained heads at work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax import engine as engine_lib
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import medusa_training
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.decoding import medusa_models

_TARGET = medusa_models.TARGET
_HEAD = transformer.head_fn(_TARGET)
_LENGTH = 12
# Weights of the positions whose next token is learnt, with a gap; the token
# after the last position is nowhere.
_MASK = np.asarray(
  [
    [0, 1, 2, 0.5, 1, 1, 0.5, 1, 3, 1, 2, 1],
    [1, 1, 1, 2, 0, 1, 1, 0.5, 1, 1, 1, 2],
  ]
)


def _batch(form=medusa_models.FORMS[0], tokens=None, mask=_MASK):
  if tokens is None:
    tokens = np.random.default_rng(0).integers(0, 11, (2, _LENGTH))
  tokens = np.asarray(tokens, np.int32)
  apply = jax.jit(transformer.apply_fn(_TARGET, layers=form.layers))
  hidden = np.asarray(apply(fixtures.params(_TARGET), tokens)[0].hidden)
  mask = np.asarray(mask, np.float32)
  return {'tokens': tokens, 'hidden': hidden, 'loss_mask': mask}


def _models(form):
  """Parameters of heads and target, and the vocabulary."""
  target, draft = medusa_models.weights(form)
  draft = dict(draft)
  vocabulary = draft.pop('vocabulary', None)
  return draft, target, vocabulary


def _loss(form, **options):
  """Of parameters, target and batch."""
  if 'vocabulary' not in options:
    options['vocabulary'] = _models(form)[2]
  return functools.partial(medusa_training.loss, form, _HEAD, **options)


@functools.cache
def _plain_loss(form):
  """Compiled, with the options that are the default."""
  return jax.jit(_loss(form))


# Of the target inside the vocabulary, at each position's next token.
_COVERAGE = np.random.default_rng(3).uniform(0.2, 1, (2, _LENGTH))


def _softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def _guess(form, batch, row, t, k):
  """Distributions p and q where head k guesses from t, and the right column."""
  tokens, hidden = (np.asarray(batch[n])[row] for n in ('tokens', 'hidden'))
  allowed = np.arange(_TARGET.vocab_size)
  if form.vocabulary is not None:
    allowed = medusa_models.VOCABULARY
  table = np.asarray(fixtures.params(_TARGET)['embedding']['table'], float)
  p = table[allowed] @ hidden[t + k, : _TARGET.width]
  before = tokens[t + k], tokens[t + 1]
  q = medusa_models.formula(form, hidden[t], k, *before)
  return _softmax(p), _softmax(q), np.flatnonzero(allowed == tokens[t + k + 1])


def _learnt(k):
  """Where head k learns to guess, and with which weight."""
  for row, t in np.ndindex(2, _LENGTH - 1 - k):
    if (_MASK[row, t : t + k + 1] > 0).all():
      yield row, t, _MASK[row, t + k]


def _mean(rows):
  """Of pairs of a weight and a value."""
  weights, values = zip(*rows, strict=True)
  return np.average(values, weights=weights)


def _kept(p, q, row, t, k):
  """1 - TV, with what is outside the vocabulary lost."""
  return np.minimum(p * _COVERAGE[row, t + k], q).sum()


@pytest.mark.parametrize('form', medusa_models.FORMS, ids=str)
def test_loss_and_metrics_are_those_of_a_loop_over_the_text(form):
  batch, (params, target, _) = _batch(form), _models(form)
  batch['coverage'] = np.asarray(_COVERAGE, np.float32)
  options = {
    'objectives': (('token', 0.3), ('total_variation', 0.7)),
    'decay': 0.6,
  }

  @jax.jit
  def both(*arguments):
    return _loss(form, **options)(*arguments), _loss(form)(*arguments)[0]

  (mixed, metrics), plain = jax.tree.map(
    np.asarray, both(params, target, batch)
  )
  mixed_total, plain_total, alphas = 0, 0, []
  for k in range(1, form.count + 1):
    rows = [(w, *_guess(form, batch, row, t, k)) for row, t, w in _learnt(k)]
    assert len(rows) > 2
    inside = [row for row in rows if len(row[3])]
    assert (len(inside) < len(rows)) == (form.vocabulary is not None)
    mean = lambda rows, value: (
      sum(row[0] * value(*row[1:]) for row in rows) / sum(r[0] for r in rows)
    )
    token = mean(inside, lambda p, q, column: -np.log(q[column[0]]))
    variation = mean(rows, lambda p, q, column: np.abs(p - q).sum() / 2)
    value = 0.3 * token + 0.7 * variation
    alphas.append(
      _mean(
        (w, _kept(*_guess(form, batch, row, t, k)[:2], row, t, k))
        for row, t, w in _learnt(k)
      )
    )
    doubt = 0
    if form.confidence:
      judged = []
      for row, t, w in _learnt(k):
        p, q, _ = _guess(form, batch, row, t, k)
        hidden, tokens = batch['hidden'][row, t], batch['tokens'][row]
        trust = medusa_models.trust(
          form, hidden, k, tokens[t + k], tokens[t + 1]
        )
        judged.append((w, trust, _kept(p, q, row, t, k)))
      doubt = _mean(
        (w, -a * np.log(c) - (1 - a) * np.log(1 - c)) for w, c, a in judged
      )
      error = _mean((w, abs(a - c)) for w, c, a in judged)
      np.testing.assert_allclose(
        metrics['confidence_error'][k - 1], error, rtol=1e-4
      )
    mixed_total += 0.6**k * (value + doubt)
    plain_total += 0.8**k * (token + doubt)
    np.testing.assert_allclose(metrics['loss'][k - 1], value, rtol=1e-4)
    for name, size in (('top1', 1), ('top5', 5)):
      among = lambda p, q, column, size=size: np.isin(
        column, np.argsort(-q)[:size]
      ).any()
      np.testing.assert_allclose(
        metrics[name][k - 1], mean(rows, among), rtol=1e-5
      )
  np.testing.assert_allclose(mixed, mixed_total, rtol=1e-4)
  np.testing.assert_allclose(plain, plain_total, rtol=1e-4)
  np.testing.assert_allclose(metrics['alpha'], alphas, rtol=1e-4)
  assert ('confidence_error' in metrics) == form.confidence


def test_tokens_a_run_are_counted_place_by_place():
  """A place where the first guess is kept is one where the next may be."""
  form = medusa_models.FORMS[0]
  batch, (params, target, _) = _batch(form), _models(form)
  _, metrics = _plain_loss(form)(params, target, batch)
  metrics = jax.tree.map(np.asarray, metrics)
  runs = 1
  for k in range(1, form.count + 1):
    rows = []
    for row, t, w in _learnt(k):
      guesses = [_guess(form, batch, row, t, j) for j in range(1, k + 1)]
      rows.append((w, np.prod([np.minimum(p, q).sum() for p, q, _ in guesses])))
    runs += _mean(rows)
  np.testing.assert_allclose(metrics['tokens_per_run'], runs, rtol=1e-4)
  # Which is not what independent places would give.
  assert abs(1 + np.cumprod(metrics['alpha']).sum() - runs) > 1e-3


def test_confidence_learns_and_changes_no_guess():
  """Gradients of the guesses are those of heads without it."""
  form = medusa_models.FORMS[-1]
  batch, (params, target, _) = _batch(form), _models(form)
  plain = dataclasses.replace(form, confidence=False)
  slopes = {}
  for one in (form, plain):
    loss = lambda params, one=one: _loss(
      one, vocabulary=jnp.asarray(medusa_models.VOCABULARY)
    )(params, target, batch)[0]
    slopes[one] = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))
  for k in range(form.count):
    own, other = (dict(slopes[one][f'head_{k}']) for one in (form, plain))
    mine, none = own.pop('confidence'), other.pop('confidence')
    assert all((x == 0).all() for x in jax.tree.leaves(none))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(mine))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6), own, other
    )


def test_gradients_flow_into_states_where_they_are_to_learn():
  form = medusa_models.FORMS[0]
  batch, (params, target, _) = _batch(form), _models(form)

  def value(others, objective):
    target, hidden = others
    return medusa_training.loss(
      form,
      _HEAD,
      params,
      target,
      {**batch, 'hidden': hidden},
      objectives=((objective, 1.0),),
      into_states=True,
    )[0]

  others = target, batch['hidden']
  for objective in ('token', 'forward_kl'):
    slope = jax.jit(jax.grad(value), static_argnums=1)
    none, slope = jax.tree.map(np.asarray, slope(others, objective))
    assert all((x == 0).all() for x in jax.tree.leaves(none))
    # Only where something is learnt from a state.
    learnt = np.zeros((2, _LENGTH), bool)
    for row, t, _ in _learnt(1):
      learnt[row, t] = True
    np.testing.assert_array_equal(np.abs(slope).max(-1) > 0, learnt)


def _new(form):
  return medusa_models.init(
    form,
    jax.random.key(0),
    _TARGET.width,
    _TARGET.vocab_size,
    medusa_models.table(form),
  )


@pytest.mark.parametrize(
  'form', medusa_models.FORMS[1:5:2] + medusa_models.FORMS[6:], ids=str
)
def test_new_heads_are_right_where_every_position_is_like_the_next(form):
  """Texts of one token: all states are one, so that q_k is p everywhere."""
  batch = _batch(form, [[4] * _LENGTH, [7] * _LENGTH])
  objectives = (('forward_kl', 1.0), ('total_variation', 1.0))
  value, metrics = jax.jit(_loss(form, objectives=objectives))(
    _new(form), fixtures.params(_TARGET), batch
  )
  # New confidence is one half.
  doubt = form.confidence * np.log(2) * sum(0.8**k for k in (1, 2, 3))
  np.testing.assert_allclose(value, doubt, atol=1e-5)
  np.testing.assert_allclose(metrics['alpha'], 1, atol=1e-5)
  runs = form.count + 1
  np.testing.assert_allclose(metrics['tokens_per_run'], runs, rtol=1e-5)


def test_what_is_not_learnt_does_not_matter():
  form = medusa_models.FORMS[-1]
  params, target, _ = _models(form)
  # Two texts in a row: states 0 .. 3 guess tokens up to 4.
  mask = np.ones((2, _LENGTH))
  mask[:, 4:] = 0
  batch = _batch(form, mask=mask)
  other = jax.tree.map(np.copy, batch)
  other['tokens'][:, 5:] += 1
  other['hidden'][:, 4:] *= 3
  objectives = (('token', 1.0), ('forward_kl', 1.0))
  loss = _loss(form, objectives=objectives)
  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  first, second = (step(params, target, b) for b in (batch, other))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  # The token after the last one is not in the row.
  ends = [np.ones((2, _LENGTH)), np.ones((2, _LENGTH))]
  ends[1][:, -1] = 0
  first, second = (step(params, target, _batch(form, mask=end)) for end in ends)
  jax.tree.map(np.testing.assert_array_equal, first, second)
  # And nothing at all.
  (value, metrics), slope = jax.tree.map(
    np.asarray, step(params, target, _batch(form, mask=0 * mask))
  )
  assert value == 0
  assert all((x == 0).all() for x in jax.tree.leaves((slope, metrics['top5'])))


_SEEING = dataclasses.replace(medusa_models.FORMS[-1], confidence=False)


@pytest.mark.parametrize('form', [*medusa_models.FORMS[1:3], _SEEING], ids=str)
def test_gradients_reach_the_heads_alone_and_are_right(form):
  params, target, _ = _models(form)
  batch = _batch(form)
  objectives = (('token', 0.5), ('forward_kl', 1.0))
  loss = _loss(form, objectives=objectives)

  def value(params, others):
    target, hidden = others
    return loss(params, target, {**batch, 'hidden': hidden})[0]

  others = target, batch['hidden']
  step = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
  params = jax.tree.map(np.asarray, params)
  own, foreign = jax.tree.map(np.asarray, step(params, others)[1])
  assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(foreign))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(own))
  rng = np.random.default_rng(1)
  way = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32), own
  )
  ends = [
    step(
      jax.tree.map(lambda x, w, s=s: x + np.float32(s) * w, params, way), others
    )[0]
    for s in (3e-4, -3e-4)
  ]
  slope = sum(jax.tree.leaves(jax.tree.map(np.vdot, own, way)))
  np.testing.assert_allclose((ends[0] - ends[1]) / 6e-4, slope, rtol=0.03)


@pytest.mark.parametrize('form', medusa_models.FORMS[::6], ids=str)
def test_ranks_are_places_in_the_sorted_guesses(form):
  batch, (params, target, vocabulary) = _batch(form), _models(form)
  ranks = functools.partial(medusa_training.ranks, form, _HEAD, most=4)
  places, usable = jax.tree.map(
    np.asarray, jax.jit(ranks)(params, target, batch, vocabulary=vocabulary)
  )
  assert places.shape == (2, _LENGTH, form.count)
  whole = [(row, t) for row, t, _ in _learnt(form.count)]
  assert np.argwhere(np.asarray(usable)).tolist() == [list(w) for w in whole]
  seen = set()
  for row, t in whole:
    for k in range(1, form.count + 1):
      _, q, column = _guess(form, batch, row, t, k)
      best = np.argsort(-q)[:4].tolist()
      place = best.index(column[0]) if set(column) & set(best) else -1
      assert places[row, t, k - 1] == place
      seen.add(place)
  assert len(seen) > 2


def test_a_vocabulary_that_the_form_does_not_say_is_refused():
  form = medusa_models.FORMS[-1]
  with pytest.raises(ValueError, match='must have 8 tokens as the form says'):
    medusa_training.loss(form, _HEAD, {}, {}, _batch())
  with pytest.raises(ValueError, match='got 2'):
    medusa_training.ranks(
      form, _HEAD, {}, {}, _batch(), vocabulary=jnp.arange(2)
    )


# Trained heads.

_TREE = token_tree.from_choices([(0,), (1,), (0, 0), (1, 0), (0, 0, 0)])


@pytest.fixture(scope='module')
def lm():
  """A model whose texts are not simple."""
  lm = untrained.language_model()
  return dataclasses.replace(lm, params=fixtures.params(lm.config))


def _write(lm, **choices):
  """A greedy text of 60 tokens as the loop left it, and its tokens a run."""
  engine = engine_lib.prepare(lm, stop=False, **choices)
  keys = sampling.row_keys(0, jnp.arange(1))
  greedy, slots = sampling.GREEDY, 128
  state = engine_lib.start(engine, [[1, 2]], 60, greedy, keys, slots)
  state = engine_lib.run(engine, state)
  return state, 60 / int(state.counters.runs[0])


@pytest.mark.parametrize(
  'form',
  [
    medusa.Heads(count=3),
    medusa.Heads(count=3, vocabulary=14, rank=4, markov=8),
  ],
  ids=str,
)
def test_heads_learn_a_text_and_draft_it(lm, form):
  text = fixtures.texts(_write(lm, drafter='plain')[0])[0]
  tokens = np.asarray([text], np.int32)
  output, _ = jax.jit(transformer.apply_fn(lm.config))(lm.params, tokens)
  mask = np.ones(tokens.shape, np.float32)
  batch = {'tokens': tokens, 'hidden': output.hidden, 'loss_mask': mask}
  size = lm.config.vocab_size
  allowed, vocabulary = np.arange(size), None
  if form.vocabulary is not None:
    allowed = draft_vocabulary.by_frequency([tokens], form.vocabulary, size)
    vocabulary = jnp.asarray(allowed)
  params = medusa_models.init(
    form, jax.random.key(0), lm.config.width, size, lm.params
  )
  optimizer = optax.adam(0.02)

  @jax.jit
  def step(params, state):
    loss = functools.partial(
      medusa_training.loss, form, transformer.head_fn(lm.config)
    )
    (_, metrics), slope = jax.value_and_grad(loss, has_aux=True)(
      params, lm.params, batch, vocabulary=vocabulary
    )
    updates, state = optimizer.update(slope, state)
    return optax.apply_updates(params, updates), state, metrics

  def draft(params):
    heads = medusa.TrainedHeads(
      form=form, params=params, vocabulary=vocabulary, trees=(_TREE,)
    )
    state, per_run = _write(lm, drafter='medusa', heads=heads, draft_length=5)
    assert fixtures.texts(state) == [text]
    drafted = tokens[0][np.asarray(state.accepted_draft)[0, : len(text)]]
    refused = np.asarray(state.refused)[0]
    assert np.isin(drafted, allowed).all()
    assert np.isin(refused[refused >= 0], allowed).all()
    return per_run

  before = draft(params)
  state = jax.jit(optimizer.init)(params)
  for _ in range(60):
    params, state, metrics = step(params, state)
  inside = np.isin(text, allowed)
  assert inside.all() == (form.vocabulary is None)
  # All is learnt that can be.
  right = [inside[k + 1 :].mean() for k in (1, 2, 3)]
  np.testing.assert_allclose(metrics['top1'], right, rtol=1e-5)
  after = draft(params)
  assert after > before + 1
  if form.vocabulary is None:
    assert after == 4  # the height of the tree, and one of the target
