"""Running a model over the prompts, before the first new token."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Cache
from efficiency_jax.types import Params

# Tokens a forward pass takes at a time: wide enough to be bound by arithmetic,
# and one width, so that every prompt length runs the same compiled program.
CHUNK = 64


def slots_for(tokens: int) -> int:
  """Cache slots that `prefill` may write for a buffer of `tokens`."""
  return -(-tokens // CHUNK) * CHUNK


@functools.partial(
  jax.jit, static_argnames=('apply',), donate_argnames=('cache',)
)
def prefill(
  apply: ApplyFn,
  params: Params,
  tokens: jax.Array,  # [B, N] int32, right-padded
  length: jax.Array,  # [B] int32, at least 1
  cache: Cache,
) -> Cache:
  """Fills the cache with positions `0 .. length - 2` of every row.

  The last token stays out: a decoding step feeds it first. The whole batch
  walks in chunks up to its longest row; what shorter rows write beyond their
  end is dead, because the cursor of each row is set to its own length. The
  cache needs `slots_for(length.max())` slots.
  """
  padded = slots_for(tokens.shape[1])
  tokens = jnp.pad(tokens, ((0, 0), (0, padded - tokens.shape[1])))

  def body(carry):
    index, cache = carry
    chunk = lax.dynamic_slice_in_dim(tokens, index * CHUNK, CHUNK, 1)
    cache = cache._replace(length=jnp.full_like(length, index * CHUNK))
    _, cache = apply(params, chunk, cache)
    return index + 1, cache

  last = (length.max() - 1 + CHUNK - 1) // CHUNK
  _, cache = lax.while_loop(
    lambda carry: carry[0] < last, body, (jnp.int32(0), cache)
  )
  return cache._replace(length=length - 1)
