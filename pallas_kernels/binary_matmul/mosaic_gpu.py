"""Products of signs on a Hopper GPU: unpacked to int8, for the tensor cores.

    HBM                      HBM                    tensor cores
    a [M, W] --unpacked--> +1 and -1 [M, K] int8 --+
                                                   +--> out [M, N]
    b [N, W] --unpacked--> +1 and -1 [N, K] int8 --+

Counting bits, 16 a cycle and multiprocessor, an H200 does 237 Tera-operations a
second; its tensor cores do 1979 of int8. So the product is the one of
`int8_matmul`, with scales of one. XLA unpacks in a pass before it: in the
kernel, a block would unpack 384 rows a tile for a product of 128 x 256, which
takes the ordinary cores longer than the tensor cores take for the product.

The pass writes and reads 8 times the packed bytes. With few rows of `a` that is
most of the work, and the kernel refuses them: they are left to counting.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.binary_matmul import reference
from pallas_kernels.int8_matmul import mosaic_gpu as int8_matmul

# 2 M N K / 237e12 seconds to count, against 2 N K / 4.3e12 to write and read b.
FEWEST_ROWS = 56
LONGEST = 2**24  # float32 holds all sums up to it


def binary_matmul(
  size: int,
  a: jax.Array,  # [M, W] uint32
  b: jax.Array,  # [N, W] uint32
  *,
  interpret: Any = False,
) -> jax.Array:
  """sum_k sign_a sign_b over the first `size` bits, [M, N] int32; see `api`.

  `interpret` runs it without a GPU, as `plgpu.kernel` does.

  Raises:
    NotImplementedError: Rows of `a` are few, or sums too long to be exact.
  """
  if a.shape[0] < FEWEST_ROWS:
    raise NotImplementedError(
      f'{a.shape[0]} rows are too few to be worth unpacking b; from'
      f' {FEWEST_ROWS} on they are.'
    )
  if size > LONGEST:
    raise NotImplementedError(f'sums of {size} signs are not exact here.')
  out = int8_matmul.int8_matmul(
    reference.signs(a, size, jnp.int8),
    reference.signs(b, size, jnp.int8).T,
    jnp.ones(b.shape[0], jnp.float32),
    jnp.ones(a.shape[0], jnp.float32),
    interpret=interpret,
  )
  return out.astype(jnp.int32)
