"""The shapes of things that every technique is written against.

A technique never sees a model class. It sees parameters (a nested dict of
arrays or typed leaves), a key-value cache (a value: taken as an argument and
given back as a result) and an `ApplyFn` that maps tokens to logits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax

Params = Mapping[str, Any]
"""Nested dicts whose paths are module names, leaves are arrays."""


class Cache(NamedTuple):
  """Keys and values of every position a model has already seen.

  Row b holds positions `0 .. length[b] - 1`. Slots at and beyond `length[b]`
  may hold anything: attention masks keys by absolute position, so rolling back
  means nothing more than setting `length`. A call that feeds T tokens writes
  slots `length .. length + T - 1`; `S` must leave room for them. Keys and
  values are arrays, or pytrees of them whose leaves are [B, K, S, ...]: 8 bits
  with scales (`models.cache`).
  """

  keys: tuple[Any, ...]  # a layer each: [B, K, S, head_dim]
  values: tuple[Any, ...]  # a layer each: [B, K, S, head_dim]
  length: jax.Array  # [B] int32, the write cursor of each row


class ModelOutput(NamedTuple):
  """What one forward pass gives."""

  logits: jax.Array  # [B, T, V] float32
  # [B, T, D] after the final norm, in the compute dtype; behind it stand what
  # inner blocks read, where they were asked for: [B, T, (1 + F) D].
  hidden: jax.Array


class ApplyFn(Protocol):
  """A language model as a function: parameters and tokens in, arrays out."""

  def __call__(
    self,
    params: Params,
    tokens: jax.Array,  # [B, T] int32
    cache: Cache | None = None,
    *,
    ancestors: jax.Array | None = None,  # [T, T] or [B, T, T] bool
    segments: jax.Array | None = None,  # [B, T] int32
  ) -> tuple[ModelOutput, Cache | None]:
    """Scores `tokens` after the positions that `cache` holds.

    Without a cache the tokens are whole sequences from position 0. With one,
    row b's tokens are at positions `cache.length[b] + (0 .. T - 1)` and the
    returned cache has `length + T`. Logits that nobody uses are never
    computed under `jax.jit`.

    With `ancestors` the tokens after a cache are a tree and not a sequence:
    token t sees the cache and the tokens u with `ancestors[t, u]`, itself among
    them, and its position is its depth after the cache.

    With `segments` the tokens without a cache are several sequences a row, one
    behind the other, each of them numbered from 1 or 0: a token sees its own
    segment alone, and positions begin anew in each.
    """
    ...
