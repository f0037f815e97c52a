"""Parameter trees: paths, sizes, dtypes.

A path is the keys from the root joined by '/', for example
`layers_3/attention/qkv/kernel`; rules of weight techniques are regular
expressions on it.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from efficiency_jax.types import Params


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
