"""Tests of optimizer state in the host's memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax.distributed import mesh as meshes
from efficiency_jax.io.checkpoint import Store
from efficiency_jax.training import offload
from efficiency_jax.training import state as states
from efficiency_jax.training import step as steps

pytestmark = pytest.mark.short


def _loss(params, frozen, batch):
  error = batch['x'] @ params['w'] + params['b'] - frozen
  return jnp.mean(error**2), {}


def _start(optimizer):
  w = jax.random.normal(jax.random.key(0), (16, 8))
  return states.create({'w': w, 'b': jnp.zeros(8)}, optimizer)


def _batches(count):
  keys = jax.random.split(jax.random.key(1), count)
  return [{'x': jax.random.normal(key, (8, 16))} for key in keys]


def _kinds(state):
  leaves = jax.tree.leaves(state.opt_state)
  return {x.sharding.memory_kind for x in leaves if jnp.ndim(x)}


def test_an_offloaded_optimizer_takes_the_same_steps_and_stays_on_the_host():
  plain = optax.adamw(0.1)
  frozen = jnp.float32(0.5)
  ends = []
  for optimizer in (plain, offload.offloaded(plain)):
    state = _start(optimizer)
    update = jax.jit(steps.make_step(_loss, optimizer), donate_argnums=0)
    for batch in _batches(4):
      state, _ = update(state, frozen, batch)
    ends.append(state)
  chex.assert_trees_all_equal(ends[0].params, ends[1].params)
  chex.assert_trees_all_equal(
    jax.tree.map(np.asarray, ends[0].opt_state),
    jax.tree.map(np.asarray, ends[1].opt_state),
  )
  assert _kinds(ends[0]) == {'device'}
  assert _kinds(ends[1]) == {'pinned_host'}
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(ends[1].params)}
  assert kinds == {'device'}


def test_the_state_comes_back_from_a_checkpoint_to_the_host(tmp_path):
  optimizer = offload.offloaded(optax.adam(0.1))
  state = _start(optimizer)
  state, _ = jax.jit(steps.make_step(_loss, optimizer))(
    state, jnp.float32(0), _batches(1)[0]
  )
  store = Store(folder=tmp_path)
  store.save(1, state)
  read, _ = store.load(1, _start(optimizer))
  assert _kinds(read) == {'pinned_host'}
  chex.assert_trees_all_equal(
    jax.tree.map(np.asarray, read.opt_state),
    jax.tree.map(np.asarray, state.opt_state),
  )


def test_a_mesh_splits_the_state_on_the_host():
  plain = optax.adam(0.1)
  mesh = meshes.make(data=2, fsdp=4)
  frozen, batch = jnp.float32(0.5), _batches(1)[0]
  expected, _ = steps.make_step(_loss, plain)(_start(plain), frozen, batch)

  optimizer = offload.offloaded(plain)
  state = _start(optimizer)
  state = meshes.shard(state, mesh)
  update = meshes.jit_step(
    steps.make_step(_loss, optimizer), mesh, state, frozen
  )
  state, _ = update(state, frozen, batch)
  assert _kinds(state) == {'pinned_host'}
  chex.assert_trees_all_close(
    jax.tree.map(np.asarray, state.params),
    jax.tree.map(np.asarray, expected.params),
    rtol=1e-6,
  )
