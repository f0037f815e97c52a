"""The key-value cache: a value with a write cursor per row.

The cursor per row is what makes ragged acceptance possible: after one
verification pass every row may have kept a different number of tokens.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import Cache

# Attention reads the cache in blocks of this many slots and stops at the
# longest row, so that empty slots cost nothing.
BLOCK = 128


def capacity(slots: int) -> int:
  """Slots rounded up to whole blocks."""
  return -(-slots // BLOCK) * BLOCK


def init(
  config: DecoderConfig, batch: int, slots: int, dtype=jnp.float32
) -> Cache:
  """An empty cache for `batch` rows of at least `slots` positions each."""
  if slots < 1:
    raise ValueError(f'slots must be >= 1, got {slots}.')
  shape = (batch, config.num_kv_heads, capacity(slots), config.head_dim)
  zeros = lambda: tuple(
    jnp.zeros(shape, dtype) for _ in range(config.num_layers)
  )
  return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


@functools.cache
def initializer(
  config: DecoderConfig, dtype: Any = jnp.float32
) -> Callable[[int, int], Cache]:
  """`init` as a function of batch and slots; one object for equal arguments."""
  return functools.partial(init, config, dtype=dtype)


def write(
  buffer: jax.Array,  # [B, K, S, head_dim]
  new: jax.Array,  # [B, K, T, head_dim]
  start: jax.Array,  # [B] int32
) -> jax.Array:
  """Writes row b of `new` at slots `start[b] ...` of row b of `buffer`.

  `start + T` must not pass S: like every dynamic slice in XLA the start is
  clamped silently, which would overwrite live slots.
  """
  one = lambda b, n, s: lax.dynamic_update_slice(b, n, (0, s, 0))
  return jax.vmap(one)(buffer, new.astype(buffer.dtype), start)


def keep(cache: Cache, start: jax.Array, path: jax.Array) -> Cache:
  """Moves slots `start + path[:, i]` of each row to `start + i`.

  After a tree of tokens was written from slot `start` [B] on, the keys and
  values of the accepted `path` [B, P] so become those of a sequence. Node 0
  stands where it must. Rotary positions are right already: they follow depth.
  """

  def one(buffer, start, path):
    kept = jnp.take(buffer, start + path, axis=1, mode='clip')
    return lax.dynamic_update_slice(buffer, kept, (0, start + 1, 0))

  moved = lambda buffers: tuple(
    jax.vmap(one)(buffer, start, path[:, 1:]) for buffer in buffers
  )
  return Cache(moved(cache.keys), moved(cache.values), cache.length)


def roll_back(cache: Cache, length: jax.Array) -> Cache:
  """Forgets everything at and beyond position `length` [B]; moves no data."""
  return cache._replace(length=length.astype(jnp.int32))
