"""What differs between the versions of jax that kernels run with."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def transposed(ref):
  """A view of a Mosaic GPU reference [m, n] as [n, m]."""
  if hasattr(ref, 'transpose') and jax.__version_info__ >= (0, 11):
    return ref.transpose((1, 0))
  return plgpu.transpose_ref(ref, (1, 0))


def load(ref, layout, optimized=True):
  """The values of a Mosaic GPU reference in a layout of registers."""
  index = () if jax.__version_info__ >= (0, 11) else ((),)
  return plgpu.load(ref, *index, layout=layout, optimized=optimized)
