"""What is read from compiled programs, and the arithmetic on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.distributed import mesh as meshes
from efficiency_jax.distributed import topology
from pallas_kernels import dispatch

P = jax.sharding.PartitionSpec
SIZE = 4096  # float32 numbers on each of eight devices
BYTES = 4 * SIZE


def _compiled(function, out_specs):
  mesh = meshes.make(data=8)
  run = jax.shard_map(
    function, mesh=mesh, in_specs=P('data'), out_specs=out_specs
  )
  x = jax.ShapeDtypeStruct((8 * SIZE,), jnp.float32)
  return jax.jit(run).lower(x).compile().as_text()


@pytest.mark.parametrize(
  ('kind', 'function', 'out_specs', 'sent'),
  [
    (
      'all-reduce',
      lambda x: jax.lax.psum(x, 'data'),
      P(),
      2 * BYTES * 7 / 8,
    ),
    (
      'all-gather',
      lambda x: jnp.sin(jax.lax.all_gather(x, 'data', tiled=True)),
      P('data'),
      8 * BYTES * 7 / 8,
    ),
    (
      'reduce-scatter',
      lambda x: jax.lax.psum_scatter(x, 'data', tiled=True),
      P('data'),
      BYTES * 7 / 8,
    ),
    (
      'all-to-all',
      lambda x: jax.lax.all_to_all(x, 'data', 0, 0, tiled=True),
      P('data'),
      BYTES * 7 / 8,
    ),
    (
      'collective-permute',
      lambda x: jax.lax.ppermute(x, 'data', [(n, n ^ 1) for n in range(8)]),
      P('data'),
      BYTES,
    ),
  ],
)
def test_communication_of_a_compiled_program(kind, function, out_specs, sent):
  found = topology.collectives(_compiled(function, out_specs))
  assert found == {kind: topology.Collective(1, pytest.approx(sent))}


def test_a_gradient_on_data_parallel_devices_is_reduced():
  mesh = meshes.make(data=8)

  def loss(w, x):
    return jnp.square(x @ w).mean()

  where = (meshes.replicated(mesh), meshes.batch_sharding(mesh))
  gradient = jax.jit(jax.grad(loss), in_shardings=where, out_shardings=where[0])
  w = jax.ShapeDtypeStruct((32, 16), jnp.float32)
  x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
  text = gradient.lower(w, x).compile().as_text()
  assert topology.collectives(text) == {
    'all-reduce': topology.Collective(1, 2 * 4 * 32 * 16 * 7 / 8)
  }


# As the TPU compiler writes them, shortened.
TPU_PROGRAM = """
%all-reduce-scatter.8 (input.8: f32[64,32]) -> f32[16,32] {
  %all-reduce.3 = f32[64,32]{1,0:T(8,128)} all-reduce(%input.8), channel_id=1, \
replica_groups={{0,1,2,3}}, to_apply=%add
}

%all-reduce-scatter.9 (a: f32[64,32], b: f32[8]) -> (f32[16,32], f32[2]) {
  %all-reduce.4 = (f32[64,32]{1,0:T(8,128)S(1)}, f32[8]{0}) \
all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}

%async_collective_fusion.1 (p: bf16[4,8]) -> bf16[16,8] {
  %all-gather.7 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, \
frontend_attributes={chain_id="3"}
}

%async_collective_fusion.2 (p: bf16[4,8]) -> bf16[16,8] {
  %all-gather.8 = bf16[16,8]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}, \
frontend_attributes={chain_id="3"}
}

ENTRY %main (p: bf16[4,8]) -> bf16[16,8] {
  %ags = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%p), \
channel_id=6, replica_groups=[2,4]<=[8], dimensions={0}
  %agd = bf16[16,8]{1,0} all-gather-done(%ags)
  %cps = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) \
