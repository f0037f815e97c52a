"""Products in integer arithmetic, of int8 rows with int8 or 4-bit weights.

    out_mn = s_m sum_g (s_gn sum_{k in g} q_mk w_kn + o_gn sum_{k in g} q_mk)
    q = round(x / s),    s_m = max_k |x_mk| / 127,    g = k // G

with a scale s for every row of x and, for every column of w, one scale
(vector-wise quantization, W8A8: LLM.int8(), arXiv 2208.07339, section 3) or one
for each group of G rows (W4A8: QServe, arXiv 2405.04532, section 4). With
offsets o the weight is w s + o: zero points and smallest values of a group.

Sums of a group are of integers and exact. What is left is float32 arithmetic in
an order that `reference` fixes; `reference`, the kernels and, with one group
and no offsets, `blockwise` return the same numbers. Else `blockwise` may round
a product and its addition at once.
"""

import math

import jax
from jax import lax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.int8_matmul import blockwise
from pallas_kernels.int8_matmul import llvm_cpu
from pallas_kernels.int8_matmul import mosaic_gpu
from pallas_kernels.int8_matmul import mosaic_tpu
from pallas_kernels.int8_matmul import reference

IMPLEMENTATIONS = {
  'reference': reference.int8_matmul,
  'blockwise': blockwise.int8_matmul,
  'mosaic_tpu': mosaic_tpu.int8_matmul,
  'mosaic_gpu': mosaic_gpu.int8_matmul,
  'llvm_cpu': llvm_cpu.int8_matmul,
}

# 127 * 127 * K must fit an int32.
MAX_K = (2**31 - 1) // reference.LARGEST**2


def quantize_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Symmetric absmax quantization over the last axis.

  s = max |x| / 127 and q = round(x / s), half to even. Values are never -128,
  and |x - q s| <= s / 2 up to float32 rounding. A row of zeros has scale 1, as
  has one whose magnitudes are all below 1.4e-36. A row with a NaN or an
  infinity has a scale that is not finite.

  Args:
    x: [..., K] of any float dtype.

  Returns:
    Values [..., K] int8 in -127 .. 127 and scales [...] float32.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x must be of a float dtype, got {x.dtype}.')
  return reference.quantize_rows(x)


