"""LoRA: a model changed by training few weights (arXiv 2106.09685).

Beside a frozen kernel W stands a trained product of low rank,

    x W + (alpha / r) x A B,      A [I, r] random, B [r, O] zeros at first

so that the adapted model begins as the model itself: bit for bit, but for what
a compiler that fuses other operations makes of it.

    adapted, report = adapt(params, ['/kernel$'], rank=8, alpha=16, key=key)
    trained = factors(adapted)                  # what an optimizer sees
    adapted = with_factors(adapted, trained)    # after it has changed them
    params = merge(adapted)                     # plain arrays again

`base(adapted)` is the model with its adapter switched off.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficiency_jax import trees
from efficiency_jax.leaves import LoraTensor
from efficiency_jax.leaves import PanelTensor
from efficiency_jax.leaves import QTensor
from efficiency_jax.leaves import dequantize
from efficiency_jax.types import Params


class Report(NamedTuple):
  """What `adapt` did."""

  paths: tuple[str, ...]  # of the adapted kernels
  trained: int  # numbers in all A and B
  frozen: int  # numbers in the model itself


def adapt(
  params: Params,
  rules: Iterable[str],
  rank: int,
  alpha: float,
  key: jax.Array,
) -> tuple[Params, Report]:
  """Puts a `LoraTensor` where a rule matches.

  Args:
    params: Of a model.
    rules: Regular expressions for the paths of leaves
      (`layers_3/attention/qkv/kernel`), as those of `trees.replace`.
    rank: r, of every correction.
    alpha: Over r it is the scale of the corrections.
    key: Of A, whose entries are normal with variance 1 / I.

  Returns:
    The adapted parameters, whose other leaves are those given, and a report.

  Raises:
    ValueError: The rank is below 1, a rule applies to nothing, or it matches
      something else than a kernel [I, O] that `linear` reads.
  """
  if rank < 1:
    raise ValueError(f'rank must be >= 1, got {rank}.')
  chosen = []

  def check(path, leaf, _):
    if isinstance(leaf, LoraTensor):
      raise ValueError(f'{path} is adapted already: make the rules narrower.')
    if len(leaf.shape) != 2 or not path.endswith('kernel'):
      raise ValueError(
        f'only kernels [I, O] can be adapted, and {path} {list(leaf.shape)} is'
        ' none: make the rules narrower.'
      )
    chosen.append(path)
    return leaf

  rules = [(rule, True) for rule in rules]
  trees.replace(params, rules, check)
  keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))

  def one(path, leaf, _):
    wide, out = leaf.shape
    return LoraTensor(
      base=leaf,
      a=jax.random.normal(keys[path], (wide, rank)) * wide**-0.5,
      b=jnp.zeros((rank, out)),
      scale=alpha / rank,
    )

  adapted = trees.replace(params, rules, one)
  trained = trees.count_parameters(factors(adapted))
  report = Report(tuple(chosen), trained, trees.count_parameters(params))
  return adapted, report


def factors(params: Params) -> Params:
  """What is trained: `{'a': A, 'b': B}` in the place of each adapted kernel.

  Other parameters are left out.
  """
  if isinstance(params, LoraTensor):
    return {'a': params.a, 'b': params.b}
  inner = {
    name: factors(node)
    for name, node in params.items()
    if isinstance(node, (Mapping, LoraTensor))
  }
  return {name: node for name, node in inner.items() if node}


def with_factors(params: Params, factors: Params) -> Params:
  """Adapted parameters with other A and B, in the form of `factors`."""
  if isinstance(params, LoraTensor):
    return LoraTensor(base=params.base, **factors, scale=params.scale)
  return {
    name: with_factors(node, factors[name]) if name in factors else node
    for name, node in params.items()
  }


def base(params: Params) -> Params:
  """The model with its adapter switched off."""
  return _each(lambda leaf: leaf.base, params)


def merge(params: Params) -> Params:
  """The adapted model in plain arrays, W + (alpha / r) A B, rounded once.

  A kernel in few bits becomes an array too: rounded to them again, it would be
  another model.
  """

  def one(leaf: LoraTensor) -> jax.Array:
    product = jnp.matmul(leaf.a, leaf.b, precision='highest')
    base = leaf.base
    if isinstance(base, QTensor | PanelTensor):
      base = dequantize(base)
    total = base.astype(jnp.float32) + leaf.scale * product
    return total.astype(leaf.base.dtype)

  return _each(one, params)


def _each(change: Callable[[LoraTensor], jax.Array], params: Params) -> Params:
  is_leaf = lambda node: isinstance(node, LoraTensor)
  one = lambda leaf: change(leaf) if is_leaf(leaf) else leaf
  return jax.tree.map(one, params, is_leaf=is_leaf)
