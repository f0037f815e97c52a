"""What is learnt: losses of trained drafts as the training step takes them.

Their `frozen` argument is what they read of the target: its embedding table,
its output head, and the draft's vocabulary if it has one.
"""

from typing import Any

import jax
import jax.numpy as jnp

from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import eagle_training
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import medusa_training
from efficiency_jax.training.step import Loss
from efficiency_jax.training.step import Metrics
from efficiency_jax.types import Params

# Pairs of a loss's name and its weight.
Objectives = tuple[tuple[str, float], ...]


def frozen(target: Params, vocabulary: jax.Array | None = None) -> Params:
  """The part of the target that drafts read, and the draft's vocabulary."""
  read = {
    name: target[name] for name in ('embedding', 'head') if name in target
  }
  if vocabulary is None:
    return {'target': read}
  return {'target': read, 'vocabulary': jnp.asarray(vocabulary, jnp.int32)}


def widened(batch: Any) -> dict[str, jax.Array]:
  """Kept hidden states are float16; they are computed with in float32."""
  return {**batch, 'hidden': batch['hidden'].astype(jnp.float32)}


def draft(
  form: eagle.Form,
  *,
  steps: int = 3,
  objectives: Objectives = eagle_training.FORWARD_KL,
  decay: float = 0.8,
) -> Loss:
  """The loss of a one-layer draft: see `eagle_training.loss`.

  A batch has `tokens`, `hidden` and `loss_mask`; a metric of step i is called
  `alpha_i` and so on.
  """

  def loss(params, frozen, batch):
    value, metrics = eagle_training.loss(
      form,
      params,
      frozen['target'],
      widened(batch),
      steps,
      vocabulary=frozen.get('vocabulary'),
      objectives=objectives,
      decay=decay,
    )
    return value, _numbered(metrics, batch)

  return loss


def heads(
  form: medusa.Heads,
  output_head: medusa.OutputHead,
  *,
  objectives: Objectives = ((medusa_training.TOKEN, 1.0),),
  decay: float = medusa_training.DECAY,
) -> Loss:
  """The loss of Medusa's heads: see `medusa_training.loss`."""

  def loss(params, frozen, batch):
    value, metrics = medusa_training.loss(
      form,
      output_head,
      params,
      frozen['target'],
      widened(batch),
      vocabulary=frozen.get('vocabulary'),
      objectives=objectives,
      decay=decay,
    )
    return value, _numbered(metrics, batch)

  return loss


def _numbered(metrics: dict[str, jax.Array], batch: Any) -> Metrics:
  flat = {'weight': batch['loss_mask'].sum().astype(jnp.float32)}
  for name, values in metrics.items():
    if values.ndim:
      flat |= {f'{name}_{i}': value for i, value in enumerate(values, 1)}
    else:
      flat[name] = values
  return flat
