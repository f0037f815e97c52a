"""Inside `shard_map`: which arrays differ from device to device.

JAX checks it for every operation, and a kernel or a loop must say it of what it
makes. Outside of `shard_map` all of this does nothing.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def alike(tree: Any) -> Any:
  """Marks all arrays as varying over what any of them varies over.

  So that the gradient of an array that devices share, each using it with its
  own part of another, is summed over the devices: JAX does that for the mark,
  and cannot know it of an operation that brings its own gradient.
  """
  return like(tree, tree)


def like(tree: Any, others: Any) -> Any:
  """Marks all arrays as varying over what any of `others` varies over."""
  axes = frozenset().union(*map(_axes, jax.tree.leaves(others)))
  return jax.tree.map(lambda x: _varying(x, axes), tree)


def full(
  shape: tuple[int, ...], value: Any, dtype: Any, other: jax.Array
) -> jax.Array:
  """An array of one value that varies as another: where a loop begins."""
  return like(jnp.full(shape, value, dtype), other)


def out_shape(
  shape: tuple[int, ...], dtype: Any, other: jax.Array
) -> jax.ShapeDtypeStruct:
  """What a kernel makes, varying as an array that it reads."""
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=jax.typeof(other).manual_axis_type
  )


def _axes(array: jax.Array) -> frozenset[str]:
  return frozenset(jax.typeof(array).manual_axis_type.varying)


def _varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
  missing = tuple(axes - _axes(array))
  return lax.pcast(array, missing, to='varying') if missing else array
