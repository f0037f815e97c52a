"""How sharply the loss bends along each weight, and bits that follow it.

Q-BERT (arXiv 1909.05840): rounding moves weights a little, and the loss by
about v' H v. Where the top eigenvalue of H is large, few bits cost much, so
such layers get more of them. Over several batches a layer counts as |mean| +
std of its eigenvalues.

    H v = d/dt grad loss(w + t v)        one product, no matrix
    v <- H v / |H v|                     power iteration; v' H v is the
    eigenvalue
"""

from collections.abc import Callable, Iterable, Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficiency_jax import trees
from efficiency_jax.types import Params


def top_eigenvalues(
  loss: Callable[[Params, Any], jax.Array],
  params: Params,
  groups: Mapping[str, str],
  batches: Iterable[Any],
  *,
  iterations: int = 20,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """The eigenvalue of largest magnitude of the Hessian of groups of weights.

  Args:
    loss: Parameters and a batch to a number.
    params: Of a model, plain arrays.
    groups: A name and a regular expression on paths: these weights together.
    batches: What the loss is taken of, one after another.
    iterations: Of the power method. The estimate only grows in magnitude.
    seed: Of where it begins.

  Returns:
    For each name the eigenvalue of each batch: [batches].

  Raises:
    ValueError: A group has no weights, or an eigenvalue is not finite.
  """
  paths = [path for path, _ in trees.leaves(params)]
  for name, pattern in groups.items():
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(
        f'group {name!r}: {pattern!r} matches no path; paths are like'
        f' {paths[-1]!r}.'
      )

  @jax.jit
  def product(direction, batch):
    gradient = lambda p: jax.grad(loss)(p, batch)
    return jax.jvp(gradient, (params,), (direction,))[1]

  found = {name: [] for name in groups}
  for batch in batches:
    for number, (name, pattern) in enumerate(groups.items()):
      key = jax.random.fold_in(jax.random.key(seed), number)
      v = _restricted(_random(params, key), pattern)
      value = 0.0
      for _ in range(iterations):
        v = optax.tree.scale(1 / optax.tree.norm(v), v)
        hv = _restricted(product(v, batch), pattern)
        value = float(optax.tree.vdot(v, hv))
        if not np.isfinite(value):
          raise ValueError(f'the Hessian of group {name!r} is not finite.')
        if value == 0:
          break
        v = hv
      found[name].append(value)
  return {name: np.asarray(values) for name, values in found.items()}


def sensitivity(eigenvalues: np.ndarray) -> float:
  """|mean| + standard deviation over batches (equation 2 of the paper)."""
  return float(abs(eigenvalues.mean()) + eigenvalues.std())


def allocate(
  sensitivities: Mapping[str, float],
  weights: Mapping[str, int],
  *,
  few: int,
  many: int,
  mean_bits: float,
) -> dict[str, int]:
  """Bits for each group: `many` for the most sensitive, `few` for the others.

  In the order of sensitivity groups get `many` bits as long as the mean over
  all weights stays within `mean_bits`; one that does not fit is passed over.

  Args:
    sensitivities: Of each group.
    weights: How many each group has.
    few: Bits of the others.
    many: Bits of the most sensitive.
    mean_bits: What is allowed.

  Raises:
    ValueError: Names differ, or the mean is not between `few` and `many`.
  """
  if set(sensitivities) != set(weights):
    raise ValueError('sensitivities and weights must name the same groups.')
  if not few <= mean_bits <= many:
    raise ValueError(
      f'mean_bits must be between {few} and {many}, got {mean_bits}.'
    )
  total = sum(weights.values())
  room = (mean_bits - few) * total
  bits = dict.fromkeys(sensitivities, few)
  for name in sorted(
    sensitivities, key=sensitivities.__getitem__, reverse=True
  ):
    cost = (many - few) * weights[name]
    # Sums of floats: a budget that is met exactly must count as met.
    if cost <= room * (1 + 1e-9):
      bits[name] = many
      room -= cost
  return bits


def _random(params: Params, key: jax.Array) -> Params:
  flat, structure = jax.tree.flatten(params)
  keys = jax.random.split(key, len(flat))
  return structure.unflatten(
    jax.random.normal(k, leaf.shape, leaf.dtype)
    for k, leaf in zip(keys, flat, strict=True)
  )


def _restricted(tree: Params, pattern: str) -> Params:
  """Zeros outside a group."""
  one = lambda path, leaf: (
    leaf
    if re.search(pattern, trees.path_string(path))
    else jnp.zeros_like(leaf)
  )
  return jax.tree_util.tree_map_with_path(one, tree)
