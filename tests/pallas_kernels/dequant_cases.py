"""Quantized products for the tests of both Hopper kernels of them."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dequant_matmul import formats
from pallas_kernels.dequant_matmul import mosaic_gpu
from tests.pallas_kernels import hopper

QUANTIZE = {
  'int8': formats.quantize_int8,
  'int4': formats.quantize_int4,
  'nf4': formats.quantize_nf4,
}


def case(kind, group, sizes, dtype=jnp.bfloat16, seed=0):
  """x, and a weight of the format."""
  rng = np.random.default_rng(seed)
  m, k, n = sizes
  x = jnp.asarray(rng.standard_normal((m, k)), dtype)
  # Columns of different sizes, so that a scale of another one shows.
  w = rng.standard_normal((k, n)) * rng.uniform(0.1, 2, (k, n))
  return x, QUANTIZE[kind](jnp.asarray(w, jnp.float32), group)


def run(x, weight, *, out_dtype=jnp.float32, splits=None, **options):
  """The product of the kernel, interpreted where there is no GPU."""
  return mosaic_gpu.dequant_matmul(
    x,
    *weight,
    transposed=False,
    out_dtype=out_dtype,
    splits=splits,
    interpret=hopper.interpreter(**options),
  )


def shapes(kind, m, dtype=jnp.bfloat16, k=192, n=70, group=64):
  """Of x and of a weight of the format."""
  packed = kind != 'int8'
  found = [
    ((m, k), dtype),
    ((k // 2, n), jnp.uint8) if packed else ((k, n), jnp.int8),
    ((k // group, n), jnp.float32),
  ]
  if kind == 'nf4':
    found.append(((16,), jnp.float32))
  return [jax.ShapeDtypeStruct(*shape) for shape in found]
