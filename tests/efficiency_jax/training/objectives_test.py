"""Tests of losses as the training step takes them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax.adaptation import lora
from efficiency_jax.binarization import networks
from efficiency_jax.data import packing
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_model_training
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import eagle_training
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import medusa_training
from efficiency_jax.evaluation import encoders
from efficiency_jax.io import untrained
from efficiency_jax.models import encoder
from efficiency_jax.models import transformer
from efficiency_jax.training import objectives
from efficiency_jax.training import optimizers
from efficiency_jax.training import state as train_state
from efficiency_jax.training import step as steps
from tests import fixtures
from tests.efficiency_jax.decoding import eagle_models

_OPTIONS = {
  'steps': 2,
  'objectives': (('cross_entropy', 0.3), ('total_variation', 0.7)),
  'decay': 0.5,
}


def _target(**fields):
  return fixtures.config(num_layers=1, **fields)


def _problem(rows: int = 4, **fields):
  """A target, a draft of six of its tokens, and kept states of some texts."""
  form = eagle.Form(target=_target(**fields), vocabulary=6)
  weights = eagle_models.weights(form)
  params = {k: v for k, v in weights.draft.items() if k != 'vocabulary'}
  rng = np.random.default_rng(0)
  mask = rng.integers(0, 2, (rows, 8))
  # Of each row something is learnt, and nothing at its first token, which the
  # second step does not reach.
  mask[:, 0], mask[:, 3] = 0, 1
  batch = {
    'tokens': jnp.asarray(rng.integers(0, 11, (rows, 8)), jnp.int32),
    'hidden': jnp.asarray(rng.standard_normal((rows, 8, 16)), jnp.float16),
    'loss_mask': jnp.asarray(mask, jnp.float32),
  }
  return form, params, weights, batch


def test_a_vocabulary_is_frozen_beside_them():
  target = fixtures.params(fixtures.config())
  read = objectives.frozen(target, np.array([3, 1, 2], np.int64))
  assert read['target'] is target
  assert objectives.frozen(target).keys() == {'target'}
  assert read['vocabulary'].dtype == jnp.int32
  assert read['vocabulary'].tolist() == [3, 1, 2]


def test_computed_states_are_those_of_the_target_and_take_no_gradients():
  config = _target()
  target = fixtures.params(config)
  apply = transformer.apply_fn(config, layers=(0,))
  tokens = jnp.asarray([[1, 2, 3]])
  hidden = jax.jit(apply)(target, tokens)[0].hidden

  def loss(params, frozen, batch):
    del frozen
    return (params * batch['hidden']).sum(), {}

  @jax.jit
  def slopes(params, target, batch):
    value = lambda *x: objectives.computed(loss, apply)(*x, batch)[0]
    return jax.grad(value, argnums=(0, 1))(params, {'target': target})

  own, foreign = slopes(1.0, target, {'tokens': tokens})
  np.testing.assert_allclose(own, hidden.sum(), rtol=1e-4)
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(foreign))
  # What was kept is taken as it is.
  own, _ = slopes(
    1.0, target, {'tokens': tokens, 'hidden': jnp.ones((1, 3, 2))}
  )
  assert own == 6


def test_the_loss_is_that_of_eagle_training_with_every_option():
  form, params, weights, batch = _problem(tie_embeddings=False)
  vocabulary = weights.draft['vocabulary']
  frozen = objectives.frozen(weights.target, vocabulary)
  loss = jax.jit(objectives.draft(form, **_OPTIONS))
  value, metrics = loss(params, frozen, batch)
  wide = {**batch, 'hidden': batch['hidden'].astype(jnp.float32)}
  direct = functools.partial(eagle_training.loss, form, **_OPTIONS)
  expected, parts = jax.jit(direct)(
    params, weights.target, wide, vocabulary=vocabulary
  )
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  assert metrics.keys() == {
    *(f'{n}_{i}' for n in ('loss', 'agreement', 'alpha') for i in (1, 2)),
    'tokens_per_run',
    'weight',
  }
  chex.assert_shape(list(metrics.values()), ())
  for name in ('loss', 'agreement', 'alpha'):
    mine = jnp.stack([metrics[f'{name}_1'], metrics[f'{name}_2']])
    np.testing.assert_allclose(mine, parts[name], rtol=1e-6)
  np.testing.assert_allclose(
    metrics['tokens_per_run'], parts['tokens_per_run'], rtol=1e-6
  )
  assert metrics['weight'] == batch['loss_mask'].sum()


def test_a_step_learns_and_takes_a_batch_in_parts():
  form, params, weights, batch = _problem()
  frozen = objectives.frozen(weights.target, weights.draft['vocabulary'])
  optimizer = optax.sgd(0.1)
  after = {}
  for accumulation in (1, 2):
    step = steps.make_step(
      objectives.draft(form, **_OPTIONS), optimizer, accumulation=accumulation
    )
    step = jax.jit(step)
    state = train_state.create(params, optimizer)
    state, first = step(state, frozen, batch)
    # No mean over tokens, but a product of such means.
    means = {k: v for k, v in first.items() if k != 'tokens_per_run'}
    after[accumulation] = state.params, means
  # The parts weigh differently.
  counts = batch['loss_mask'].sum(axis=1)
  assert counts[::2].sum() != counts[1::2].sum()
  chex.assert_trees_all_close(after[1], after[2], rtol=1e-4, atol=1e-6)
  assert step(state, frozen, batch)[1]['loss'] < first['loss']


def test_the_loss_of_distillation_is_that_of_draft_model_training():
  _, _, weights, batch = _problem()
  target = _target()
  form = draft_model.Form(target=target, layers=(0,), vocabulary=6)
  vocabulary = weights.draft['vocabulary']
  frozen = objectives.frozen(weights.target, vocabulary)
  params = draft_model.init(form, weights.target)
  options = {'objectives': (('reverse_kl', 0.5),), 'length': 2}
  loss = jax.jit(objectives.distillation(form, **options))
  value, metrics = loss(params, frozen, batch)
  expected, found = jax.jit(
    functools.partial(draft_model_training.loss, form, **options)
  )(
    params,
    weights.target,
    objectives.widened(batch),
    vocabulary=vocabulary,
  )
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  names = {'loss_1', 'agreement_1', 'alpha_1', 'tokens_per_run', 'weight'}
  assert metrics.keys() == names
  np.testing.assert_allclose(metrics['alpha_1'], found['alpha'][0], rtol=1e-6)
  assert metrics['weight'] == batch['loss_mask'].sum()


def test_the_loss_of_heads_is_that_of_medusa_training():
  target = _target()
  form = medusa.Heads(count=2, vocabulary=6, markov=3)
  params = fixtures.params(target)
  vocabulary = np.array([3, 0, 9, 2, 10, 7], np.int32)
  frozen = objectives.frozen(params, vocabulary)
  table = draft_vocabulary.head(params, vocabulary)
  heads = medusa.init(form, jax.random.key(0), target.width, 11, table)
  rng = np.random.default_rng(0)
  heads = jax.tree.map(
    lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype),
    heads,
  )
  *_, batch = _problem()
  output_head = transformer.head_fn(target)
  options = {'objectives': (('token', 0.5), ('forward_kl', 0.5)), 'decay': 0.5}
  loss = jax.jit(objectives.heads(form, output_head, **options))
  value, metrics = loss(heads, frozen, batch)
  expected, found = jax.jit(
    functools.partial(medusa_training.loss, form, output_head, **options)
  )(
    heads,
    params,
    objectives.widened(batch),
    vocabulary=jnp.asarray(vocabulary),
  )
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  for name in ('loss', 'top1', 'top5', 'alpha'):
    for k in (1, 2):
      np.testing.assert_allclose(
        metrics[f'{name}_{k}'], found[name][k - 1], rtol=1e-5
      )
  assert metrics['weight'] == batch['loss_mask'].sum()


# Heads and the model they stand on.

_JOINT = medusa.Heads(count=2, vocabulary=6, markov=3, token=True, layers=(0,))
_FEW = np.array([3, 0, 9, 2, 10, 7], np.int32)


def _pair(moved: bool):
  """What `joint` trains, reads, and is given, and the output head."""
  target = _target()
  params = fixtures.params(target)
  adapted, _ = lora.adapt(params, ['/kernel$'], 2, 4.0, jax.random.key(1))
  table = draft_vocabulary.head(params, _FEW)
  heads = medusa.init(_JOINT, jax.random.key(0), target.width, 11, table)
  rng = np.random.default_rng(0)
  noisy = lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
  trained = {
    'heads': jax.tree.map(noisy, heads),
    'adapter': lora.factors(adapted),
  }
  if moved:
    trained['adapter'] = jax.tree.map(noisy, trained['adapter'])
  frozen = objectives.frozen(adapted, _FEW)
  *_, batch = _problem()
  apply = transformer.apply_fn(target, layers=_JOINT.layers)
  batch['hidden'] = jax.jit(apply)(params, batch['tokens'])[0].hidden
  return trained, frozen, batch


def _joint(**options):
  target = _target()
  return jax.jit(
    objectives.joint(
      _JOINT,
      transformer.apply_fn(target, layers=_JOINT.layers),
      transformer.head_fn(target),
      **options,
    )
  )


@pytest.mark.parametrize('backbone', ['forward_kl', 'token'])
def test_the_joint_loss_is_that_of_the_merged_model_and_its_heads(backbone):
  trained, frozen, batch = _pair(moved=True)
  value, metrics = _joint(backbone=((backbone, 1.0),), heads_weight=0.3)(
    trained, frozen, batch
  )
  adapted = lora.with_factors(frozen['target'], trained['adapter'])
  merged, target = lora.merge(adapted), _target()
  apply = jax.jit(transformer.apply_fn(target, layers=_JOINT.layers))
  output, _ = apply(merged, batch['tokens'])
  original, _ = apply(lora.base(adapted), batch['tokens'])
  p, q = (np.asarray(jax.nn.softmax(x.logits)) for x in (original, output))
  heads_batch = {
    **batch,
    'hidden': output.hidden,
    'coverage': jnp.asarray(q[..., _FEW].sum(-1)),
  }
  heads_value, found = jax.jit(
    functools.partial(medusa_training.loss, _JOINT, transformer.head_fn(target))
  )(trained['heads'], merged, heads_batch, vocabulary=jnp.asarray(_FEW))
  tokens, mask = (np.asarray(batch[x]) for x in ('tokens', 'loss_mask'))
  places = [(b, t) for b, t in np.argwhere(mask) if t < tokens.shape[1] - 1]
  assert len(places) < mask.sum()
  mean = lambda one: np.mean([one(b, t) for b, t in places])
  divergence = mean(lambda b, t: (p[b, t] * np.log(p[b, t] / q[b, t])).sum())
  entropy = mean(lambda b, t: -np.log(q[b, t, tokens[b, t + 1]]))
  agreement = mean(lambda b, t: p[b, t].argmax() == q[b, t].argmax())
  own = divergence if backbone == 'forward_kl' else entropy
  close = functools.partial(np.testing.assert_allclose, rtol=2e-3)
  close(metrics['original_kl'], divergence)
  close(metrics['original_agreement'], agreement)
  assert 0 < agreement < 1
  close(metrics['backbone'], own)
  close(value, own + 0.3 * heads_value)
  close(metrics['alpha_2'], found['alpha'][1])
  close(metrics['tokens_per_run'], found['tokens_per_run'])
  assert metrics['weight'] == mask.sum()


def test_a_new_adapter_moves_for_the_heads_alone():
  """At first the model is the original, and its divergence at its least."""
  trained, frozen, batch = _pair(moved=False)
  slopes = {}

  @jax.jit
  def slope(weight):
    loss = _joint(heads_weight=weight)
    return jax.value_and_grad(
      loss, has_aux=True, argnums=(0, 1), allow_int=True
    )(trained, frozen, batch)

  for weight in (0.0, 0.2):
    (_, metrics), slopes[weight] = slope(weight)
    np.testing.assert_allclose(metrics['original_kl'], 0, atol=1e-6)
    assert metrics['original_agreement'] == 1
    # Nothing flows into what is frozen.
    target = jax.tree.leaves(slopes[weight][1]['target'])
    assert all((np.asarray(x) == 0).all() for x in target)
  largest = lambda tree: max(
    float(np.abs(x).max()) for x in jax.tree.leaves(tree)
  )
  still, moved = (slopes[weight][0]['adapter'] for weight in (0.0, 0.2))
  assert largest(still) < 1e-5
  assert largest(moved) > 1e-3
  assert largest(slopes[0.2][0]['heads']) > 1e-3


def test_joint_training_lowers_the_loss():
  trained, frozen, batch = _pair(moved=False)
  optimizer = optimizers.make(
    optimizers.OptimizerConfig(
      learning_rate=0.02, steps=12, shares={'adapter': 0.25}
    )
  )
  step = jax.jit(steps.make_step(_joint(), optimizer))
  state, history = train_state.create(trained, optimizer), []
  for _ in range(12):
    state, metrics = step(state, frozen, batch)
    history.append({k: float(v) for k, v in metrics.items()})
  assert history[-1]['loss'] < history[0]['loss'] - 0.1
  assert 0 < history[-1]['original_kl'] < 0.1


def test_classification_is_the_logistic_loss_of_real_rows():
  model = untrained.text_encoder()
  texts = ['a warm and funny film', 'dull', 'the best of its year']
  tokens, mask = model.batch(texts, multiple=32)
  positive = np.array([True, False, True])
  head = encoders.SentimentHead(
    jax.random.normal(jax.random.key(0), (64,)), jnp.float32(0.3)
  )
  loss = jax.jit(objectives.classification(encoder.apply_fn(model.config)))
  params = {'encoder': model.params, 'head': head}
  batch = {'tokens': tokens, 'mask': mask, 'positive': positive}
  value, metrics = loss(params, None, batch)

  scores = np.asarray(head.scores(encoders.embed(model, texts)))
  signs = np.where(positive, 1, -1)
  expected = np.log1p(np.exp(-signs * scores)).mean()
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['accuracy'], ((scores > 0) == positive).mean()
  )
  assert metrics['weight'] == 3
  # A batch that is filled up with rows of zeros.
  filled = {
    k: np.concatenate([v, np.zeros((2, *v.shape[1:]), v.dtype)])
    for k, v in batch.items()
  }
  again, metrics = loss(params, None, filled)
  np.testing.assert_allclose(again, value, rtol=1e-5)
  assert metrics['weight'] == 3
  slope = jax.jit(jax.grad(lambda p: loss(p, None, filled)[0]))(params)
  chex.assert_tree_all_finite(slope)


def _images(rows=12):
  config = networks.Config(
    image=(4, 4, 1),
    hidden=(16,),
    classes=3,
    activations='stochastic',
    dropout=(0.0, 0.3),
  )
  rng = np.random.default_rng(0)
  batch = {
    'pixels': rng.integers(0, 256, (rows, 4, 4, 1), np.uint8),
    'labels': rng.integers(0, 3, rows).astype(np.int32),
  }
  return config, networks.init(config, jax.random.key(0)), batch


def test_binarized_is_the_squared_hinge_loss():
  config, params, batch = _images()
  loss = jax.jit(objectives.binarized(config))
  value, metrics = loss(params, None, batch)
  scores = np.asarray(networks.apply(config, params, batch['pixels']).scores)
  expected = 0.0
  for row, label in zip(scores, batch['labels'], strict=True):
    for place, score in enumerate(row):
      target = 1 if place == label else -1
      expected += max(0.0, 1 - target * score) ** 2
  np.testing.assert_allclose(value, expected / scores.size, rtol=1e-5)
  np.testing.assert_allclose(
    metrics['error'], (scores.argmax(1) != batch['labels']).mean()
  )


def test_binarized_draws_by_seed_and_step():
  config, params, batch = _images()
  losses = [jax.jit(objectives.binarized(config, seed)) for seed in (0, 1)]
  draw = lambda seed, step: float(
    losses[seed](params, None, {**batch, 'step': np.int32(step)})[0]
  )
  assert draw(0, 0) == draw(0, 0)
  assert len({draw(0, 0), draw(0, 1), draw(1, 0)}) == 3


def test_next_token_is_cross_entropy_of_what_counts():
  lm = untrained.language_model()
  apply = transformer.apply_fn(lm.config)
  texts = ['to be or not', 'a b', 'the question']
  batch = packing.pack([lm.tokenizer.encode(text) for text in texts], 16)
  value, metrics = jax.jit(objectives.next_token(apply))(lm.params, None, batch)
  apply = jax.jit(apply)
  total, count = 0.0, 0
  for text in texts:
    ids = np.array(lm.tokenizer.encode(text))
    # Attention is causal: what fills a row up does not matter.
    row = np.pad(ids, (0, 16 - len(ids)))[None]
    logits = np.asarray(apply(lm.params, row)[0].logits[0], float)
    chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(chance[np.arange(len(ids) - 1), ids[1:]])
    total, count = total + float(nats.sum()), count + len(nats)
  np.testing.assert_allclose(value, total / count, rtol=1e-5)
  assert metrics['weight'] == count
