"""Products of signs on a TPU: packed in memory, unpacked at the matrix unit.

    grid (row of tiles, column of tiles, slice of words); the last is innermost

      HBM                   VMEM
      a [M, W] --slice--> [m, 128] --> 32 planes side by side [m, 4096] --+
                           words                  int8, +1 and -1         |
      b [N, W] --slice--> [n, 128] --> 32 planes side by side [n, 4096] --+
                                                                          v
      out [M, N] <--last slice-- out [m, n] int32  <------- += -------- a b'

Plane p holds sign p of each word of a slice. Which sign comes where in the sum
does not matter as long as a and b agree, and so nothing crosses lanes:

    out = K - K'                                  before the first slice
    out = out + sum_p plane_p(a) plane_p(b)'      every slice

K' is K rounded up to whole slices. Bits beyond K are zero in both operands, so
that each of the K' - K products there is +1: the start takes them away.

Counting bits as `blockwise` does would leave the matrix unit idle. Unpacked in
HBM, signs would be read at 8 times the bytes.
"""

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import shards

TILE = (256, 512)  # rows and columns of the output
_LANES = 128  # of a vector register
_ROWS = 32  # of a register of int8


@functools.partial(
  jax.jit, static_argnums=0, static_argnames=('dtype', 'interpret')
)
def binary_matmul(
  size: int,
  a: jax.Array,  # [M, W] uint32, zeros beyond `size`
  b: jax.Array,  # [N, W] uint32, zeros beyond `size`
  *,
  dtype: Any = None,
  interpret: Any = False,
) -> jax.Array:
  """sum_k sign_a sign_b, [M, N] int32; see `api`.

  Args:
    size: K, signs of a row.
    a: Packed signs.
    b: Packed signs.
    dtype: Of the unpacked signs. None is int8, or bfloat16 on a TPU that has
      no product of int8. Both are exact: bfloat16 is summed in float32, which
      holds the 4096 of a slice, and slices in int32.
    interpret: Runs it without a TPU, as `pallas_call` does.

  Raises:
    NotImplementedError: The matrix unit has no product of this dtype.
  """
  dtype = _operand_dtype() if dtype is None else jnp.dtype(dtype)
  if dtype not in (jnp.int8, jnp.bfloat16):
    raise NotImplementedError(
      f'signs are multiplied as int8 or bfloat16, not as {dtype}.'
    )
  if not interpret:
    # Lowered before the kernel, whose own error does not tell what to do.
    a = dispatch.only_on('tpu', 'mosaic_tpu', a)
  m, n = a.shape[0], b.shape[0]
  rows, columns = min(TILE[0], _up(m, _ROWS)), min(TILE[1], _up(n, _LANES))
  # A slice has 128 words. Few words are split into more that hold fewer signs.
  words = a.shape[1]
  bits = 8 if words <= _LANES // 4 else 16 if words <= _LANES // 2 else 32
  a, b = _split(a, bits), _split(b, bits)
  words = a.shape[1]
  return pl.pallas_call(
    functools.partial(
      _kernel, start=size - words * bits, bits=bits, dtype=dtype
    ),
    grid=(pl.cdiv(m, rows), pl.cdiv(n, columns), words // _LANES),
    in_specs=[
      pl.BlockSpec((rows, _LANES), lambda i, j, w: (i, w)),
      pl.BlockSpec((columns, _LANES), lambda i, j, w: (j, w)),
    ],
    out_specs=pl.BlockSpec((rows, columns), lambda i, j, w: (i, j)),
    out_shape=shards.out_shape((m, n), jnp.int32, a),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * n * size,
      transcendentals=0,
      bytes_accessed=4 * (a.size + b.size + m * n),
    ),
    interpret=interpret,
    name='binary_matmul',
  )(a, b)


def _kernel(a_ref, b_ref, out_ref, *, start: int, bits: int, dtype: Any):
  """One slice of one tile. Rows beyond M or N are never written back."""

  @pl.when(pl.program_id(2) == 0)
  def _():
    out_ref[...] = jnp.full(out_ref.shape, start, jnp.int32)

  product = lax.dot_general(
    _signs(a_ref[...], bits, dtype),
    _signs(b_ref[...], bits, dtype),
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.int32 if dtype == jnp.int8 else jnp.float32,
  )
  out_ref[...] += product.astype(jnp.int32)


def _signs(words: jax.Array, bits: int, dtype: Any) -> jax.Array:
  """[r, w] int32 to [r, bits w]: -1 where a bit is set, +1 where it is not.

  This is the other way round than `api` has it. Both operands change sign, and
  the product does not; in turn a sign costs two shifts and an or.
  """
  planes = []
  for place in range(bits):
    # The bit moves to the top, and then fills the word: -1 or 0.
    filled = words << (31 - place) >> 31
    planes.append((filled | 1).astype(dtype))
  return jnp.concatenate(planes, axis=1)


def _split(words: jax.Array, bits: int) -> jax.Array:
  """[r, W] words to [r, W'] that count `bits` each, W' whole slices, int32.

  The signs of a word go to 32 / bits words; places from `bits` on are unused.
  """
  words = jnp.concatenate([words >> p for p in range(0, 32, bits)], axis=1)
  padding = _up(words.shape[1], _LANES) - words.shape[1]
  words = jnp.pad(words, ((0, 0), (0, padding)))
  return lax.bitcast_convert_type(words, jnp.int32)


def _operand_dtype() -> jnp.dtype:
  """int8, unless the TPU at hand multiplies only wider numbers."""
  narrow = not pltpu.is_tpu_device() or pltpu.get_tpu_info().int8_ops_per_second
  return jnp.dtype(jnp.int8 if narrow else jnp.bfloat16)


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
