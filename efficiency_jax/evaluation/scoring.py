"""Log-likelihoods of tokens that are given: one pass of a model, no text made.

Logits are made of a few hundred positions at a time and never kept: those of 8
rows of 512 tokens of SmolLM2 would be 800 MB.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from efficiency_jax.io.pretrained import LanguageModel
from efficiency_jax.models import transformer
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Params

Head = Callable[[Params, jax.Array], jax.Array]
"""Parameters and hidden states [..., D] to logits [..., V]."""

Progress = Callable[[int, int], None]
"""Is told after every batch how many rows are done, and of how many."""

CHUNK = 256  # positions whose logits exist at the same time


def functions(lm: LanguageModel) -> tuple[ApplyFn, Head]:
  """A model for its hidden states, and its output head alone."""
  return transformer.apply_fn(lm.config), transformer.head_fn(lm.config)


def token_losses(
  apply: ApplyFn,
  head: Head,
  params: Params,
  tokens: jax.Array,  # [B, T] int32
  mask: jax.Array | None = None,  # [B, T] bool
  segments: jax.Array | None = None,  # [B, T] int32
) -> jax.Array:
  """-log p(token t | tokens before it) of whole sequences, in nats.

  Args:
    apply: The model, for its hidden states.
    head: Its output head. A model that has none apart gives its logits as
      hidden states and the identity as head.
    params: Of both.
    tokens: The sequences.
    mask: Tokens that count; None counts all but the first of a row, which
      nothing precedes.
    segments: Several sequences a row (`types.ApplyFn`).

  Returns:
    [B, T] float32, 0 where the mask is not set and for the first token.
  """
  return losses_and_states(apply, head, params, tokens, mask, segments)[0]


@functools.partial(jax.jit, static_argnames=('apply', 'head'))
def losses_and_states(
  apply: ApplyFn,
  head: Head,
  params: Params,
  tokens: jax.Array,  # [B, T] int32
  mask: jax.Array | None = None,  # [B, T] bool
  segments: jax.Array | None = None,  # [B, T] int32
) -> tuple[jax.Array, jax.Array]:
  """`token_losses` [B, T], and the hidden states [B, T, D] they come from."""
  hidden = apply(params, tokens, segments=segments)[0].hidden
  losses, _ = target_losses(head, params, hidden[:, :-1], tokens[:, 1:])
  losses = jnp.pad(losses, ((0, 0), (1, 0)))
  return losses if mask is None else jnp.where(mask, losses, 0.0), hidden


def target_losses(
  head: Head,
  params: Params,
  hidden: jax.Array,  # [B, T, D]
  targets: jax.Array,  # [B, T] int32
) -> tuple[jax.Array, jax.Array]:
  """-log p of the targets, and whether each is the likeliest token: [B, T]."""

  def score(hidden, targets):
    logits = head(params, hidden).astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return loss, logits.argmax(-1) == targets

  return over_chunks(score, hidden, targets)


def over_chunks(fn: Callable[..., Any], *arrays: jax.Array) -> Any:
  """`fn` of arrays [B, T, ...] as rows [R, ...], `CHUNK` rows at a time.

  It gives arrays [R], which come back as [B, T].
  """
  shape = arrays[0].shape[:2]
  count = math.prod(shape)
  size = min(CHUNK, count)

  def cut(array):
    rows = array.reshape(count, *array.shape[2:])
    rows = jnp.pad(rows, [(0, -count % size)] + [(0, 0)] * (rows.ndim - 1))
    return rows.reshape(-1, size, *rows.shape[1:])

  found = lax.map(lambda chunk: fn(*chunk), tuple(map(cut, arrays)))
  return jax.tree.map(lambda x: x.reshape(-1)[:count].reshape(shape), found)


def check_batch(batch: int):
  """Refuses a batch of less than one row."""
  if batch < 1:
    raise ValueError(f'batch must be at least 1, got {batch}.')
