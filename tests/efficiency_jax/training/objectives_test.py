"""Tests of the losses of trained drafts as the training step takes them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import eagle_training
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import medusa_training
from efficiency_jax.models import transformer
from efficiency_jax.training import objectives
from efficiency_jax.training import state as train_state
from efficiency_jax.training import step as steps
from tests import fixtures
from tests.efficiency_jax.decoding import eagle_models

_OPTIONS = {
  'steps': 2,
  'objectives': (('cross_entropy', 0.3), ('total_variation', 0.7)),
  'decay': 0.5,
}


def _problem(rows: int = 4, **fields):
  """A target, a draft of six of its tokens, and kept states of some texts."""
  form = eagle.Form(target=fixtures.config(**fields), vocabulary=6)
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


@pytest.mark.parametrize('tied', [True, False])
def test_drafts_read_embedding_and_head_alone(tied):
  target = fixtures.params(fixtures.config(tie_embeddings=tied))
  read = objectives.frozen(target)
  assert read.keys() == {'target'}
  names = {'embedding'} if tied else {'embedding', 'head'}
  assert read['target'].keys() == names
  for name in names:
    assert read['target'][name]['table'] is target[name]['table']


def test_a_vocabulary_is_frozen_beside_them():
  target = fixtures.params(fixtures.config())
  read = objectives.frozen(target, np.array([3, 1, 2], np.int64))
  assert read.keys() == {'target', 'vocabulary'}
  assert read['vocabulary'].dtype == jnp.int32
  assert read['vocabulary'].tolist() == [3, 1, 2]


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


def test_the_loss_of_heads_is_that_of_medusa_training():
  target = fixtures.config()
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
