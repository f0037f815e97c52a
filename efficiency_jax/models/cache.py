"""The key-value cache: a value with a write cursor per row.

The cursor per row is what makes ragged acceptance possible: after one
verification pass every row may have kept a different number of tokens.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple, TypeAlias

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import Cache
from pallas_kernels.int8_matmul.api import quantize_rows

# Attention reads the cache in blocks of this many slots and stops at the
# longest row, so that empty slots cost nothing.
BLOCK = 128


class Int8Slots(NamedTuple):
  """Keys or values of one layer in 8 bits, `values scales` is meant.

  A row of head_dim numbers has its own scale, max |x| / 127: nothing that is
  written later changes what was written before.
  """

  values: jax.Array  # [B, K, S, head_dim] int8
  scales: jax.Array  # [B, K, S] float32

  def dequantize(self, dtype: Any) -> jax.Array:
    """[B, K, S, head_dim] in a float dtype."""
    scaled = self.values.astype(jnp.float32) * self.scales[..., None]
    return scaled.astype(dtype)


Slots: TypeAlias = jax.Array | Int8Slots
"""Keys or values of one layer, as a cache holds them."""


def capacity(slots: int) -> int:
  """Slots rounded up to whole blocks."""
  return -(-slots // BLOCK) * BLOCK


def init(
  config: DecoderConfig, batch: int, slots: int, dtype=jnp.float32
) -> Cache:
  """An empty cache for `batch` rows of at least `slots` positions each.

  With the dtype int8 keys and values are `Int8Slots`, 1 + 4 / head_dim bytes a
  number.
  """
  if slots < 1:
    raise ValueError(f'slots must be >= 1, got {slots}.')
  shape = (batch, config.num_kv_heads, capacity(slots), config.head_dim)

  def one() -> Slots:
    if dtype != jnp.int8:
      return jnp.zeros(shape, dtype)
    return Int8Slots(jnp.zeros(shape, dtype), jnp.ones(shape[:3], jnp.float32))

  zeros = lambda: tuple(one() for _ in range(config.num_layers))
  return Cache(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))


@functools.cache
def initializer(
  config: DecoderConfig, dtype: Any = jnp.float32
) -> Callable[[int, int], Cache]:
  """`init` as a function of batch and slots; one object for equal arguments."""
  return functools.partial(init, config, dtype=dtype)


def write(
  buffer: Slots,  # [B, K, S, head_dim]
  new: jax.Array,  # [B, K, T, head_dim]
  start: jax.Array,  # [B] int32
) -> Slots:
  """Writes row b of `new` at slots `start[b] ...` of row b of `buffer`.

  `start + T` must not pass S: like every dynamic slice in XLA the start is
  clamped silently, which would overwrite live slots.
  """

  def one(buffer, new, start):
    place = (0, start, 0)[: buffer.ndim]
    return lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), place)

  each = lambda buffer, new: jax.vmap(one)(buffer, new, start)
  if isinstance(buffer, Int8Slots):
    return Int8Slots(*map(each, buffer, quantize_rows(new)))
  return each(buffer, new)


def keep(cache: Cache, start: jax.Array, path: jax.Array) -> Cache:
  """Moves slots `start + path[:, i]` of each row to `start + i`.

  After a tree of tokens was written from slot `start` [B] on, the keys and
  values of the accepted `path` [B, P] so become those of a sequence. Node 0
  stands where it must. Rotary positions are right already: they follow depth.
  """

  def one(buffer, start, path):
    kept = jnp.take(buffer, start + path, axis=1, mode='clip')
    place = (0, start + 1, 0)[: buffer.ndim]
    return lax.dynamic_update_slice(buffer, kept, place)

  moved = functools.partial(
    jax.tree.map, lambda buffer: jax.vmap(one)(buffer, start, path[:, 1:])
  )
  return Cache(moved(cache.keys), moved(cache.values), cache.length)


def roll_back(cache: Cache, length: jax.Array) -> Cache:
  """Forgets everything at and beyond position `length` [B]; moves no data."""
  return cache._replace(length=length.astype(jnp.int32))
