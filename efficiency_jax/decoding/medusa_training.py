"""Training Medusa's heads on texts whose hidden states are at hand.

Head k sees the state h_t and learns the token t + 1 + k (arXiv 2401.10774,
section 2.2):

    loss = sum_k 0.8^k loss_k,      loss_k = CE(token t + 1 + k, q_k)

or, in place of the token, the target's own distribution there, which is what
its head makes of h_{t+k}. The target itself is not trained (Medusa-1), so the
states may have been computed once and kept.

A guess is learnt where the text up to it is: `loss_mask` weighs the positions
whose next token is to be learnt, and head k at position t has the weight of
position t + k, or none if one of t .. t + k has none. So no head guesses from
one text or one turn into another.
"""

from collections.abc import Mapping

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import medusa
from efficiency_jax.distillation import losses
from efficiency_jax.linear import embed
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
    vocabulary: [R] int32, the tokens that the heads may guess, if the form has
      a vocabulary. Other tokens of the text teach nothing and count as wrong
      guesses.
    objectives: Pairs of 'token', or a name in `distillation.losses`, and a
      weight. Those are between the target's distribution, renormalized over the
      vocabulary, and the head's.
    decay: Weight of a head over that of the one before.

  Returns:
    The loss [] and metrics, each [K] but the last: `loss`, `top1` and `top5`
    (how often the right token is the best guess, or one of the best five),
    `alpha` (the mean of sum_v min(p_v, q_v) inside the vocabulary), and
    `tokens_per_run` [], what a chain of sampled guesses would give if steps
    were independent: 1 + sum_k alpha_1 ... alpha_k.

  Raises:
    ValueError: `vocabulary` is not what the form says.
  """
  target, hidden = lax.stop_gradient((target, batch['hidden']))
  batch = {**batch, 'hidden': hidden}
  head, columns = _reduced(form, target, batch['tokens'], vocabulary)
  teacher = output_head(head, hidden)
  scores = _scores(form, output_head, params, target, head, batch)
  masks = _masks(batch['loss_mask'], form.count)
  total, rows = 0.0, []
  for k, mask in enumerate(masks, 1):
    q = scores[..., k - 1, :]
    p = _later(teacher, k)
    label = _later(columns, k + 1)
    value = 0.0
    for name, weight in objectives:
      if name == TOKEN:
        value += weight * _token_loss(q, label, mask)
      else:
        value += weight * losses.named(name)(p, q, mask)
    total += decay**k * value
    _, best = lax.top_k(q, min(5, q.shape[-1]))
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

  Arguments are those of `loss`. Rows of the places where the mask is set are
  what `token_tree.joint` counts.

  Returns:
    Places [B, T, K] int32, -1 where the token is not among the best `most`, and
    where [B, T] bool all heads have a token to guess.
  """
  head, columns = _reduced(form, target, batch['tokens'], vocabulary)
  scores = _scores(form, output_head, params, target, head, batch)
  labels = _stacked(columns, form.count, first=2)
  _, best = lax.top_k(scores, min(most, scores.shape[-1]))  # [B, T, K, most]
  right = best == labels[..., None]
  places = jnp.where(right.any(-1), jnp.argmax(right, axis=-1), -1)
  *_, last = _masks(batch['loss_mask'], form.count)
  return places.astype(jnp.int32), last > 0


def _reduced(form, target, tokens, vocabulary) -> tuple[Params, jax.Array]:
  """What the output head reads, and the column of each token of the text.

  A token outside the vocabulary has a column beyond the last.
  """
  size = None if vocabulary is None else vocabulary.shape[0]
  if size != form.vocabulary:
    raise ValueError(
      f'vocabulary must have {form.vocabulary} tokens as the form says, got'
      f' {size}.'
    )
  if vocabulary is None:
    return target, tokens
  vocab_size = draft_vocabulary.table(target).shape[0]
  columns = draft_vocabulary.columns(vocabulary, vocab_size)
  return draft_vocabulary.head(target, vocabulary), columns[tokens]


def _scores(form, output_head, params, target, head, batch) -> jax.Array:
  """Logits of the heads along the text: [B, T, K, R]."""
  previous = None
  if form.markov:
    before = _stacked(batch['tokens'], form.count, first=1)
    previous = embed(before, target['embedding']['table'])
  return medusa.logits(
    form, params, batch['hidden'], output_head, head, previous
  )


def _masks(loss_mask: jax.Array, count: int) -> list[jax.Array]:
  """Weights of the guesses of each head: `count` arrays [B, T]."""
  # The token after the last does not stand in the row.
  mask = loss_mask * _later(jnp.ones_like(loss_mask), 1)
  learnt, masks = mask > 0, []
  for k in range(1, count + 1):
    weight = _later(mask, k)
    learnt &= weight > 0
    masks.append(weight * learnt)
  return masks


def _token_loss(q, label, mask) -> jax.Array:
  """-log q(label), over the labels that q has a column for."""
  known = label < q.shape[-1]
  label = jnp.where(known, label, 0)
  log_q = losses.log_probabilities(q)
  chosen = jnp.take_along_axis(log_q, label[..., None], axis=-1)[..., 0]
  return losses.mean(-chosen, mask * known)


def _stacked(x: jax.Array, count: int, first: int) -> jax.Array:
  """x [B, T] at t + first, t + first + 1, ...: [B, T, count]."""
  return jnp.stack([_later(x, first + k) for k in range(count)], axis=-1)


def _later(x: jax.Array, by: int) -> jax.Array:
  """x [B, T, ...] at position t + by, zeros beyond the last."""
  pad = [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, pad)[:, by:]
