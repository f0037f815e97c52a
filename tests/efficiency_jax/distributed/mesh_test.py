"""Meshes and layouts on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import trees
from efficiency_jax.distributed import mesh as meshes
from efficiency_jax.models import transformer
from tests import fixtures
from tests.efficiency_jax.distributed import tiny_training

P = jax.sharding.PartitionSpec


@pytest.fixture(scope='module')
def single():
  mesh = meshes.make(devices=jax.devices()[:1])
  losses, state = tiny_training.train(mesh)
  assert losses[-1] < losses[0]
  return losses, jax.device_get(state)


LAYOUTS = [
  {'data': 8},
  {'data': 1, 'fsdp': 8},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
]


@pytest.mark.parametrize('sizes', LAYOUTS, ids=str)
def test_a_layout_changes_no_loss_and_no_parameter(single, sizes):
  losses, state = tiny_training.train(meshes.make(**sizes))
  expected, expected_state = single
  np.testing.assert_allclose(losses, expected, atol=1e-5)
  # Adam divides by a gradient's size, so that rounding shows where it is 0.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
    jax.device_get(state.params),
    expected_state.params,
  )
  tensor, fsdp = sizes.get('tensor', 1), sizes.get('fsdp', 1)
  for tree in (state.params, state.average, state.opt_state[0].mu):
    held = {
      path: leaf.addressable_shards[3].data.shape
      for path, leaf in trees.leaves(tree)
    }
    assert held['embedding/table'] == (64 // tensor, 32 // fsdp)
    assert held['layers_0/attention/qkv/kernel'] == (32 // fsdp, 128 // tensor)
    assert held['layers_0/attention/output/kernel'] == (
      64 // tensor,
      32 // fsdp,
    )
    assert held['layers_0/ffn/gate_up/kernel'] == (32 // fsdp, 128 // tensor)
    assert held['layers_0/ffn/down/kernel'] == (64 // tensor, 32 // fsdp)
    assert held['final_norm/scale'] == (32,)


@pytest.mark.parametrize(
  'options', [{'remat': 'dots'}, {'remat': 'blocks', 'local': True}], ids=str
)
def test_how_blocks_run_changes_no_loss(single, options):
  losses, state = tiny_training.train(meshes.make(data=2, fsdp=4), **options)
  np.testing.assert_allclose(losses, single[0], atol=1e-5)
  kernel = state.params['layers_0']['ffn']['down']['kernel']
  assert kernel.addressable_shards[0].data.shape == (64, 8)


def test_every_matrix_of_a_decoder_is_split_both_ways():
  config = fixtures.every_option(vocab_size=12)
  params = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  mesh = meshes.make(data=2, fsdp=2, tensor=2)
  layout, report = meshes.plan(params, mesh)
  assert report.replicated == ()
  for path, sharding in trees.leaves(layout):
    spec = sharding.spec
    if path.endswith(('kernel', 'table')):
      assert set(spec) == {'fsdp', 'tensor'}, path
    elif path.endswith(('qkv/bias', 'gate_up/bias')):
      assert spec == P('tensor'), path
    else:
      assert path.endswith(('scale', 'output/bias', 'down/bias')), path
      assert spec == P(None), path


def test_an_axis_that_does_not_divide_is_copied_and_reported():
  tree = {'embedding': {'table': jax.ShapeDtypeStruct((11, 16), jnp.float32)}}
  mesh = meshes.make(data=2, fsdp=2, tensor=2)
  layout, report = meshes.plan(tree, mesh)
  assert layout['embedding']['table'].spec == P(None, 'fsdp')
  assert report.replicated == (
    'embedding/table: axis 0 (vocabulary, 11) is no multiple of tensor=2 and'
    ' is copied.',
  )
  assert report.total_bytes == 4 * 11 * 16
  assert report.device_bytes == 4 * 11 * 8


@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((300, 512), P(None, 'fsdp')),
    ((512, 300), P('fsdp')),
    ((2**14,), P('fsdp')),
    ((2**14 - 4,), P()),  # small
    ((301, 303), P()),  # in no part of four
    ((), P()),
  ],
)
def test_a_leaf_without_a_rule_is_split_along_its_largest_axis(shape, spec):
  tree = {'other': jax.ShapeDtypeStruct(shape, jnp.float32)}
  mesh = meshes.make(data=2, fsdp=4)
  found = meshes.shardings(tree, mesh)['other']
  assert found.is_equivalent_to(
    jax.sharding.NamedSharding(mesh, spec), len(shape)
  )


def test_rules_can_be_replaced():
  tree = {'head': {'table': jax.ShapeDtypeStruct((16, 8), jnp.float32)}}
  mesh = meshes.make(data=1, fsdp=8)
  rules = [('head/table', ('width', None)), *meshes.RULES]
  assert meshes.shardings(tree, mesh)['head']['table'].spec == P(None, 'fsdp')
  layout = meshes.shardings(tree, mesh, rules)
  assert layout['head']['table'].spec == P('fsdp', None)


def test_created_in_parts_is_what_is_created_whole():
  mesh = meshes.make(data=2, fsdp=2, tensor=2)
  made = meshes.create(tiny_training.make_state, mesh)
  whole = jax.jit(tiny_training.make_state)()
  jax.tree.map(np.testing.assert_array_equal, made, whole)
  kernel = made.params['layers_0']['ffn']['down']['kernel']
  assert kernel.addressable_shards[0].data.shape == (32, 16)


@pytest.mark.parametrize(
  ('sizes', 'shape'),
  [
    ({}, (8, 1, 1)),
    ({'data': 2, 'fsdp': -1}, (2, 4, 1)),
    ({'data': 1, 'fsdp': 2, 'tensor': -1}, (1, 2, 4)),
  ],
)
def test_sizes_of_a_mesh(sizes, shape):
  mesh = meshes.make(**sizes)
  assert tuple(mesh.shape[axis] for axis in meshes.AXES) == shape
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'data': 3}, 'data=3, fsdp=1, tensor=1 is for 3 devices, and there are 8'),
    ({'tensor': 3}, 'is for a multiple of 3 devices, and there are 8'),
    ({'fsdp': -1}, 'only one of data=-1, fsdp=-1, tensor=1 may be -1'),
    ({'fsdp': 0}, 'fsdp must be >= 1, or -1 for the rest, got 0'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    meshes.make(**sizes)
