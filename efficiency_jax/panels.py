"""A model's matrices in panels, from which a CPU multiplies faster.

    lm = pretrained.load('smollm2-135m')
    lm = dataclasses.replace(lm, params=panels.for_cpu(lm.params))

The numbers are the same, and `quantization.rules.dequantize` gives the arrays
back. Techniques that change weights come before.
"""

import jax
import jax.numpy as jnp

from efficiency_jax.leaves import PanelTensor
from efficiency_jax.types import Params
from pallas_kernels import llvm_cpu
from pallas_kernels.panel_matmul.reference import WIDTH
from pallas_kernels.panel_matmul.reference import to_panels


def for_cpu(params: Params) -> Params:
  """Kernels and tables in panels, where that is faster.

  That is where programs are for a CPU that kernels of our own can be compiled
  for; elsewhere the parameters come back as they are, as do leaves that are not
  a float32 matrix or have no multiple of 32 columns (rows, for a table).
  """
  if llvm_cpu.missing():
    return params
  return jax.tree_util.tree_map_with_path(_in_panels, params)


def _in_panels(path, leaf: jax.Array) -> jax.Array | PanelTensor:
  name = getattr(path[-1], 'key', None)
  transposed = name == 'table'
  if name not in ('kernel', 'table') or leaf.ndim != 2:
    return leaf
  if leaf.dtype != jnp.float32 or leaf.shape[0 if transposed else 1] % WIDTH:
    return leaf
  panels = to_panels(leaf.T if transposed else leaf)
  return PanelTensor(panels=panels, transposed=transposed)
