"""Running a model over the prompts, before the first new token."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Cache
from efficiency_jax.types import Params

# Tokens a forward pass takes at a time. Few widths, so that every prompt length
# of a bucket runs the same compiled program: long prompts walk in wide chunks,
# which are faster a token once attention is long, and end in narrow ones.
WIDE = 512
CHUNK = 64


def slots_for(tokens: int) -> int:
  """Cache slots that `prefill` may write for a buffer of `tokens`."""
  return -(-tokens // CHUNK) * CHUNK


@functools.partial(
  jax.jit,
  static_argnames=('apply', 'keep_hidden'),
  donate_argnames=('cache',),
)
def prefill(
  apply: ApplyFn,
  params: Params,
  tokens: jax.Array,  # [B, N] int32, right-padded
  length: jax.Array,  # [B] int32, at least 1
  cache: Cache,
  *,
  keep_hidden: bool = False,
) -> tuple[Cache, jax.Array | None]:
  """Fills the cache with positions `0 .. length - 2` of every row.

  The last token stays out: a decoding step feeds it first. The whole batch
  walks in chunks up to its longest row; what shorter rows write beyond their
  end is dead, because the cursor of each row is set to its own length. The
  cache needs `slots_for(length.max())` slots.

  Returns:
    The cache, and with `keep_hidden` the hidden states [B, N', D] of those
    positions; what stands at later ones means nothing.
  """
  padded = slots_for(tokens.shape[1])
  tokens = jnp.pad(tokens, ((0, 0), (0, padded - tokens.shape[1])))

  def walk(width, end, carry):
    """Chunks of one width for as long as they begin before `end`."""

    def body(carry):
      first, cache, hidden = carry
      chunk = lax.dynamic_slice_in_dim(tokens, first, width, 1)
      cache = cache._replace(length=jnp.full_like(length, first))
      output, cache = apply(params, chunk, cache)
      if keep_hidden:
        hidden = lax.dynamic_update_slice_in_dim(
          hidden, output.hidden, first, 1
        )
      return first + width, cache, hidden

    return lax.while_loop(lambda carry: carry[0] < end, body, carry)

  end = length.max() - 1
  hidden = None
  if keep_hidden:
    output, _ = jax.eval_shape(apply, params, tokens[:, :1], cache)
    batch, _, width = output.hidden.shape
    hidden = jnp.zeros((batch, padded, width), output.hidden.dtype)
  carry = jnp.int32(0), cache, hidden
  if padded >= 2 * WIDE:
    carry = walk(WIDE, end // WIDE * WIDE, carry)
  _, cache, hidden = walk(CHUNK, end, carry)
  return cache._replace(length=length - 1), hidden
