"""A Hopper GPU for tests: the real one, or it is described or interpreted.

On a GPU (`make test-gpu`) what is interpreted elsewhere runs as it is.
"""

import jax
from jax import export
from jax import sharding
import pytest

_interpretable = pytest.mark.skipif(
  jax.__version_info__ < (0, 11) and jax.default_backend() != 'gpu',
  reason='the GPU interpreter of this jax knows no layout_cast',
)


def runs_the_kernel(test):
  """Marks a test that runs a kernel, on a GPU or interpreted."""
  return pytest.mark.gpu(_interpretable(test))


def described():
  """Within it, programs are lowered for an H200."""
  device = sharding.AbstractDevice(
    device_kind='NVIDIA H200', num_cores=132, platform='gpu'
  )
  mesh = sharding.AbstractMesh((), (), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def lower(run, *shapes):
  """The program of a function for CUDA, as text."""
  unchecked = [export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
  with described():
    program = export.export(
      jax.jit(run), platforms=['cuda'], disabled_checks=unchecked
    )(*shapes)
  return program.mlir_module()


def interpreter(**options):
  """For `interpret=` of a kernel: False on a GPU, where it is compiled."""
  if jax.default_backend() == 'gpu':
    return False
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.InterpretGPUParams(**options)


def races_found() -> bool:
  """Whether the last kernel raced, run by `interpreter(detect_races=True)`."""
  if jax.default_backend() == 'gpu':
    pytest.skip('a GPU does not tell whether a kernel raced.')
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

  return interpret_pallas_call.get_races().races_found
