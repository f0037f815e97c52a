"""What a product of packed signs means: unpacked, and multiplied."""

import jax
import jax.numpy as jnp


def binary_matmul(
  size: int,
  a: jax.Array,  # [M, W] uint32
  b: jax.Array,  # [N, W] uint32
) -> jax.Array:
  """sum_k sign_a sign_b over the first `size` bits, [M, N] int32; see `api`."""

  def signs(words):
    bits = words[..., None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return 2 * bits.reshape(len(words), -1)[:, :size].astype(jnp.int32) - 1

  return signs(a) @ signs(b).T
