"""Training Medusa's heads on texts whose hidden states are at hand.

Head k sees the state h_t and learns the token t + 1 + k (arXiv 2401.10774,
section 2.2):

    loss = sum_k 0.8^k loss_k,      loss_k = CE(token t + 1 + k, q_k)

or, in place of the token, the target's own distribution there, which is what
its head makes of h_{t+k}. Where the target itself is not trained (Medusa-1),
the states may have been computed once and kept. Medusa-2 trains both: gradients
then flow through the states into the target, whose own loss is `mixed` of its
next tokens (`training.objectives.joint`).

A guess sampled from q_k is kept with the chance 1 - TV(p, q_k). It is measured
everywhere (`alpha`, `tokens_per_run`), and heads with confidence learn to
foresee it by binary cross entropy (DSpark, arXiv 2607.05147). Of the
probability outside a reduced vocabulary nothing can be kept: a batch that says
how much of it lies inside (`coverage`) has it counted as lost.

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

# Pairs of 'token', or a name in `distillation.losses`, and a weight.
Objectives = tuple[tuple[str, float], ...]


def loss(
  form: medusa.Heads,
  output_head: medusa.OutputHead,
  params: Params,
  target: Params,
  batch: Mapping[str, jax.Array],
  *,
  vocabulary: jax.Array | None = None,
  objectives: Objectives = ((TOKEN, 1.0),),
  decay: float = DECAY,
  into_states: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Weighted losses of all heads, and how well each of them guesses.

  Args:
    form: Of the heads.
    output_head: The target's head, on the parameters `target`.
    params: Of the heads.
    target: What `output_head` and the heads read of the target; no gradient
      flows into it.
    batch: `tokens` [B, T] int32; `hidden` [B, T, (1 + F) D], the target's
      states that the heads read; `loss_mask` [B, T], weights of the positions
      whose *next* token is to be learnt; perhaps `coverage` [B, T], the
      probability that the target gives the vocabulary at each position's next
      token, 1 if absent.
    vocabulary: [R] int32, the tokens that the heads may guess, if the form has
      a vocabulary. Other tokens of the text teach nothing and count as wrong
      guesses.
    objectives: Of each head, see `mixed`; the target's distribution is
      renormalized over the vocabulary.
    decay: Weight of a head over that of the one before.
    into_states: Whether gradients of the heads' guesses flow into `hidden`; the
      target's own distribution never moves towards them.

  Returns:
    The loss [] and metrics, each [K] but the last: `loss`, `top1` and `top5`
    (how often the right token is the best guess, or one of the best five),
    `alpha`, the mean of 1 - TV = sum_v min(p_v, q_v), with confidence
    `confidence_error`, its mean distance from that, and `tokens_per_run` [],
    what a chain of sampled guesses would give: the mean over the positions of
    1 + sum_k a_1 ... a_k, with a_k the 1 - TV of head k there.

  Raises:
    ValueError: `vocabulary` is not what the form says.
  """
  target, states = lax.stop_gradient((target, batch['hidden']))
  batch = {**batch, 'hidden': batch['hidden'] if into_states else states}
  head, columns = _reduced(form, target, batch['tokens'], vocabulary)
  teacher = output_head(head, medusa.final_state(form, states))
  scores = _scores(form, output_head, params, target, head, batch)
  trust = _trust(form, params, target, states, batch['tokens'])
  coverage = batch.get('coverage', jnp.ones(columns.shape))
  masks = _masks(batch['loss_mask'], form.count)
  total, rows, reached = 0.0, [], 1.0
  for k, mask in enumerate(masks, 1):
    q = scores[..., k - 1, :]
    p = _later(teacher, k)
    label = _later(columns, k + 1)
    kept = lax.stop_gradient(losses.acceptance(p, q, _later(coverage, k)))
    reached = reached * kept
    value = mixed(objectives, p, q, label, mask)
    _, best = lax.top_k(q, min(5, q.shape[-1]))
    right = best == label[..., None]
    row = {
      'loss': value,
      'top1': losses.mean(right[..., 0].astype(jnp.float32), mask),
      'top5': losses.mean(right.any(-1).astype(jnp.float32), mask),
      'alpha': losses.mean(kept, mask),
      'reached': losses.mean(reached, mask),
    }
    if trust is not None:
      own = trust[..., k - 1]
      # -a log c - (1 - a) log(1 - c) for c = sigmoid(own).
      value += losses.mean(jax.nn.softplus(own) - kept * own, mask)
      error = jnp.abs(jax.nn.sigmoid(own) - kept)
      row['confidence_error'] = losses.mean(error, mask)
    total += decay**k * value
    rows.append(row)
  metrics = jax.tree.map(lambda *x: lax.stop_gradient(jnp.stack(x)), *rows)
  metrics['tokens_per_run'] = 1.0 + metrics.pop('reached').sum()
  return total, metrics


def mixed(
  objectives: Objectives,
  teacher: jax.Array,  # [B, T, V]
  student: jax.Array,  # [B, T, V]
  label: jax.Array,  # [B, T] int32
  mask: jax.Array,  # [B, T]
) -> jax.Array:
  """A weighted sum of losses between teacher, text and student: [].

  Args:
    objectives: Pairs of 'token', the cross entropy of the text's token, or a
      name in `distillation.losses`, and a weight.
    teacher: Logits of p.
    student: Logits of q.
    label: The token of the text; one of V or more teaches 'token' nothing.
    mask: Weights of the positions.
  """
  value = jnp.float32(0)
  for name, weight in objectives:
    if name == TOKEN:
      value += weight * _token_loss(student, label, mask)
    else:
      value += weight * losses.named(name)(teacher, student, mask)
  return value


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
  draft_vocabulary.check(vocabulary, form.vocabulary)
  if vocabulary is None:
    return target, tokens
  vocab_size = draft_vocabulary.table(target).shape[0]
  columns = draft_vocabulary.columns(vocabulary, vocab_size)
  return draft_vocabulary.head(target, vocabulary), columns[tokens]


def _scores(form, output_head, params, target, head, batch) -> jax.Array:
  """Logits of the heads along the text: [B, T, K, R]."""
  seen = _seen(form, target, batch['tokens'])
  return medusa.logits(form, params, batch['hidden'], output_head, head, **seen)


def _trust(form, params, target, hidden, tokens) -> jax.Array | None:
  """Confidence of the heads along the text, as logits: [B, T, K]."""
  if not form.confidence:
    return None
  seen = _seen(form, target, tokens)
  return medusa.confidence(form, params, hidden, **seen)


def _seen(form, target, tokens) -> dict[str, jax.Array]:
  """Embeddings of the tokens that the heads see along the text."""
  table, seen = target['embedding']['table'], {}
  if form.markov:
    before = _stacked(tokens, form.count, first=1)
    seen['previous'] = embed(before, table)
  if form.token:
    seen['token'] = embed(_later(tokens, 1), table)
  return seen


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
