"""Quantization-aware training: a model learns to live with its rounding.

    params = qat.prepare(params, [('kernel$', absmax.Integers(bits=4, per=32))])
    ...                                   # train params as those of any model
    params = qat.freeze(params)           # integers, the same numbers

Weights in training are floats, rounded on their way into every product, and the
gradient passes as if they were not (arXiv 1712.05877). The scale of activations
is found at every product; or learnt with the weights (LSQ, arXiv 1902.08153);
or the running mean of what was seen. What `freeze` makes computes the same
integers: training has seen the numbers that inference will see.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import jax
import jax.numpy as jnp

from efficiency_jax import leaves
from efficiency_jax import trees
from efficiency_jax.quantization import rules
from efficiency_jax.types import Params


def prepare(
  params: Params,
  rules_: Sequence[rules.Rule],
  x_scales: Mapping[str, jax.Array] | None = None,
) -> Params:
  """Puts a `FakeTensor` where a rule applies.

  Args:
    params: Of a model, plain arrays where a rule applies.
    rules_: As those of `rules.quantize`, of methods without calibration.
    x_scales: By path, where the scale of activations begins; such scales are
      parameters. Others are found at every product.

  Raises:
    ValueError: As `rules.quantize`, or a method needs calibration.
  """
  scales = dict(x_scales or {})

  def fake(path, weight, method):
    if getattr(method, 'calibrated', False):
      raise ValueError(f'{path}: {method.name} is not for training.')
    return leaves.FakeTensor(
      weight=weight,
      x_scale=scales.pop(path, None),
      method=method,
      transposed=path.endswith('table'),
    )

  prepared = rules.replace(params, rules_, fake)
  if scales:
    raise ValueError(
      f'x_scales has {sorted(scales)[0]!r}, where no rule applies.'
    )
  return prepared


def freeze(params: Params) -> Params:
  """The trained model in integers: a `QTensor` for each `FakeTensor`."""
  return _each(lambda fake: leaves.check(fake.quantized()), params)


def latent(params: Params) -> Params:
  """The trained weights in floats, as if nothing was ever rounded."""
  return _each(lambda fake: fake.weight, params)


def with_running_scales(
  params: Params,
  seen: Mapping[str, jax.Array],
  decay: float = 0.99,
) -> Params:
  """Moves scales of activations towards what a batch asked for.

  s <- decay s + (1 - decay) max |x| / b: exponential averages instead of
  learning, between steps.

  Args:
    params: Prepared with `x_scales`.
    seen: The largest |x| of every product by the path of its weight, of
      `calibration.captured` with `lambda x: jnp.abs(x).max()`.
    decay: Of the average.
  """

  def one(path, leaf):
    if not isinstance(leaf, leaves.FakeTensor) or leaf.x_scale is None:
      return leaf
    largest = 2 ** (leaf.method.activation.bits - 1) - 1
    new = seen[trees.path_string(path)] / largest
    scale = decay * leaf.x_scale + (1 - decay) * new
    return dataclasses.replace(leaf, x_scale=jnp.float32(scale))

  is_leaf = lambda node: isinstance(node, leaves.FakeTensor)
  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_leaf)


def _each(change, params: Params) -> Params:
  is_leaf = lambda node: isinstance(node, leaves.FakeTensor)
  one = lambda leaf: change(leaf) if is_leaf(leaf) else leaf
  return jax.tree.map(one, params, is_leaf=is_leaf)
