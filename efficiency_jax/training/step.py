"""One update of the parameters: a pure function, to be compiled.

    g = gradient of the loss over the whole batch
    params <- params + optimizer(g)

A loss is a mean over what it counts (tokens, mostly) and says how much that is,
so that a batch taken in parts, or on several devices, has the same gradient as
the batch in one: the parts are weighed by what they count, not alike.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from efficiency_jax import trees
from efficiency_jax.training.state import TrainState
from efficiency_jax.types import Params

Batch = Mapping[str, jax.Array]  # arrays [B, ...]
Metrics = dict[str, jax.Array]  # scalars, float32

# Trained parameters, frozen ones and a batch to the mean loss and further means
# over the same things; `weight` among them is how many things were counted.
Loss = Callable[[Params, Any, Batch], tuple[jax.Array, Metrics]]

Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def make_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  accumulation: int = 1,
  compute_dtype: Any = None,
  average_decay: float = 0.999,
) -> Step:
  """The step `(state, frozen, batch) -> (state, metrics)`, not yet compiled.

  A loss that draws numbers finds in `batch['step']` a [] int32 that counts the
  parts of batches of the whole run, to fold into its key. In evaluation there
  is none.

  Args:
    loss: What is minimized.
    optimizer: Turns gradients into updates.
    accumulation: Parts that a batch is taken in, one after another: memory of
      one part, the gradient of all. Must divide the batch.
    compute_dtype: The loss sees floating parameters, trained and frozen, in
      this dtype; the trained ones themselves, gradients and updates keep
      theirs. None changes nothing.
    average_decay: d of the moving average `a <- d a + (1 - d) params` that a
      state made with `averaged` keeps.

  The metrics are those of the loss over the whole batch, with `loss`,
  `gradient_norm` and `weight`.
  """
  if accumulation < 1:
    raise ValueError(f'accumulation must be >= 1, got {accumulation}.')

  def narrow(tree):
    return tree if compute_dtype is None else trees.cast(tree, compute_dtype)

  def part_loss(params, frozen, batch):
    mean, metrics = loss(narrow(params), frozen, batch)
    mean = mean.astype(jnp.float32)
    metrics = {'weight': jnp.float32(1), **metrics, 'loss': mean}
    return mean, {k: v.astype(jnp.float32) for k, v in metrics.items()}

  gradient = jax.grad(part_loss, has_aux=True)

  def weighed(params, frozen, batch):
    grads, metrics = gradient(params, frozen, batch)
    weight = metrics['weight']
    scale = lambda x: x * weight.astype(x.dtype)
    means = {k: v for k, v in metrics.items() if k != 'weight'}
    return jax.tree.map(scale, (grads, means)), weight

  def step(state, frozen, batch):
    frozen = narrow(frozen)
    count = accumulation * state.step
    if accumulation == 1:
      grads, metrics = gradient(state.params, frozen, {**batch, 'step': count})
    else:
      parts = jax.tree.map(lambda x: _in_parts(x, accumulation), dict(batch))
      parts['step'] = count + jnp.arange(accumulation)
      body = lambda total, part: (
        jax.tree.map(jnp.add, total, weighed(state.params, frozen, part)),
        None,
      )
      first = jax.tree.map(lambda x: x[0], parts)
      zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(weighed, state.params, frozen, first),
      )
      (sums, weight), _ = lax.scan(body, zero, parts)
      mean = lambda x: x / jnp.maximum(weight, 1e-30).astype(x.dtype)
      grads, metrics = jax.tree.map(mean, sums)
      metrics['weight'] = weight
    metrics['gradient_norm'] = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
      average = optax.incremental_update(params, average, 1 - average_decay)
    state = TrainState(state.step + 1, params, opt_state, average)
    return state, metrics

  return step


def make_evaluation(
  loss: Loss, *, compute_dtype: Any = None
) -> Callable[[Params, Any, Batch], Metrics]:
  """The metrics of a batch without gradients, not yet compiled."""

  def evaluate(params, frozen, batch):
    if compute_dtype is not None:
      params = trees.cast(params, compute_dtype)
      frozen = trees.cast(frozen, compute_dtype)
    mean, metrics = loss(params, frozen, batch)
    metrics = {'weight': jnp.float32(1), **metrics, 'loss': mean}
    return {k: v.astype(jnp.float32) for k, v in metrics.items()}

  return evaluate


def _in_parts(x: jax.Array, count: int) -> jax.Array:
  """[B, ...] as [count, B / count, ...]; part i takes every count-th row.

  Strided, so that rows sharded over devices in order stay spread over them.
  """
  if x.shape[0] % count:
    raise ValueError(
      f'accumulation {count} must divide the batch, which has {x.shape[0]}'
      ' rows.'
    )
  return x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
