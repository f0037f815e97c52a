"""Products with weights of 8 and 4 bits, dequantized in the tile.

    out = x @ w,    w_kn = value(q_kn) s_gn,    g = k // G

Only weights are quantized (int8, int4, or codes of a codebook such as NF4,
arXiv 2305.14314), x and the sums are floats: it saves the bytes of w, which is
what a product of few rows spends its time on. No implementation but `reference`
ever holds a whole w of floats. `formats` says how w is stored.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import shards
from pallas_kernels.dequant_matmul import blockwise
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.dequant_matmul import llvm_cpu
from pallas_kernels.dequant_matmul import mosaic_gpu
from pallas_kernels.dequant_matmul import mosaic_tpu
from pallas_kernels.dequant_matmul import reference

IMPLEMENTATIONS = {
  'reference': reference.dequant_matmul,
  'blockwise': blockwise.dequant_matmul,
  'mosaic_tpu': mosaic_tpu.dequant_matmul,
  'mosaic_gpu': mosaic_gpu.dequant_matmul,
  'llvm_cpu': llvm_cpu.dequant_matmul,
}


class _How(NamedTuple):
  """What is static about a product."""

  transposed: bool
  in_dtype: jnp.dtype
  out_dtype: jnp.dtype
  implementation: dispatch.Implementation

  def backward(self) -> '_How':
    """Of the gradient: x @ w gets d_out @ w'."""
    return self._replace(
      transposed=not self.transposed,
      in_dtype=self.out_dtype,
      out_dtype=self.in_dtype,
    )


def dequant_matmul(
  x: jax.Array,
  values: jax.Array,
  scales: jax.Array,
  codebook: jax.Array | None = None,
  *,
  out_dtype: jax.typing.DTypeLike | None = None,
  implementation: dispatch.Implementation = None,
) -> jax.Array:
  """x times a quantized matrix; differentiable with respect to x.

  w is dequantized in float32, rounded to the dtype of x, multiplied, and summed
  in float32. `llvm_cpu`, and `mosaic_gpu` for up to four rows, do not round w.
  The gradient d_out @ w' runs in the same implementation; that of `mosaic_gpu`
  and `llvm_cpu` is left to the next of a tuple, and by None to `blockwise`.

  Args:
    x: [..., K] of a float dtype.
    values: [K, N] int8; or [K / 2, N] uint8, two values of 4 bits a byte as
      `formats.pack_int4` packs them, integers in two's complement or codes.
    scales: [K / G, N] float32 or float16, one for G consecutive rows of a
      column. A single row is one scale a column. With 4 bits, 32 divides G.
    codebook: [16] float32, the value of each 4-bit code. None takes 4 bits as
      integers.
    out_dtype: Of the result; None is that of x.
    implementation: See `dispatch`: 'reference', 'blockwise', 'mosaic_tpu',
      'mosaic_gpu', 'llvm_cpu' (1 to 16 rows), or None.

  Returns:
    [..., N] in `out_dtype`.

  Raises:
    ValueError: Shapes or dtypes do not fit together.
    NotImplementedError: No implementation that was named takes the arguments,
      or a gradient with respect to scales or codebook is asked for.
  """
  _check(x, values, scales, codebook)
  out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
  shape = (*x.shape[:-1], values.shape[1])
  if 0 in shape:
    return jnp.zeros(shape, out_dtype)
  if not isinstance(implementation, str | None):
    implementation = tuple(implementation)
  scales, codebook = jax.tree.map(_without_gradient, (scales, codebook))
  rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
  out = _product(
    _How(False, x.dtype, out_dtype, implementation),
    *shards.alike((rows, values, scales, codebook)),
  )
  return out.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, x, values, scales, codebook):
  """x @ w, or x @ w' if transposed; linear in x, and differentiable so."""
  bound = dispatch.bind(
    IMPLEMENTATIONS, transposed=how.transposed, out_dtype=how.out_dtype
  )
  return dispatch.call(
    'dequant_matmul', bound, how.implementation, x, values, scales, codebook
  )


def _keep(how, x, *weight):
  return _product(how, x, *weight), weight


def _pull_back(how, weight, d_out):
  return _product(how.backward(), d_out, *weight), None, None, None


_product.defvjp(_keep, _pull_back)


@jax.custom_jvp
def _without_gradient(x: jax.Array) -> jax.Array:
  return x


@_without_gradient.defjvp
def _refuse(primals, tangents):
  # It would be a sum over the K by N products that nothing here ever holds.
  raise NotImplementedError(
    'dequant_matmul has no gradient for scales and codebook; differentiate'
    ' x @ reference.dequantize(values, scales, codebook) instead.'
  )


def _check(x, values, scales, codebook) -> None:
  packed = values.dtype == jnp.uint8
  if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'x must be [..., K] of a float dtype, got {x.shape} {x.dtype}.'
    )
  if values.dtype not in (jnp.int8, jnp.uint8):
    raise ValueError(
      'values must be int8, or uint8 with two values of 4 bits a byte, got'
      f' {values.dtype}.'
    )
  k = x.shape[-1]
  if values.ndim != 2 or values.shape[0] * (2 if packed else 1) != k:
    raise ValueError(
      f'x must be [..., K] and values {"[K / 2, N]" if packed else "[K, N]"},'
      f' got {x.shape} and {values.shape}.'
    )
  if scales.ndim != 2 or scales.shape[1] != values.shape[1]:
    raise ValueError(
      f'scales must be [K / G, {values.shape[1]}], got {scales.shape}.'
    )
  if scales.dtype not in (jnp.float32, jnp.float16):
    raise ValueError(f'scales must be float32 or float16, got {scales.dtype}.')
  groups, unit = scales.shape[0], formats.BLOCK if packed else 1
  if not groups or k % (groups * unit) or not k:
    raise ValueError(
      f'{groups} groups of {values.dtype} values must divide K = {k} into'
      f' multiples of {unit}.'
    )
  if codebook is None:
    return
  if not packed or codebook.shape != (16,) or codebook.dtype != jnp.float32:
    raise ValueError(
      'codebook must be [16] float32 and its codes uint8, got'
      f' {codebook.shape} {codebook.dtype} and {values.dtype}.'
    )
