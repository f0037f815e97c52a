"""Weights that are integers already, set to multiply integers.

A model that was loaded packed (`pretrained.load(..., packed=True)`), or
quantized for its weights alone, multiplies floats. Here its leaves are told to
round what they multiply as well, and the weights stay what they are: nearly as
llama.cpp computes with the same file, whose rows are rounded 32 at a time.
"""

from collections.abc import Mapping
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import leaves
from efficiency_jax.types import Params

# Codes of Q4_1: unsigned integers, which are their own values.
_COUNTING = np.arange(16, dtype=np.float32)
_ROWS_OF_8_BITS = leaves.Activation()


def in_integers(
  params: Params, activation: leaves.Activation = _ROWS_OF_8_BITS
) -> Params:
  """Gives every `QTensor` of integers an activation.

  4-bit codes that count from 0 become signed, q - 8, and their offset o + 8 s:
  the same weights, but for the rounding of that sum. Other codebooks (NF4),
  floats and leaves with outliers stay as they are.

  Raises:
    ValueError: No leaf holds integers.
  """
  changed = []

  def one(leaf):
    if not isinstance(leaf, leaves.QTensor):
      return leaf
    q = _signed(leaf)
    integers = jnp.issubdtype(q.values.dtype, jnp.integer)
    if q.codebook is not None or q.outliers is not None or not integers:
      return leaf
    changed.append(q)
    return leaves.check(dataclasses.replace(q, activation=activation))

  is_leaf = lambda node: not isinstance(node, Mapping)
  params = jax.tree.map(one, params, is_leaf=is_leaf)
  if not changed:
    raise ValueError(
      'no weight is stored as integers: quantize the model, or load it packed.'
    )
  return params


def _signed(q: leaves.QTensor) -> leaves.QTensor:
  """Codes 0 .. 15 as -8 .. 7."""
  if q.codebook is None or q.bits != 4:
    return q
  if not np.array_equal(np.asarray(q.codebook), _COUNTING):
    return q
  moved = 8 * leaves.float_scales(q.scales).astype(jnp.float32)
  offsets = (
    moved if q.offsets is None else q.offsets.astype(jnp.float32) + moved
  )
  # q - 8 in two's complement is the code with its highest bit turned.
  values = q.values ^ jnp.uint8(0x88)
  return dataclasses.replace(q, values=values, offsets=offsets, codebook=None)
