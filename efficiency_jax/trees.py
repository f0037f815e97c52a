"""Parameter trees: paths, sizes, dtypes.

A path is the keys from the root joined by '/', for example
`layers_3/attention/qkv/kernel`; rules of weight techniques are regular
expressions on it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import re
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from efficiency_jax.types import Params

_Action = TypeVar('_Action')


def path_string(path: tuple[Any, ...]) -> str:
  """A `jax.tree_util` key path as `layers_0/attention/qkv/kernel`."""
  return '/'.join(
    str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))
    for key in path
  )


def leaves(tree: Params) -> Iterator[tuple[str, jax.Array]]:
  """Pairs of path and leaf, in the order of `jax.tree.leaves`."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield path_string(path), leaf


def whole(tree: Params) -> Iterator[tuple[str, Any]]:
  """Pairs of path and leaf, where a typed leaf is one and not its arrays."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=_is_whole
  ):
    yield path_string(path), leaf


def replace(
  tree: Params,
  rules: Sequence[tuple[str, _Action | None]],
  change: Callable[[str, Any, _Action], Any],
) -> Params:
  """Puts `change(path, leaf, action)` where a rule with an action applies.

  A rule is a regular expression, searched for in paths, and what to do there,
  None for nothing. The first that matches a path counts.

  Args:
    tree: Nested mappings; a typed leaf is replaced whole.
    rules: In order.
    change: Is called in the order of the tree.

  Raises:
    ValueError: There is no rule, or one applies to nothing.
  """
  rules = list(rules)
  if not rules:
    raise ValueError('rules are empty: give at least one.')
  paths = [path for path, _ in whole(tree)]
  chosen = {
    path: next((n for n, r in enumerate(rules) if re.search(r[0], path)), None)
    for path in paths
  }
  for number, (pattern, _) in enumerate(rules):
    if number not in chosen.values():
      raise ValueError(
        f'rule {pattern!r} applies to nothing: an earlier rule took it or it'
        f' matches no path; paths are like {paths[-1]!r}.'
      )

  def one(path, leaf):
    path = path_string(path)
    action = None if chosen[path] is None else rules[chosen[path]][1]
    return leaf if action is None else change(path, leaf, action)

  return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_whole)


def count_bytes(tree: Any) -> int:
  """Bytes that the arrays of `tree` take in memory."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def count_parameters(tree: Any) -> int:
  """Number of scalars in the arrays of `tree`."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def cast(tree: Params, dtype: Any) -> Params:
  """Casts the floating-point leaves of `tree` to `dtype`; others stay."""

  def one(leaf):
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(dtype) if floating else leaf

  return jax.tree.map(one, tree)


def _is_whole(node: Any) -> bool:
  return not isinstance(node, Mapping)
