"""Parameter trees: paths, sizes, dtypes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from efficiency_jax import trees
from tests import fixtures


class _Leaf(NamedTuple):
  packed: jax.Array
  scale: jax.Array


_TREE = {
  'layers_0': {'qkv': {'kernel': jnp.ones((2, 3)), 'count': jnp.arange(4)}},
  'head': _Leaf(jnp.ones((5,), jnp.int8), jnp.ones((), jnp.bfloat16)),
  'list': [jnp.zeros(2)],
}


def test_paths_join_names_fields_and_places():
  assert [path for path, _ in trees.leaves(_TREE)] == [
    'head/packed',
    'head/scale',
    'layers_0/qkv/count',
    'layers_0/qkv/kernel',
    'list/0',
  ]
  leaves = [leaf for _, leaf in trees.leaves(_TREE)]
  assert all(a is b for a, b in zip(leaves, jax.tree.leaves(_TREE)))


def test_sizes_count_all_leaves():
  assert trees.count_parameters(_TREE) == 6 + 4 + 5 + 1 + 2
  assert trees.count_bytes(_TREE) == 4 * 6 + 4 * 4 + 5 + 2 + 4 * 2
  config = fixtures.config()
  params = fixtures.params(config)
  # Embedding, final norm, and a layer: two norms, qkv, output, gate_up, down.
  layer = 2 * 16 + 16 * 32 + 16 * 16 + 16 * 48 + 24 * 16
  assert trees.count_parameters(params) == 11 * 16 + 16 + 2 * layer


def test_casting_leaves_whole_numbers_alone():
  cast = trees.cast(_TREE, jnp.bfloat16)
  dtypes = {path: leaf.dtype for path, leaf in trees.leaves(cast)}
  assert dtypes == {
    'head/packed': jnp.int8,
    'head/scale': jnp.bfloat16,
    'layers_0/qkv/count': jnp.int32,
    'layers_0/qkv/kernel': jnp.bfloat16,
    'list/0': jnp.bfloat16,
  }


def test_the_first_rule_that_matches_a_path_says_what_happens():
  seen = []

  def change(path, leaf, action):
    seen.append((path, action))
    return action

  rules = [('count', None), ('layers_0', 'a'), ('.', 'b')]
  replaced = trees.replace(_TREE, rules, change)
  # A typed leaf is one.
  assert seen == [('head', 'b'), ('layers_0/qkv/kernel', 'a'), ('list', 'b')]
  assert (
    replaced['layers_0']['qkv']['count'] is _TREE['layers_0']['qkv']['count']
  )
  assert replaced['head'] == 'b'
  assert [path for path, _ in trees.whole(_TREE)] == [
    'head',
    'layers_0/qkv/count',
    'layers_0/qkv/kernel',
    'list',
  ]


@pytest.mark.parametrize(
  ('rules', 'message'),
  [
    ([], 'rules are empty'),
    ([('nothing', 1)], "'nothing' applies to nothing"),
    ([('.', None), ('head', 1)], 'an earlier rule took it'),
  ],
)
def test_a_rule_that_applies_to_nothing_is_refused(rules, message):
  with pytest.raises(ValueError, match=message):
    trees.replace(_TREE, rules, lambda path, leaf, action: leaf)
