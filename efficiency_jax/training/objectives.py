"""What is learnt: losses as the training step takes them.

The `frozen` argument of those of drafts is their target and, if a draft has
one, its vocabulary. Embedding and head are read; all of the target only where
its states are `computed`.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from efficiency_jax.adaptation import lora
from efficiency_jax.binarization import networks
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_model_training
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import eagle_training
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import medusa_training
from efficiency_jax.distillation import losses
from efficiency_jax.models import encoder
from efficiency_jax.models.encoder import EncodeFn
from efficiency_jax.training.step import Loss
from efficiency_jax.training.step import Metrics
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Params

# Pairs of a loss's name and its weight.
Objectives = tuple[tuple[str, float], ...]


def frozen(target: Params, vocabulary: jax.Array | None = None) -> Params:
  """The target, of which a program holds what it reads, and the vocabulary."""
  if vocabulary is None:
    return {'target': target}
  return {'target': target, 'vocabulary': jnp.asarray(vocabulary, jnp.int32)}


def widened(batch: Any) -> dict[str, jax.Array]:
  """Kept hidden states are float16; they are computed with in float32."""
  return {**batch, 'hidden': batch['hidden'].astype(jnp.float32)}


def computed(loss: Loss, apply: ApplyFn) -> Loss:
  """A loss of a draft whose batches need no `hidden`.

  Where a batch has none, the target reads its tokens first, from which nothing
  is learnt: no states have to be kept, and none moved to an accelerator.

  Args:
    loss: Reads `hidden`.
    apply: The target, all of whose parameters are `frozen['target']`.
  """

  def with_states(params, frozen, batch):
    return loss(params, frozen, completed(apply, frozen['target'], batch))

  return with_states


def completed(apply: ApplyFn, target: Params, batch: Any) -> Any:
  """A batch with the target's states of its tokens, where it had none."""
  if 'hidden' in batch:
    return batch
  output, _ = apply(target, batch['tokens'])
  return {**batch, 'hidden': lax.stop_gradient(output.hidden)}


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


