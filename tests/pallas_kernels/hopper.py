"""A Hopper GPU for tests, where there is none: described, or interpreted."""

import jax
from jax import export
from jax import sharding
import pytest

needs_interpreter = pytest.mark.skipif(
  jax.__version_info__ < (0, 11),
  reason='the GPU interpreter of this jax knows no layout_cast',
)


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
  """For `interpret=` of a kernel."""
  from jax.experimental.pallas import mosaic_gpu as plgpu

  return plgpu.InterpretGPUParams(**options)


def races_found() -> bool:
  """Whether the last kernel raced, run by `interpreter(detect_races=True)`."""
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

  return interpret_pallas_call.get_races().races_found
