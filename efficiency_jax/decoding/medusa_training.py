"""Training Medusa's heads on texts whose hidden states are at hand.

Head k sees the state h_t and learns the token t + 1 + k (arXiv 2401.10774,
section 2.2):

    loss = sum_k 0.8^k loss_k,      loss_k = CE(token t + 1 + k, q_k)

or, in place of the token, the target's own distribution there, which is what
its head makes of h_{t+k}. The target itself is not trained (Medusa-1), so the
states may have been computed once and kept.
"""

from collections.abc import Mapping

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import medusa
from efficiency_jax.distillation import losses
from efficiency_jax.types import Params

# The paper's: the token that stands in the text.
TOKEN = 'token'
DECAY = 0.8


def loss(
  form: medusa.Heads,
  output_head: medusa.OutputHead,
  params: Params,
  target: Params,
  batch: Mapping[str, jax.Array],
  *,
  vocabulary: jax.Array | None = None,
  objectives: tuple[tuple[str, float], ...] = ((TOKEN, 1.0),),
  decay: float = DECAY,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Weighted losses of all heads, and how well each of them guesses.

  Args:
    form: Of the heads.
    output_head: The target's head, on the parameters `target`.
    params: Of the heads; the only argument that gradients flow into.
    target: What `output_head` and the heads read of the target.
    batch: `tokens` [B, T] int32; `hidden` [B, T, D], the target's states after
      the final norm; `loss_mask` [B, T], weights of the positions whose *next*
      token is to be learnt.
    vocabulary: [R] int32, the tokens that the heads may guess; None is all.
      Other tokens of the text teach nothing and count as wrong guesses.
    objectives: Pairs of 'token', or a name in `distillation.losses`, and a
      weight. Those are between the target's distribution, renormalized over the
      vocabulary, and the head's.
    decay: Weight of a head over that of the one before.

  Returns:
    The loss [] and metrics, each [K] but the last: `loss`, `top1` and `top5`
    (how often the right token is the best guess, or one of the best five),
    `alpha` (the mean of sum_v min(p_v, q_v)), and `tokens_per_run` [], what a
    chain of sampled guesses would give: 1 + sum_k alpha_1 ... alpha_k.
  """
  target, hidden = lax.stop_gradient((target, batch['hidden']))
  head = target
  if vocabulary is not None:
    head = draft_vocabulary.head(target, vocabulary)
  teacher = output_head(head, hidden)
  labels = columns = batch['tokens']
  if vocabulary is not None:
    vocab_size = draft_vocabulary.table(target).shape[0]
    columns = draft_vocabulary.columns(vocabulary, vocab_size)[labels]
  scores = medusa.logits(
    form,
    params,
    hidden,
    output_head,
    head,
    previous=_previous(form, target, labels),
  )
  total, rows = 0.0, []
  for k in range(1, form.count + 1):
    q = scores[..., k - 1, :]
    p = _later(teacher, k)
    mask = batch['loss_mask'] * _later(batch['loss_mask'], k)
    label = _later(columns, k + 1)
    value = 0.0
    for name, weight in objectives:
      if name == TOKEN:
        value += weight * _token_loss(q, label, mask)
      else:
        value += weight * losses.named(name)(p, q, mask)
    total += decay**k * value
    _, best = lax.top_k(q, 5)
    right = best == label[..., None]
    rows.append(
      {
        'loss': value,
        'top1': losses.mean(right[..., 0].astype(jnp.float32), mask),
        'top5': losses.mean(right.any(-1).astype(jnp.float32), mask),
        'alpha': losses.acceptance(p, q, mask),
      }
    )
  metrics = jax.tree.map(lambda *x: lax.stop_gradient(jnp.stack(x)), *rows)
  metrics['tokens_per_run'] = 1.0 + jnp.cumprod(metrics['alpha']).sum()
  return total, metrics


def ranks(
  form: medusa.Heads,
  output_head: medusa.OutputHead,
  params: Params,
  target: Params,
  batch: Mapping[str, jax.Array],
  *,
  vocabulary: jax.Array | None = None,
  most: int = 10,
) -> tuple[jax.Array, jax.Array]:
  """Place of the right token among each head's guesses: what a tree needs.

  Returns:
    Places [B, T, K] int32, -1 where the token is not among the best `most`, and
    where [B, T] all heads have a token to guess.
  """
  head, columns = target, batch['tokens']
  if vocabulary is not None:
    head = draft_vocabulary.head(target, vocabulary)
    vocab_size = draft_vocabulary.table(target).shape[0]
    columns = draft_vocabulary.columns(vocabulary, vocab_size)[columns]
  scores = medusa.logits(
    form,
    params,
    batch['hidden'],
    output_head,
    head,
    previous=_previous(form, target, batch['tokens']),
  )
  _, best = lax.top_k(scores, most)  # [B, T, K, most]
  label = jnp.stack(
    [_later(columns, k + 1) for k in range(1, form.count + 1)], axis=-1
  )
  right = best == label[..., None]
  places = jnp.where(right.any(-1), jnp.argmax(right, axis=-1), -1)
  mask = batch['loss_mask'] > 0
  for k in range(1, form.count + 1):
    mask &= _later(batch['loss_mask'], k) > 0
  return places.astype(jnp.int32), mask


def _previous(form, target: Params, tokens: jax.Array) -> jax.Array | None:
  """Embeddings of the token before each guess: [B, T, K, D] or None."""
  if not form.markov:
    return None
  before = jnp.stack(
    [_later(tokens, k) for k in range(1, form.count + 1)], axis=-1
  )
  return jnp.take(target['embedding']['table'], before, axis=0)


def _token_loss(q, label, mask) -> jax.Array:
  """-log q(label), over the labels that q has a column for."""
  known = label < q.shape[-1]
  label = jnp.where(known, label, 0)
  log_q = losses.log_probabilities(q)
  chosen = jnp.take_along_axis(log_q, label[..., None], axis=-1)[..., 0]
  return losses.mean(-chosen, mask * known)


def _later(x: jax.Array, by: int) -> jax.Array:
  """x [B, T, ...] at position t + by, zeros beyond the last."""
  pad = [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, pad)[:, by:]
