"""Training a one-layer draft as it will be used (EAGLE-3, arXiv 2503.01840).

The i-th drafted token comes from states of which the last i - 1 are the draft's
own. Step i of training makes exactly those, at every position t of a text at
once, from the results of step i - 1:

    u^i_t = W [norm(E x_t); norm(g^{i-1}_{t-1})],       g^0 = h
    query of u^i_t sees the keys of u^1_s, s <= t - i + 1,
                    and those of u^j_{t-i+j}, j = 2 .. i

so that logits of step i at position t are those of the i-th drafted token after
the text x_0 .. x_{t-i+1}, if the drafted ones were x_{t-i+2} .. x_t. The second
kind of key is one a step, so a step costs what one pass over the text costs and
not more: its score is the log-sum-exp of an attention of its own, and the parts
are merged.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import eagle
from efficiency_jax.distillation import losses
from efficiency_jax.linear import linear
from efficiency_jax.models import rope
from efficiency_jax.models import transformer
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import Params
from pallas_kernels.attention import api as flash

# Losses of each step and their weights: KL(p || q) alone, whose gradient is
# that of the paper's soft cross entropy.
FORWARD_KL = (('forward_kl', 1.0),)


def rollout(
  form: eagle.Form,
  params: Params,
  target: Params,
  tokens: jax.Array,  # [B, T] int32
  hidden: jax.Array,  # [B, T, (1 + F) D], the target's states of these tokens
  steps: int,
  segments: jax.Array | None = None,  # [B, T] int32
) -> list[jax.Array]:
  """The draft's own states of each step: `steps` arrays [B, T, D].

  Step i means something at positions that `reached` has for it.
  """
  config = form.config
  embedded = eagle.embedded_by(target, tokens, hidden.dtype)
  embedded = _norm(config, params['embedding_norm'], embedded)
  first = _same_text(tokens.shape, segments, 1)
  before = eagle.gathered(form, params, target, hidden)
  before = jnp.where(first[..., None], _earlier(before, 1), 0)
  positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  turn = eagle.rotation(config, positions)
  past, states = [], []
  for _ in range(steps):
    features = _norm(config, params['feature_norm'], before)
    x = _project(params['fuse'], eagle.fused(embedded, features))
    x, past = _block(config, params['layers_0'], x, turn, past, segments)
    states.append(_norm(config, params['final_norm'], x))
    before = _earlier(states[-1], 1)
  return states


def reached(
  shape: tuple[int, int], steps: int, segments: jax.Array | None = None
) -> list[jax.Array]:
  """Where each step has a text that it could have begun after: [B, T] bool."""
  return [_same_text(shape, segments, back) for back in range(steps)]


def loss(
  form: eagle.Form,
  params: Params,
  target: Params,
  batch: Mapping[str, jax.Array],
  steps: int = 3,
  *,
  vocabulary: jax.Array | None = None,
  objectives: tuple[tuple[str, float], ...] = FORWARD_KL,
  decay: float = 0.8,
  temperature: float = 1.0,
  feature_weight: float = 0.0,
) -> tuple[jax.Array, dict[str, Any]]:
  """Weighted losses of all steps, and what the draft would be worth.

      sum_i decay^(i-1) (sum_k w_k loss_k(p, q^i) + feature_weight reg(h, g^i))

  with p the target's distribution at the position, renormalized over the
  draft's vocabulary, and `reg` the smooth L1 distance of arXiv 2401.15077.

  Args:
    form: Of the draft.
    params: Of the draft; the only argument that gradients flow into.
    target: The target's parameters: its embedding and its head are read, and
      its norms if the form has `layers`.
    batch: `tokens` [B, T] int32; `hidden` [B, T, (1 + F) D], the target's
      states after the final norm and what the form's layers read; `loss_mask`
      [B, T], weights of the positions whose *next* token is to be learnt;
      perhaps `segments` [B, T] int32, texts packed into a row; perhaps
      `coverage` [B, T], the probability that the target gives the draft's
      vocabulary, 1 if absent, for the metrics alone.
    steps: Drafted tokens that are trained for.
    vocabulary: [R] int32, if the form has one.
    objectives: Pairs of a name in `distillation.losses` and a weight.
    decay: Weight of a step over that of the one before.
    temperature: Of the losses, not of the metrics.
    feature_weight: Of the distance to the target's own states.

  Returns:
    The loss [] and metrics: `loss`, `agreement` (how often the likeliest token
    of draft and target is one, inside the vocabulary) and `alpha` (the mean of
    sum_v min(p_v, q_v), which is the chance that token verification keeps the
    i-th token where it kept those before it), all [steps], and
    `tokens_per_run` [], 1 + sum_i alpha_1 ... alpha_i. Alphas are means over
    the text, so the last takes steps as independent.

  Raises:
    ValueError: `vocabulary` is not what the form says.
  """
  draft_vocabulary.check(vocabulary, form.vocabulary)
  hidden = batch['hidden']
  segments = batch.get('segments')
  head = target
  if vocabulary is not None:
    head = draft_vocabulary.head(target, vocabulary)
  target, head, hidden = lax.stop_gradient((target, head, hidden))
  scores = eagle.scores_fn(form)
  final = hidden[..., : form.target.width]
  teacher = scores(head, final)
  states = rollout(
    form, params, target, batch['tokens'], hidden, steps, segments
  )
  masks = reached(batch['tokens'].shape, steps, segments)
  total, rows = 0.0, []
  for index, (state, mask) in enumerate(zip(states, masks, strict=True)):
    mask = batch['loss_mask'] * mask
    student = scores(head, state)
    value = sum(
      weight
      * losses.named(name)(teacher, student, mask, temperature=temperature)
      for name, weight in objectives
    )
    if feature_weight:
      value += feature_weight * losses.mean(_smooth_l1(final, state), mask)
    total += decay**index * value
    agreement = jnp.argmax(teacher, axis=-1) == jnp.argmax(student, axis=-1)
    kept = losses.acceptance(teacher, student, batch.get('coverage'))
    rows.append(
      {
        'loss': value,
        'agreement': losses.mean(agreement.astype(jnp.float32), mask),
        'alpha': losses.mean(kept, mask),
      }
    )
  metrics = jax.tree.map(lambda *x: lax.stop_gradient(jnp.stack(x)), *rows)
  metrics['tokens_per_run'] = 1.0 + jnp.cumprod(metrics['alpha']).sum()
  return total, metrics


def least_squares(
  form: eagle.Form,
  params: Params,
  target: Params,
  batches: Iterable[Mapping[str, jax.Array]],
  ridge: float = 100.0,
) -> Params:
  """A beginning in closed form: the best linear draft of the target's states.

      min_W sum_t |W [norm(E x_t); norm(h_{t-1})] - h_t / s|^2 + ridge |W|^2

  with s the scale of the final norm, which is what remains of the draft when
  the products into its residual stream are zero, as they are made here. Descent
  from there learns what a linear draft lacks, where from a random beginning it
  would spend most of a short training on W.

  Args:
    form: Of the draft.
    params: From `eagle.init`, with the target's final norm.
    target: Of the target.
    batches: As for `loss`, without segments; places count as `loss_mask` says.
    ridge: In units of inputs of mean square 1; more than 0.
  """
  config = form.config
  final = params['final_norm']['scale'].astype(jnp.float32)
  final = final + 1 if config.norm_plus_one else final
  final = jnp.where(final == 0, 1, final)  # then the state is 0 whatever W is

  @jax.jit
  def products(tokens, hidden, mask):
    hidden = hidden[..., : config.width].astype(jnp.float32)
    embedded = eagle.embedded_by(target, tokens, jnp.float32)
    inputs = eagle.fused(
      _norm(config, params['embedding_norm'], embedded),
      _norm(config, params['feature_norm'], _earlier(hidden, 1)),
    )
    weighed = inputs * mask[..., None]
    return (
      jnp.einsum('bti,btj->ij', weighed, inputs),
      jnp.einsum('bti,btj->ij', weighed, hidden / final),
    )

  left = ridge * np.eye(2 * config.width)
  right = np.zeros((2 * config.width, config.width))
  for batch in batches:
    # The first token of a text has no state before it.
    mask = jnp.asarray(batch['loss_mask']).at[:, 0].set(0)
    found = products(batch['tokens'], batch['hidden'], mask)
    left += np.asarray(found[0])
    right += np.asarray(found[1])
  kernel = jnp.asarray(np.linalg.solve(left, right), jnp.float32)
  block = dict(params['layers_0'])
  for inner, last in (('attention', 'output'), ('ffn', 'down')):
    zero = jax.tree.map(jnp.zeros_like, block[inner][last])
    block[inner] = {**block[inner], last: zero}
  return {**params, 'fuse': {'kernel': kernel}, 'layers_0': block}


def ranks(
  form: eagle.Form,
  params: Params,
  target: Params,
  batch: Mapping[str, jax.Array],
  steps: int,
  *,
  vocabulary: jax.Array | None = None,
  most: int = 10,
) -> tuple[jax.Array, jax.Array]:
  """Place of the text's token among the guesses at it: what a tree needs.

  The guess at the i-th token after a position stands on the text's own i - 1
  tokens before it, as in the branch of a tree where those were right.

  Args:
    form: Of the draft.
    params: Of the draft.
    target: Of the target.
    batch: As for `loss`.
    steps: K, tokens ahead.
    vocabulary: [R] int32, if the form has one.
    most: Best guesses to look among.

  Returns:
    Places [B, T, K] int32, -1 where the token is not among the best `most`, and
    where [B, T] all K tokens are to be learnt.
  """
  tokens = batch['tokens']
  # The last position has no next token.
  mask = (batch['loss_mask'] > 0).at[:, -1].set(False)
  segments = batch.get('segments')
  head, columns = target, tokens
  if vocabulary is not None:
    head = draft_vocabulary.head(target, vocabulary)
    size = form.target.vocab_size
    columns = draft_vocabulary.columns(vocabulary, size)[tokens]
  states = rollout(
    form, params, target, tokens, batch['hidden'], steps, segments
  )
  places, usable = [], jnp.ones(mask.shape, bool)
  reach = reached(tokens.shape, steps, segments)
  for i, (state, there) in enumerate(zip(states, reach, strict=True)):
    _, best = lax.top_k(eagle.scores_fn(form)(head, state), most)
    right = best == _later(columns, 1)[..., None]
    place = jnp.where(right.any(-1), jnp.argmax(right, axis=-1), -1)
    # Step i stands i positions after the one that it drafts from.
    places.append(_later(place, i))
    usable &= _later(there & mask, i)
  return jnp.stack(places, axis=-1).astype(jnp.int32), usable


def _later(x: jax.Array, by: int) -> jax.Array:
  """x [B, T, ...] at position t + by, zeros beyond the last."""
  pad = [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, pad)[:, by:]


def _smooth_l1(hidden: jax.Array, state: jax.Array) -> jax.Array:
  """Mean over D of x^2 / 2 below 1 and |x| - 1/2 beyond: [B, T]."""
  x = jnp.abs(hidden.astype(jnp.float32) - state.astype(jnp.float32))
  return jnp.mean(jnp.where(x < 1, x * x / 2, x - 0.5), axis=-1)


def _block(config: DecoderConfig, params, x, turn, past, segments):
  """`transformer.Block` whose queries also see earlier steps.

  `past` holds keys and values [B, T, K, head_dim] of each step before, and is
  given back with those of this one.
  """
  c = config
  attention = params['attention']
  batch, time, _ = x.shape
  qkv = _project(attention['qkv'], _norm(c, params['attention_norm'], x))
  qkv = qkv.reshape(batch, time, -1, c.head_dim)
  split = (c.num_heads, c.num_heads + c.num_kv_heads)
  queries, keys, values = jnp.split(qkv, split, axis=2)
  if c.qk_norm:
    queries = _norm(c, attention['query_norm'], queries)
    keys = _norm(c, attention['key_norm'], keys)
  scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
  queries = rope.rotate(queries, turn) * jnp.asarray(scale, x.dtype)
  past = [*past, (rope.rotate(keys, turn), values)]
  after = _attend(c, queries, past, segments).reshape(batch, time, -1)
  after = _project(attention['output'], after)
  if c.post_norms:
    after = _norm(c, params['attention_post_norm'], after)
  x = x + after
  normed = _norm(c, params['ffn_norm'], x)
  after = transformer.FeedForward(c).apply({'params': params['ffn']}, normed)
  if c.post_norms:
    after = _norm(c, params['ffn_post_norm'], after)
  return x + after, past


def _attend(config: DecoderConfig, queries, past, segments) -> jax.Array:
  """Attention of step i = len(past): [B, T, H, head_dim]."""
  step = len(past)
  parts = [
    flash.attention(
      queries,
      *past[0],
      causal=True,
      offset=1 - step,
      q_segments=segments,
      kv_segments=segments,
      softcap=config.attention_softcap,
      scale=1.0,
    )
  ]
  for back, (keys, values) in enumerate(reversed(past[1:])):
    group = config.num_heads // config.num_kv_heads
    keys, values = (
      jnp.repeat(_earlier(x, back), group, axis=2) for x in (keys, values)
    )
    # One key: its softmax is 1 and its log-sum-exp the score.
    score = jnp.einsum(
      'bthd,bthd->bht', queries, keys, preferred_element_type=jnp.float32
    )
    if config.attention_softcap is not None:
      cap = config.attention_softcap
      score = cap * jnp.tanh(score / cap)
    parts.append((values, score))
  return flash.merge(parts)[0] if step > 1 else parts[0][0]


def _earlier(x: jax.Array, back: int) -> jax.Array:
  """x [B, T, ...] at position t - back, zeros before the first."""
  pad = [(0, 0), (back, 0)] + [(0, 0)] * (x.ndim - 2)
  return jnp.pad(x, pad)[:, : x.shape[1]]


def _same_text(shape, segments, back: int) -> jax.Array:
  """Whether position t - back is there and of the text of t: [B, T] bool."""
  there = jnp.broadcast_to(jnp.arange(shape[1]) >= back, shape)
  if segments is None:
    return there
  return there & (segments == _earlier(segments, back))


def _project(params: Params, x: jax.Array) -> jax.Array:
  return linear(x, params['kernel'], params.get('bias'))


def _norm(config: DecoderConfig, params: Params, x: jax.Array) -> jax.Array:
  norm = transformer.RMSNorm(config.norm_epsilon, config.norm_plus_one)
  return norm.apply({'params': params}, x)