collective-permute-start(%p), channel_id=8, source_target_pairs={{0,1},{1,0}}
  %cpd = bf16[4,8]{1,0} collective-permute-done(%cps)
  %ar = pred[6]{0} all-reduce(%x), channel_id=9, replica_groups={{0,1},{2,3}}
}
"""


def test_communication_as_the_tpu_compiler_writes_it():
  gathered = 2 * 16 * 8 * 3 / 4
  assert topology.collectives(TPU_PROGRAM) == {
    'reduce-scatter': topology.Collective(
      2, (64 * 32 * 4 + (64 * 32 + 8) * 4) * 3 / 4
    ),
    'all-gather': topology.Collective(2, 2 * gathered),
    'collective-permute': topology.Collective(1, 2 * 4 * 8),
    'all-reduce': topology.Collective(1, 2 * 6 / 2),
  }


def test_the_slowest_of_three_is_the_bound():
  chip = topology.Chip(
    flops_per_second=100.0,
    hbm_bytes=1000,
    hbm_bytes_per_second=10.0,
    link_bytes_per_second=1.0,
    links=2,
  )
  program = functools.partial(topology.Program, fits=True, hbm_bytes=500)
  sent = {'all-gather': topology.Collective(3, 8.0)}
  for work, seconds, by in (
    # What operations read and write is no bound: it may never leave the chip.
    ({'flops': 500.0, 'operand_bytes': 900.0}, 5.0, 'compute'),
    ({'argument_bytes': 40, 'output_bytes': 30}, 7.0, 'memory'),
    ({'flops': 100.0, 'collectives': sent}, 4.0, 'communication'),
  ):
    found = topology.bound(program(**work), chip)
    assert found == topology.Bound(pytest.approx(seconds), by)


def test_the_row_of_a_program():
  program = topology.Program(
    fits=True,
    hbm_bytes=4 * 2**30,
    argument_bytes=10**9,
    output_bytes=638 * 10**6,
    temporary_bytes=2 * 10**9,
    flops=197e12,
    operand_bytes=81.9e9,
    collectives={'all-gather': topology.Collective(3, 50e9)},
  )
  row = topology.summary(program, 'v5e:4x4', tokens=16_000, parameters=10**9)
  assert row['hbm_fraction'] == 0.25
  assert (row['argument_gigabytes'], row['temporary_gigabytes']) == (1, 2)
  assert row['model_teraflops'] == pytest.approx(6)  # 6 N T over 16 chips
  assert row['compute_milliseconds'] == pytest.approx(1000)
  assert row['memory_milliseconds'] == pytest.approx(2)
  assert row['operand_milliseconds'] == pytest.approx(100)
  assert row['communication_milliseconds'] == pytest.approx(500)
  assert row['bound_by'] == 'compute'
  assert row['bound_tokens_per_second'] == pytest.approx(16_000)
  assert row['bound_utilization'] == pytest.approx(6 / 197)
  assert row['collectives'] == '3 all-gather'
  assert row['all_gather_sent_bytes'] == 50e9


def test_a_program_that_does_not_fit_has_no_speed():
  program = topology.Program(fits=False, hbm_bytes=20 * 2**30)
  row = topology.summary(program, 'v5e:2x2', tokens=8000, parameters=10**9)
  assert row == {
    'fits': False,
    'hbm_gigabytes': pytest.approx(20 * 2**30 / 1e9),
    'hbm_fraction': 1.25,
  }


@pytest.mark.parametrize(
  ('name', 'links'),
  [('v5e:2x2', 2), ('v5e:8x8', 2), ('v5e:8x16', 3), ('v5e:16x16', 4)],
)
def test_the_chip_in_a_corner_sends_over_its_links(name, links):
  # A pod reduces 51.2 TB/s, 200 GB/s a chip, and is the only closed torus.
  assert topology.chip(name).links == links
  assert topology.chip(name).ici_bytes_per_second == links * 51.2e12 / 256 / 4


def test_the_compilers_refusal_tells_the_memory():
  message = (
    'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in'
    ' memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by'
    ' 4.75G.'
  )
  assert topology.needed_bytes(message) == 20.5 * 2**30
  message = (
    'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required'
    ' for HLO temporaries (32.00G) exceeds available HBM (15.75G).'
  )
  assert topology.needed_bytes(message) == 32 * 2**30
  with pytest.raises(ValueError, match='did not compile: INTERNAL: what'):
    topology.needed_bytes('INTERNAL: what')


def test_peaks_are_known_for_some_chips_only():
  memory = [topology.chip(f'{kind}:2x2').hbm_bytes for kind in ('v5e', 'v6e')]
  assert memory == [16 * 2**30, 32 * 2**30]
  for name in ('v9:2x2', 'v5e', 'v5e:4', 'v5e:4x4x4', 'tpu v5e:2x2'):
    with pytest.raises(ValueError, match=f"'{name}' must be a grid of v5e or"):
      topology.devices(name)


@pytest.mark.aot
def test_a_product_for_sixteen_chips():
  mesh = meshes.make(data=16, devices=topology.devices('v5e:4x4'))
  width, rows = 512, 4096

  def step(state, frozen, batch):
    x = batch['x'] @ frozen['w']
    return state + x.astype(jnp.float32).sum(), {'x': x[0, 0]}

  shape = jax.ShapeDtypeStruct
  program = topology.compile_step(
    step,
    mesh,
    shape((), jnp.float32),
    {'w': shape((width, width), jnp.bfloat16)},
    {'x': shape((rows, width), jnp.bfloat16)},
  )
  assert program.fits
  np.testing.assert_allclose(
    program.flops, 2 * rows / 16 * width * width, rtol=0.05
  )
  assert program.argument_bytes == pytest.approx(
    2 * width * width + 2 * rows / 16 * width, rel=0.02
  )


@pytest.mark.aot
def test_a_state_that_is_too_large_does_not_fit():
  mesh = meshes.make(data=4, devices=topology.devices('v5e:2x2'))
  program = topology.compile_step(
    lambda state, frozen, batch: (state + 1, {}),
    mesh,
    jax.ShapeDtypeStruct((5, 2**30), jnp.float32),
    {},
    {'x': jax.ShapeDtypeStruct((4,), jnp.float32)},
  )
  assert not program.fits
  assert 20e9 < program.hbm_bytes < 50e9


@pytest.mark.aot
def test_a_step_for_another_platform_is_refused():
  step = lambda state, frozen, batch: (
    dispatch.only_on('cuda', 'mosaic_gpu', state),
    {},
  )
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  mesh = meshes.make(data=4, devices=topology.devices('v5e:2x2'))
  batch = {'x': jax.ShapeDtypeStruct((4,), jnp.float32)}
  with pytest.raises(
    ValueError, match='none for a TPU: mosaic_gpu is a kernel'
  ):
    topology.compile_step(step, mesh, scalar, {}, batch)


@pytest.mark.aot
def test_an_unknown_topology_is_refused_in_one_line():
  with pytest.raises(ValueError, match="topology 'v5e:3x5' here") as caught:
    topology.devices('v5e:3x5')
  assert '\n' not in str(caught.value)
