"""Tests of one update."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax.training import state as train_state
from efficiency_jax.training import step as steps

pytestmark = pytest.mark.short


def _loss(params, frozen, batch):
  """Mean squared error over the rows that `mask` keeps."""
  error = batch['x'] @ params['w'] + frozen['b'] - batch['y']
  weight = batch['mask'].sum()
  mean = (batch['mask'] * error**2).sum() / jnp.maximum(weight, 1)
  return mean, {'weight': weight, 'error': (batch['mask'] * error).sum()}


def _problem(rows=12):
  rng = np.random.default_rng(0)
  batch = {
    'x': rng.normal(size=(rows, 3)),
    'y': rng.normal(size=rows),
    'mask': rng.integers(0, 2, rows),
  }
  batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
  params = {'w': jnp.asarray(rng.normal(size=3), jnp.float32)}
  return params, {'b': jnp.float32(0.5)}, batch


def test_is_gradient_descent():
  params, frozen, batch = _problem()
  optimizer = optax.sgd(0.1)
  state = train_state.create(params, optimizer)
  step = jax.jit(steps.make_step(_loss, optimizer))
  new, metrics = step(state, frozen, batch)
  x, y, m = (np.asarray(batch[k], np.float64) for k in ('x', 'y', 'mask'))
  error = x @ np.asarray(params['w']) + 0.5 - y
  gradient = 2 * (m * error) @ x / m.sum()
  np.testing.assert_allclose(
    new.params['w'], params['w'] - 0.1 * gradient, rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['gradient_norm'], np.linalg.norm(gradient), rtol=1e-5
  )
  np.testing.assert_allclose(
    metrics['loss'], (m * error**2).sum() / m.sum(), rtol=1e-5
  )
  assert new.step == 1
  assert new.average is None


@pytest.mark.parametrize('parts', [2, 3, 12])
def test_a_batch_in_parts_is_the_batch_in_one(parts):
  # The parts count different numbers of rows, some of them none.
  params, frozen, batch = _problem()
  optimizer = optax.sgd(0.1)
  state = train_state.create(params, optimizer)
  whole = steps.make_step(_loss, optimizer)(state, frozen, batch)
  step = steps.make_step(_loss, optimizer, accumulation=parts)
  split = jax.jit(step)(state, frozen, batch)
  chex.assert_trees_all_close(whole[0].params, split[0].params, rtol=1e-5)
  for name in ('loss', 'gradient_norm', 'weight'):
    np.testing.assert_allclose(split[1][name], whole[1][name], rtol=1e-5)


def test_parts_must_divide_the_batch():
  params, frozen, batch = _problem()
  optimizer = optax.sgd(0.1)
  step = steps.make_step(_loss, optimizer, accumulation=5)
  with pytest.raises(ValueError, match='5 must divide the batch, which has 12'):
    step(train_state.create(params, optimizer), frozen, batch)


def test_the_loss_sees_the_compute_dtype_and_parameters_keep_theirs():
  params, frozen, batch = _problem()
  seen = []

  def loss(params, frozen, batch):
    seen.append((params['w'].dtype, frozen['b'].dtype))
    return _loss(params, frozen, batch)

  optimizer = optax.sgd(0.1)
  step = steps.make_step(loss, optimizer, compute_dtype=jnp.bfloat16)
  new, _ = step(train_state.create(params, optimizer), frozen, batch)
  assert seen[0] == (jnp.bfloat16, jnp.bfloat16)
  assert new.params['w'].dtype == jnp.float32
  # An update far below the resolution of bfloat16 is not lost.
  tiny = steps.make_step(loss, optax.sgd(1e-5), compute_dtype=jnp.bfloat16)
  new, _ = tiny(train_state.create(params, optimizer), frozen, batch)
  assert (new.params['w'] != params['w']).all()


def test_the_average_moves_by_its_decay():
  params, frozen, batch = _problem()
  optimizer = optax.sgd(0.1)
  state = train_state.create(params, optimizer, averaged=True)
  step = steps.make_step(_loss, optimizer, average_decay=0.75)
  new, _ = step(state, frozen, batch)
  expected = 0.75 * params['w'] + 0.25 * new.params['w']
  np.testing.assert_allclose(new.average['w'], expected, rtol=1e-6)


def test_the_evaluation_is_the_loss():
  params, frozen, batch = _problem()
  metrics = steps.make_evaluation(_loss)(params, frozen, batch)
  np.testing.assert_allclose(metrics['loss'], _loss(params, frozen, batch)[0])


@pytest.mark.parametrize('parts', [1, 3])
def test_a_loss_is_told_which_part_of_the_run_it_sees(parts):
  params, frozen, batch = _problem()

  def loss(params, frozen, batch):
    value, _ = _loss(params, frozen, batch)
    step = batch['step'].astype(jnp.float32)
    return value, {'step': step, 'square': step**2}

  optimizer = optax.sgd(0.1)
  update = jax.jit(steps.make_step(loss, optimizer, accumulation=parts))
  state, seen = train_state.create(params, optimizer), []
  for _ in range(2):
    state, metrics = update(state, frozen, batch)
    seen.append(metrics)
  for number, metrics in enumerate(seen):
    of = np.arange(parts) + number * parts
    np.testing.assert_allclose(metrics['step'], of.mean())
    np.testing.assert_allclose(metrics['square'], (of**2).mean())
  with pytest.raises(KeyError):
    steps.make_evaluation(loss)(params, frozen, batch)
