"""What the Hopper kernels of attention share: sizes, tiles, scores.

A warpgroup works on 64 rows, the height of a wgmma, and two of them share what
a third one copies to shared memory:

    HBM --copies--> warpgroup 2's ring of slots --+--> warpgroup 0: 64 rows
                                                  +--> warpgroup 1: 64 rows
"""

import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import masks

ROWS = 64  # of a computing warpgroup: the height of a wgmma
COMPUTING = 2  # warpgroups
BLOCK = COMPUTING * ROWS
WIDTHS = (64, 128)  # of heads
LOG2E = math.log2(math.e)


def check(rule: masks.Rule, q, k, v, limits: masks.Limits) -> None:
  """Raises NotImplementedError for what these kernels do not take."""
  if limits.q_segments is not None or rule.tiles is not None:
    raise NotImplementedError('segments and tiles are not in this kernel.')
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise NotImplementedError(f'{q.dtype} is not a dtype of this kernel.')
  if not q.dtype == k.dtype == v.dtype:
    raise NotImplementedError(
      f'q, k and v are of different dtypes: {q.dtype}, {k.dtype}, {v.dtype}.'
    )
  if q.shape[3] not in WIDTHS or v.shape[3] != q.shape[3]:
    raise NotImplementedError(
      f'heads of width {q.shape[3]} and {v.shape[3]} are not {WIDTHS}.'
    )


def without_unseen(
  rule: masks.Rule, limits: masks.Limits, q_size: int, x: jax.Array
) -> jax.Array:
  """Keys or values [B, Sk, K, D], zero where no query sees them.

  What they hold there must not matter, and 0 times NaN is NaN.
  """
  size = x.shape[1]
  low, high = masks.keys_of(rule, *limits[:2], 0, q_size - 1, size)
  key = jnp.arange(size)
  used = (key >= low[:, None]) & (key < high[:, None])
  return jnp.where(used[:, :, None, None], x, 0)


def over(low, high, size: int):
  """The tiles `first .. end - 1` that hold the numbers `low .. high - 1`."""
  first = lax.div(jnp.maximum(low, 0), jnp.int32(size))
  end = lax.div(jnp.maximum(high, 0) + (size - 1), jnp.int32(size))
  return first, jnp.maximum(first, end)


def free(slot_is_used, waited_for):
  """Says that a slot of a ring is free again, if a copy is to wait for it."""
  pl.when(waited_for)(lambda: plgpu.barrier_arrive(slot_is_used))


def scaled(rule: masks.Rule, scores):
  """Scores to the base 2: exp(s) = exp2(s log2(e))."""
  if rule.softcap is None:
    return scores * (rule.scale * LOG2E)
  return bend(rule, scores) * (rule.softcap * LOG2E)


def bend(rule: masks.Rule, scores):
  """The tanh of a soft-cap, tanh(scores scale / cap)."""
  # tanh x = 1 - 2 / (1 + exp(2 x)): the GPU's fast tanh has 11 bits only.
  grown = jnp.exp2(scores * (2 * rule.scale / rule.softcap * LOG2E))
  return 1.0 - 2.0 / (1.0 + grown)


def product(a, b, shape):
  """a @ b in registers, float32."""

  def multiply(total):
    plgpu.wgmma(total, a, b)
    return total[...]

  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def iota(shape, axis: int):
  """The number of each row or column of a tile in registers."""
  return plgpu.broadcasted_iota(
    jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA
  )


def left_side(x, dtype, staged):
  """x as the left side of a product: in registers, or, for the interpreter,
  which multiplies from shared memory only, in `staged`."""
  x = x.astype(dtype)
  if staged is None:
    return x
  staged[...] = x
  plgpu.commit_smem()
  return staged


def tiled(shape, dtype, swizzle: int = 128):
  """Shared memory in the layout that TMA writes and wgmma reads.

  Of a row `swizzle` bytes lie together: 128, 64 or 32.
  """
  size = jnp.dtype(dtype).itemsize
  swizzled = min(swizzle, shape[-1] * size)
  transforms = (
    plgpu.TilingTransform((8, swizzled // size)),
    plgpu.SwizzleTransform(swizzled),
  )
  return plgpu.SMEM(shape, dtype, transforms=transforms)


def padded(x: jax.Array, axis: int = 1, fill: float = 0) -> jax.Array:
  """x with `fill` behind it, so that an axis is whole blocks."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % BLOCK)
  return jnp.pad(x, widths, constant_values=fill)
