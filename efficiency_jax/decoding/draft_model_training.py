"""Distilling a draft model from its target (DistillSpec, arXiv 2310.08461).

A draft model sees the text alone, as it will when it drafts, so one pass over a
text that the target wrote trains all its guesses: behind kept tokens every
drafted token is a next token like any other. The target's distribution there is
what its output head makes of its hidden states, which may have been computed
once and kept, so the target is never run.
"""

from collections.abc import Mapping

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.distillation import losses
from efficiency_jax.models import transformer
from efficiency_jax.types import Params


def loss(
  form: draft_model.Form,
  params: Params,
  target: Params,
  batch: Mapping[str, jax.Array],
  *,
  vocabulary: jax.Array | None = None,
  objectives: tuple[tuple[str, float], ...] = (('forward_kl', 1.0),),
  length: int = 3,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """sum_k w_k loss_k(p, q) over the text, and what the draft would be worth.

  p is the target's distribution, renormalized over the draft's vocabulary.

  Args:
    form: Of the draft.
    params: Of the draft; the only argument that gradients flow into.
    target: The target's embedding and head.
    batch: `tokens` [B, T] int32; `hidden` [B, T, D], the target's states after
      the final norm; `loss_mask` [B, T], weights of the positions whose *next*
      token is to be learnt; perhaps `coverage` [B, T], the probability that the
      target gives the draft's vocabulary, 1 if absent, for the metrics alone.
    vocabulary: [R] int32, if the form has one.
    objectives: Pairs of a name in `distillation.losses` and a weight.
    length: Tokens of the draft that `tokens_per_run` is for.

  Returns:
    The loss [] and metrics: `loss`, `agreement` (how often the likeliest token
    of draft and target is one, inside the vocabulary) and `alpha` (the mean of
    sum_v min(p_v, q_v) = 1 - TV, the chance that token verification keeps a
    drafted token where it kept those before it), all [1], since every drafted
    token is guessed alike, and `tokens_per_run` [], the sum over i = 0 ..
    `length` of alpha^i (arXiv 2211.17192, equation 1).

  Raises:
    ValueError: `vocabulary` is not what the form says, or a loss is unknown.
  """
  target, hidden = lax.stop_gradient((target, batch['hidden']))
  teacher, student = _logits(
    form, params, target, {**batch, 'hidden': hidden}, vocabulary
  )
  mask = batch['loss_mask']
  value = sum(
    weight * losses.named(name)(teacher, student, mask)
    for name, weight in objectives
  )
  agreement = jnp.argmax(teacher, axis=-1) == jnp.argmax(student, axis=-1)
  kept = losses.acceptance(teacher, student, batch.get('coverage'))
  metrics = {
    'loss': value,
    'agreement': losses.mean(agreement.astype(jnp.float32), mask),
    'alpha': losses.mean(kept, mask),
  }
  metrics = {k: lax.stop_gradient(v)[None] for k, v in metrics.items()}
  powers = metrics['alpha'] ** jnp.arange(length + 1)
  return value, {**metrics, 'tokens_per_run': powers.sum()}


def ranks(
  form: draft_model.Form,
  params: Params,
  target: Params,
  batch: Mapping[str, jax.Array],
  steps: int,
  *,
  vocabulary: jax.Array | None = None,
  most: int = 10,
) -> tuple[jax.Array, jax.Array]:
  """Place of the text's token among the guesses at it.

  Arguments are those of `loss`.

  Args:
    form: Of the draft.
    params: Of the draft.
    target: Of the target.
    batch: As for `loss`.
    steps: K, tokens ahead.
    vocabulary: [R] int32, if the form has one.
    most: Best guesses to look among.

  Returns:
    Places [B, T, K] int32 of the next K tokens after each position, each
    guessed behind the text's own tokens, -1 where the token is not among the
    best `most`; and where [B, T] all of them are to be learnt.
  """
  tokens = columns = batch['tokens']
  if vocabulary is not None:
    size = form.target.vocab_size
    columns = draft_vocabulary.columns(vocabulary, size)[tokens]
  _, student = _logits(form, params, target, batch, vocabulary)
  _, best = lax.top_k(student, min(most, student.shape[-1]))
  right = best == _ahead(columns, 2)[..., 1:]
  place = jnp.where(right.any(-1), jnp.argmax(right, axis=-1), -1)
  # The last position has no next token.
  learnt = (batch['loss_mask'] > 0).at[:, -1].set(False)
  return (
    _ahead(place, steps).astype(jnp.int32),
    _ahead(learnt, steps).all(axis=-1),
  )


def _logits(
  form, params, target, batch, vocabulary
) -> tuple[jax.Array, jax.Array]:
  """Of target and draft, for the tokens of the vocabulary: [B, T, R] each."""
  weights = draft_model.weights(form, params, target, vocabulary)
  teacher = transformer.head_fn(form.config)(weights, batch['hidden'])
  output, _ = transformer.apply_fn(form.config)(weights, batch['tokens'])
  return teacher, output.logits


def _ahead(x: jax.Array, steps: int) -> jax.Array:
  """x [B, T] at t, t + 1, ..., zeros beyond the last: [B, T, steps]."""
  time = x.shape[1]
  padded = jnp.pad(x, ((0, 0), (0, steps - 1)))
  return jnp.stack([padded[:, k : k + time] for k in range(steps)], axis=-1)
