"""Drafting from the most frequent tokens alone.

The output head is the largest product of a small draft. Frequent tokens are
most of any text, so a head of R of the V rows drafts nearly as well and reads
R / V as much (FR-Spec, arXiv 2502.14856; EAGLE-3, 2503.01840). A token outside
is never drafted; the target still says it, so no text changes.

A reduced head is the target's own head function over fewer rows of its table,
taken once a generation. Column j of its logits is the token `vocabulary[j]`.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.linear import logits_from_table
from efficiency_jax.linear import rows_of_table
from efficiency_jax.types import Params


def by_frequency(
  token_arrays: Iterable[np.ndarray],
  size: int,
  vocab_size: int,
  always: Iterable[int] = (),
) -> np.ndarray:
  """The `size` most frequent tokens, most frequent first: [R] int32.

  Among equals the smaller id comes first.

  Args:
    token_arrays: Texts as integer arrays of any shape.
    size: R.
    vocab_size: V.
    always: Tokens that are kept however rare, such as stop tokens.

  Raises:
    ValueError: A size or a token is out of range.
  """
  always = np.unique(np.asarray(list(always), np.int64))
  if not max(1, len(always)) <= size <= vocab_size:
    raise ValueError(
      f'size must be in {max(1, len(always))}..{vocab_size}, got {size}.'
    )
  counts = np.zeros(vocab_size, np.int64)
  for tokens in (*token_arrays, always):
    tokens = np.ravel(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
      raise ValueError(
        f'tokens must be in 0..{vocab_size - 1}, got'
        f' {tokens.min()}..{tokens.max()}.'
      )
    counts += np.bincount(tokens, minlength=vocab_size)
  order = np.lexsort((np.arange(vocab_size), -counts))
  kept = np.isin(order, always)
  # As many others as there is room for, in the order of frequency.
  kept |= np.cumsum(~kept) <= size - kept.sum()
  return order[kept].astype(np.int32)


def check(vocabulary: jax.Array | None, size: int | None) -> None:
  """Raises a ValueError if a form says another `size` than `vocabulary` has."""
  found = None if vocabulary is None else len(vocabulary)
  if found != size:
    raise ValueError(
      f'vocabulary must have {size} tokens as the form says, got {found}.'
    )


def sub_table(
  table: jax.Array,  # [V, D]
  vocabulary: jax.Array,  # [R] int32
) -> jax.Array:
  """The rows of a table that a reduced head scores: [R, D]."""
  return rows_of_table(table, vocabulary)


def table(target: Params) -> jax.Array:
  """The table [V, D] that the target's output head scores."""
  return target[_name(target)]['table']


def head(target: Params, vocabulary: jax.Array | None = None) -> Params:
  """The parameters of the target's output head alone, or for fewer tokens.

  `transformer.head_fn` reads them as it reads the target's own, and gives
  logits [..., V], or [..., R] of a vocabulary [R].
  """
  if vocabulary is None:
    return {_name(target): target[_name(target)]}
  return {_name(target): {'table': sub_table(table(target), vocabulary)}}


def chosen(weights: Any, reduced: Params | None) -> Params:
  """The head that a draft reads: its own, or the target's, `reduced` or not.

  `weights` are `drafters.Weights`.
  """
  if 'head' in weights.draft:
    return weights.draft['head']
  return weights.target if reduced is None else reduced


def columns(vocabulary: jax.Array, vocab_size: int) -> jax.Array:
  """The column of every token, R for a token outside: [V] int32."""
  size = vocabulary.shape[0]
  outside = jnp.full((vocab_size,), size, jnp.int32)
  return outside.at[vocabulary].set(jnp.arange(size, dtype=jnp.int32))


def spread(
  logits: jax.Array,  # [..., R]
  columns: jax.Array,  # [V] int32
) -> jax.Array:
  """The same logits over the whole vocabulary: [..., V], -inf outside."""
  edge = [(0, 0)] * (logits.ndim - 1) + [(0, 1)]
  padded = jnp.pad(logits, edge, constant_values=-jnp.inf)
  return jnp.take(padded, columns, axis=-1)


def best(
  logits: jax.Array,  # [..., R]
  most: int,
  vocabulary: jax.Array | None = None,  # [R] int32
) -> tuple[jax.Array, jax.Array]:
  """The most likely tokens, best first, and their log-probabilities.

  Both are [..., most]; column j is the token j, or that of a vocabulary. The
  probabilities are as exact as a product of the platform is.
  """
  logits = logits.astype(jnp.float32)
  # Behind the barrier XLA sees one use of it, without which it sorts all.
  top, tokens = lax.optimization_barrier(lax.top_k(logits, most))
  if vocabulary is not None:
    tokens = jnp.take(vocabulary, tokens)
  # A sum by the product that decoding has: XLA's own wakes threads of its own,
  # which on a CPU take longer than all of this.
  share = jnp.exp(logits - top[..., :1])
  total = logits_from_table(share, jnp.ones((1, logits.shape[-1])))
  return tokens.astype(jnp.int32), top - top[..., :1] - jnp.log(total)


def _name(target: Params) -> str:
  """A target with tied embeddings has no head beside them."""
  return 'head' if 'head' in target else 'embedding'
