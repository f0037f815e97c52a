"""Layout of activations, and blocks that are computed again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.distributed import activations
from efficiency_jax.distributed import mesh as meshes
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from tests import fixtures

CONFIG = fixtures.config(qkv_bias=True, post_norms=True, windows=(None, 5))


@pytest.fixture(scope='module')
def model():
  apply = transformer.apply_fn(CONFIG, 'blockwise')
  params = transformer.init(CONFIG, jax.random.key(0))
  # More rows than a product of few rows has, which is no dot to a policy.
  tokens = jnp.arange(36, dtype=jnp.int32).reshape(3, 12) % 11

  def loss(run):
    one = lambda p: jnp.square(run(p, tokens)[0].logits).mean()
    return jax.jit(jax.value_and_grad(one))(params)

  return apply, params, tokens, loss, loss(apply)


@pytest.mark.parametrize('remat', activations.REMAT)
def test_outputs_and_gradients_stay(model, remat):
  apply, _, _, loss, (expected, gradient) = model
  found, found_gradient = loss(activations.wrap(apply, None, remat))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    found_gradient,
    gradient,
  )


def test_blocks_keep_less_than_dots_and_dots_less_than_all(model):
  apply, params, tokens, *_ = model

  def kept_bytes(remat):
    """Of what the forward pass hands to the backward pass."""
    run = activations.wrap(apply, None, remat)
    forward = lambda p: jax.vjp(lambda p: run(p, tokens)[0].logits, p)[1]
    arrays = jax.tree.leaves(jax.eval_shape(forward, params))
    return sum(x.size * x.dtype.itemsize for x in arrays)

  none, dots, blocks = (kept_bytes(remat) for remat in activations.REMAT)
  weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert none - weights > 1.3 * (dots - weights)
  assert dots - weights > 1.3 * (blocks - weights)


def test_a_cache_goes_through_wrapped_blocks():
  config = fixtures.config()
  apply = transformer.apply_fn(config, 'blockwise')
  wrapped = activations.wrap(apply, meshes.make(data=2, fsdp=4), 'blocks')
  params = transformer.init(config, jax.random.key(0))
  tokens = jnp.ones((8, 3), jnp.int32)
  cache = kv_cache.init(config, 8, 128, jnp.float32)
  expected, _ = jax.jit(apply)(params, tokens, cache)
  found, grown = jax.jit(wrapped)(params, tokens, cache)
  np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
  assert grown.length.tolist() == [3] * 8


def test_rows_stay_split_between_blocks():
  config = fixtures.config(width=32, num_heads=8, num_kv_heads=8)
  mesh = meshes.make(data=2, fsdp=4)
  apply = activations.wrap(transformer.apply_fn(config), mesh)
  params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((8, 12), jnp.int32)
  program = jax.jit(
    lambda p, t: apply(p, t)[0].hidden,
    in_shardings=(meshes.shardings(params, mesh), meshes.batch_sharding(mesh)),
  ).lower(params, tokens)
  hidden = program.compile().output_shardings
  assert hidden.shard_shape((8, 12, 32)) == (1, 12, 32)


def test_it_compiles_nothing_twice():
  apply = transformer.apply_fn(fixtures.config())
  mesh = meshes.make(data=2, fsdp=4)
  wrapped = activations.wrap(apply, mesh, 'dots')
  assert wrapped is activations.wrap(apply, meshes.make(fsdp=4), 'dots')


def test_local_blocks_need_rows_alone_to_be_split():
  apply = transformer.apply_fn(fixtures.config())
  for mesh in (None, meshes.make(data=4, tensor=2)):
    with pytest.raises(ValueError, match='local needs a mesh with tensor=1'):
      activations.wrap(apply, mesh, local=True)


def test_an_unknown_remat_is_refused():
  with pytest.raises(ValueError, match='remat must be one of none, dots, bl'):
    activations.wrap(transformer.apply_fn(fixtures.config()), None, 'some')
