"""What a product of packed signs means: unpacked, and multiplied."""

import jax
import jax.numpy as jnp


def binary_matmul(
  size: int,
  a: jax.Array,  # [M, W] uint32
  b: jax.Array,  # [N, W] uint32
) -> jax.Array:
  """sum_k sign_a sign_b over the first `size` bits, [M, N] int32; see `api`."""
  return signs(a, size) @ signs(b, size).T


def signs(
  words: jax.Array, size: int, dtype: jax.typing.DTypeLike = jnp.int32
) -> jax.Array:
  """[..., W] uint32 to [..., size], +1 where a bit is set and -1 elsewhere."""
  bits = words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
  bits = bits.reshape(*words.shape[:-1], 32 * words.shape[-1])[..., :size]
  return 2 * bits.astype(dtype) - 1