def int8_matmul(
  x: jax.Array,
  w: jax.Array,
  w_scales: jax.Array,
  *,
  w_offsets: jax.Array | None = None,
  x_scales: jax.Array | None = None,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """x times a quantized matrix in integer arithmetic; not differentiable.

  The formula at the head of this module. The sums of a group are exact for
  values in -127 .. 127; with float32(sum) its terms are products in float32,
  added in the order g = 0, 1, ... (that of an offset after that of its scale),
  multiplied by s_m and rounded once more to `out_dtype`.

  Args:
    x: [..., K] of a float dtype, quantized as by `quantize_rows`; or int8.
    w: [K, N] int8; or [K / 2, N] uint8, two integers in -8 .. 7 a byte as
      `dequant_matmul.formats.pack_int4` packs them.
    w_scales: [N], one a column; or [K / G, N], one for G consecutive rows of a
      column, where 32 divides G. Of any float dtype.
    w_offsets: Of the shape of `w_scales`; None adds nothing.
    x_scales: [...] float32, one a row; given if and only if x is int8.
    out_dtype: Of the result.
    implementation: See `dispatch`: 'reference', 'blockwise', 'mosaic_tpu' and
      'mosaic_gpu' (int8 w with a scale a column), 'llvm_cpu', or None.

  Returns:
    [..., N] in `out_dtype`.

  Raises:
    ValueError: Shapes or dtypes do not fit together, or K exceeds MAX_K.
    NotImplementedError: No implementation that was named takes the arguments,
      or a gradient is asked for.
  """
  _check(x, w, w_scales, w_offsets, x_scales)
  shape = (*x.shape[:-1], w.shape[1])
  if x_scales is None:
    x = _without_gradient(x)
  else:
    x_scales = _without_gradient(x_scales.reshape(-1))
  # Not -1, which stands for no number where another axis is empty.
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  bound = dispatch.bind(IMPLEMENTATIONS, out_dtype=jnp.dtype(out_dtype))
  out = dispatch.call(
    'int8_matmul',
    bound,
    implementation,
    rows,
    w,
    _without_gradient(_by_column(w_scales)),
    x_scales,
    None if w_offsets is None else _without_gradient(_by_column(w_offsets)),
  )
  return out.reshape(shape)


def _by_column(scales: jax.Array) -> jax.Array:
  """One group is a scale a column: [N], which every kernel takes."""
  return scales[0] if scales.ndim == 2 and len(scales) == 1 else scales


def llm_int8_matmul(
  x: jax.Array,
  w: jax.Array,
  w_scales: jax.Array,
  w_outlier: jax.Array | None = None,
  *,
  w_offsets: jax.Array | None = None,
  threshold: float = 6.0,
  max_outliers: int = 32,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """Integer product that keeps outlier features in float32 (arXiv 2208.07339).

      out = sum_{j in O} x_j w_j + int8_matmul(x outside of O, w)
      O = {columns j of x with |x_ij| >= threshold in any row i}

  where x is quantized with the columns of O set to zero, so that an outlier
  does not coarsen the scale of its row (equation 8).

  Shapes must not depend on values: O holds at most `max_outliers` columns. If
  no more reach the threshold, the result is that of the paper. If more do, the
  ones with the largest magnitudes are in O, and the others are quantized with
  the rest: nothing is dropped, and what is lost is precision. Whether this
  happened, `(jnp.abs(x) >= threshold).any(all axes but the last).sum()` tells.
  As in the paper, O depends on all rows of x together; under `vmap` each
  element has its own.

  Args:
    x: [..., K] of a float dtype.
    w: [K, N] int8 or [K / 2, N] uint8, as for `int8_matmul`.
    w_scales: [N] or [K / G, N], as for `int8_matmul`.
    w_outlier: [K, N], the weight before quantization; only the rows in O are
      read. None takes those of the quantized weight, so that nothing else is
      stored.
    w_offsets: Of the shape of `w_scales`, or None.
    threshold: From where on a magnitude is an outlier; the paper has 6.
    max_outliers: Most columns in O. The paper finds at most 7 in models of up
      to 13 billion parameters.
    out_dtype: Of the result.
    implementation: Of the integer product, see `int8_matmul`.

  Returns:
    [..., N] in `out_dtype`.

  Raises:
    ValueError: As `int8_matmul`, or x is int8, or an option is negative.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x must be of a float dtype, got {x.dtype}.')
  if threshold < 0 or max_outliers < 0:
    raise ValueError(
      'threshold and max_outliers must be >= 0, got'
      f' {threshold} and {max_outliers}.'
    )
  _check(x, w, w_scales, w_offsets, None)
  size = x.shape[-1]
  if w_outlier is not None and w_outlier.shape != (size, w.shape[1]):
    raise ValueError(
      f'w_outlier must be {(size, w.shape[1])}, got {w_outlier.shape}.'
    )
  others = tuple(range(x.ndim - 1))
  largest = jnp.abs(x).max(others, initial=0)
  largest, columns = lax.top_k(largest, min(max_outliers, size))
  chosen = largest >= threshold
  in_o = jnp.zeros(size, bool).at[columns].set(chosen)
  regular = int8_matmul(
    jnp.where(in_o, 0, x),
    w,
    w_scales,
    w_offsets=w_offsets,
    implementation=implementation,
  )
  if w_outlier is None:
    weights = reference.rows_of(w, w_scales, w_offsets, columns)
  else:
    weights = jnp.take(w_outlier, columns, axis=0).astype(jnp.float32)
  outliers = jnp.where(chosen, jnp.take(x, columns, axis=-1), 0).astype(
    jnp.float32
  )
  # A few columns: full float32 costs little, also where it is not the default.
  kept = jnp.matmul(outliers, weights, precision=lax.Precision.HIGHEST)
  return (kept + regular).astype(out_dtype)


@jax.custom_jvp
def _without_gradient(x: jax.Array) -> jax.Array:
  return x


@_without_gradient.defjvp
def _refuse(primals, tangents):
  # The derivative of rounding is zero, and that of the scales is not: what
  # differentiation would return has no use and looks like a gradient.
  raise NotImplementedError(
    'int8_matmul has no gradient; differentiate x @ (w * w_scales) instead.'
  )


def _check(x, w, w_scales, w_offsets, x_scales) -> None:
  packed = w.dtype == jnp.uint8
  if (
    x.ndim < 1
    or w.ndim != 2
    or x.shape[-1] != w.shape[0] * (2 if packed else 1)
  ):
    raise ValueError(
      f'x must be [..., K] and w {"[K / 2, N]" if packed else "[K, N]"}, got'
      f' {x.shape} and {w.shape}.'
    )
  if w.dtype not in (jnp.int8, jnp.uint8):
    raise ValueError(
      'w must be int8, or uint8 with two values of 4 bits a byte, got'
      f' {w.dtype}.'
    )
  _check_groups(x.shape[-1], w, w_scales)
  if w_offsets is not None and w_offsets.shape != w_scales.shape:
    raise ValueError(
      f'w_offsets must be {w_scales.shape} like w_scales, got'
      f' {w_offsets.shape}.'
    )
  if (x.dtype == jnp.int8) != (x_scales is not None):
    raise ValueError(
      f'x_scales come with int8 x and only with it; x is {x.dtype} and x_scales'
      f' {"missing" if x_scales is None else "given"}.'
    )
  if x_scales is not None and x_scales.shape != x.shape[:-1]:
    raise ValueError(
      f'x_scales must be {x.shape[:-1]}, one a row, got {x_scales.shape}.'
    )
  if x.dtype != jnp.int8 and not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x must be of a float dtype or int8, got {x.dtype}.')
  if x.shape[-1] > MAX_K:
    raise ValueError(
      f'K must be at most {MAX_K}, so that int32 sums are exact, got'
      f' {x.shape[-1]}.'
    )


def _check_groups(inner: int, w, w_scales) -> None:
  columns, unit = w.shape[1], formats.BLOCK
  if w_scales.shape[1:] != (columns,) and w_scales.shape != (columns,):
    raise ValueError(
      f'w_scales must be {(columns,)}, one a column, or [K / G, {columns}], got'
      f' {w_scales.shape}.'
    )
  groups = len(w_scales) if w_scales.ndim == 2 else 1
  # One group of int8 may have any size.
  unit = 1 if groups == 1 and w.dtype == jnp.int8 else unit
  if not groups or inner % (groups * unit):
    raise ValueError(
      f'{groups} groups of scales must divide K = {inner} into multiples of'
      f' {unit}.'
    )