def distillation(
  form: draft_model.Form,
  *,
  objectives: Objectives = (('forward_kl', 1.0),),
  length: int = 3,
) -> Loss:
  """The loss of a draft cut from its target: see `draft_model_training.loss`.

  Its metrics are called `alpha_1` and so on, as those of other drafts.
  """

  def loss(params, frozen, batch):
    value, metrics = draft_model_training.loss(
      form,
      params,
      frozen['target'],
      widened(batch),
      vocabulary=frozen.get('vocabulary'),
      objectives=objectives,
      length=length,
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


def joint(
  form: medusa.Heads,
  apply: ApplyFn,
  output_head: medusa.OutputHead,
  *,
  backbone: Objectives = (('forward_kl', 1.0),),
  heads_weight: float = 0.2,
  objectives: Objectives = ((medusa_training.TOKEN, 1.0),),
  decay: float = medusa_training.DECAY,
) -> Loss:
  """Medusa-2: heads, and through an adapter the model that they stand on.

      L = L_backbone + heads_weight L_heads    (arXiv 2401.10774, section 2.2.2)

  With 'token' as the loss of the backbone it is the paper's L_LM. Otherwise it
  is self-distillation (section 2.3.2), KL(p_original || p): the teacher is the
  model with its adapter switched off, whose states are those of the batch, so
  that it costs no pass but its output head.

  Trained are `{'heads': ..., 'adapter': ...}`, the latter from `lora.factors`.
  Frozen are `target`, all of the adapted model, and perhaps `vocabulary`. A
  batch has `tokens`, `hidden` and `loss_mask`. Metrics are those of `heads`,
  for the adapted model, its distribution outside the vocabulary counted as
  lost, and

  * `backbone`, its loss,
  * `original_kl`, KL(p_original || p),
  * `original_agreement`, how often both models have the same likeliest token.
  """

  def loss(params, frozen, batch):
    batch = widened(batch)
    tokens, vocabulary = batch['tokens'], frozen.get('vocabulary')
    original = lax.stop_gradient(frozen['target'])
    target = lora.with_factors(original, params['adapter'])
    output, _ = apply(target, tokens)
    kept = medusa.final_state(form, batch['hidden'])
    teacher = output_head(original, kept)
    # The token after the last does not stand in the row.
    mask = batch['loss_mask'].at[:, -1].set(0)
    label = jnp.roll(tokens, -1, axis=1)
    value = medusa_training.mixed(backbone, teacher, output.logits, label, mask)
    batch['hidden'] = output.hidden
    if vocabulary is not None:
      p = jax.nn.softmax(lax.stop_gradient(output.logits))
      batch['coverage'] = jnp.take(p, vocabulary, axis=-1).sum(-1)
    heads_value, metrics = medusa_training.loss(
      form,
      output_head,
      params['heads'],
      target,
      batch,
      vocabulary=vocabulary,
      objectives=objectives,
      decay=decay,
      into_states=True,
    )
    same = teacher.argmax(-1) == output.logits.argmax(-1)
    metrics |= {
      'backbone': value,
      'original_kl': losses.forward_kl(teacher, output.logits, mask),
      'original_agreement': losses.mean(same.astype(jnp.float32), mask),
    }
    metrics = lax.stop_gradient(_numbered(metrics, batch))
    return value + heads_weight * heads_value, metrics

  return loss


def classification(encode: EncodeFn) -> Loss:
  """The logistic loss of two classes by a head on sentence embeddings.

      mean_i log(1 + exp(-s_i (w x_i + b))),    s_i = 1 or -1

  `params` are `encoder`, those of `encode`, and `head`, whose `scores` are the
  log-odds; a batch has `tokens` and `mask` [B, T] and `positive` [B] bool. Rows
  without tokens do not count.
  """

  def loss(params, frozen, batch):
    del frozen
    mask = batch['mask']
    hidden = encode(params['encoder'], batch['tokens'], mask)
    embeddings = encoder.sentence_embedding(hidden, mask)
    scores = params['head'].scores(embeddings)
    real = mask.any(-1)
    positive = batch['positive']
    value = jax.nn.softplus(jnp.where(positive, -scores, scores))
    right = ((scores > 0) == positive).astype(jnp.float32)
    return losses.mean(value, real), {
      'accuracy': losses.mean(right, real),
      'weight': real.sum().astype(jnp.float32),
    }

  return loss


def next_token(apply: ApplyFn) -> Loss:
  """Cross-entropy of every token given those before it in its segment.

      mean over tokens that count of -log p(token | tokens before it)

  `params` are those of `apply`; a batch has the arrays of `packing.pack`:
  `tokens`, `segments` and `loss_mask` [B, T].
  """

  def loss(params, frozen, batch):
    del frozen
    tokens, mask = batch['tokens'], batch['loss_mask'][:, 1:]
    output, _ = apply(params, tokens, segments=batch['segments'])
    logits = output.logits[:, :-1].astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    )
    weight = mask.sum().astype(jnp.float32)
    return losses.mean(nats, mask), {'weight': weight}

  return loss


def binarized(config: networks.Config, seed: int = 0) -> Loss:
  """Squared hinge loss of a network for images (arXiv 1602.02830, section 2.1).

      mean over images and classes of max(0, 1 - t s)^2

  with scores s and targets t, 1 for the class of the image and -1 for others.
  A batch has `pixels` uint8 [B, H, W, C] and `labels` int32 [B], from 0 to
  classes - 1. It is normalized by itself, so every row counts, and a part of it
  is another batch; what training draws, it draws by `seed` and `step`.
  """

  def loss(params, frozen, batch):
    del frozen
    key = None
    if 'step' in batch:
      key = jax.random.fold_in(jax.random.key(seed), batch['step'])
    scores = networks.apply(config, params, batch['pixels'], key=key).scores
    targets = 2 * jax.nn.one_hot(batch['labels'], config.classes) - 1
    hinge = jnp.maximum(0, 1 - targets * scores)
    wrong = scores.argmax(-1) != batch['labels']
    return (hinge**2).mean(), {'error': wrong.astype(jnp.float32).mean()}

  return loss


def _numbered(metrics: dict[str, jax.Array], batch: Any) -> Metrics:
  flat = {'weight': batch['loss_mask'].sum().astype(jnp.float32)}
  for name, values in metrics.items():
    if values.ndim:
      flat |= {f'{name}_{i}': value for i, value in enumerate(values, 1)}
    else:
      flat[name] = values
  return flat
