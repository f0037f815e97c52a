"""Every Hopper kernel through the real compiler of an H200, without a GPU.

Prints registers and spills of each: python -m pytest -m aot -s (make test-aot).
What does not fit in shared memory fails to lower. The assembler reports on
standard error, and only if it was asked before the process began: this module,
run as a program, is the process that compiles.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
from jax import sharding
from jax.experimental import topologies
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import api as attention
from pallas_kernels.binary_matmul import api as binary_matmul
from pallas_kernels.decode_attention import api as decode_attention
from pallas_kernels.dequant_matmul import api as dequant_matmul
from pallas_kernels.int8_matmul import api as int8_matmul
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.aot

HERE = pathlib.Path(__file__).parent


def _attention(dtype, size, heads, kv_heads, width, **options):
  shape = lambda n: ((2, size, n, width), dtype)
  run = functools.partial(
    attention.attention, implementation='mosaic_gpu', **options
  )
  return run, [shape(heads), shape(kv_heads), shape(kv_heads)]


def _gradients(*args, **options):
  run, shapes = _attention(*args, **options)
  loss = lambda *arrays: run(*arrays)[0].astype(jnp.float32).sum()
  return jax.grad(loss, (0, 1, 2)), shapes


def _decode(dtype, time, slots, heads, kv_heads, width, batch=4, **options):
  cache = ((batch, kv_heads, slots, width), dtype)
  run = functools.partial(
    decode_attention.decode_attention, implementation='mosaic_gpu', **options
  )
  shapes = [((batch, time, heads, width), dtype), cache, cache]
  return run, [*shapes, ((batch,), jnp.int32)]


def _decode_int8(*args, **options):
  run, (q, k, v, length) = _decode(*args, **options)
  shape = k[0]
  narrow, scales = (shape, jnp.int8), (shape[:3], jnp.float32)

  def scaled(q, k, v, length, k_scales, v_scales):
    return run(q, k, v, length, k_scales=k_scales, v_scales=v_scales)

  return scaled, [q, narrow, narrow, length, scales, scales]


def _int8(dtype, m, k, n):
  run = functools.partial(
    int8_matmul.int8_matmul, implementation='mosaic_gpu', out_dtype=dtype
  )
  return run, [((m, k), dtype), ((k, n), jnp.int8), ((n,), jnp.float32)]


def _weights(kind, dtype, m, k, n, group, out_dtype=None):
  run = functools.partial(
    dequant_matmul.dequant_matmul,
    implementation='mosaic_gpu',
    out_dtype=out_dtype,
  )
  values = ((k, n), jnp.int8) if kind == 'int8' else ((k // 2, n), jnp.uint8)
  shapes = [((m, k), dtype), values, ((k // group, n), jnp.float32)]
  return run, shapes + [((16,), jnp.float32)] * (kind == 'nf4')


def _binary(m, k, n):
  run = functools.partial(
    binary_matmul.binary_matmul, size=k, implementation='mosaic_gpu'
  )
  words = -(-k // 32)
  return run, [((m, words), jnp.uint32), ((n, words), jnp.uint32)]


CASES = {
  'attention, bf16, causal, width 128': _attention(
    jnp.bfloat16, 4096, 16, 16, 128, causal=True
  ),
  'attention, bf16, grouped, width 64': _attention(
    jnp.bfloat16, 4096, 9, 3, 64, causal=True
  ),
  'attention, f16, not causal': _attention(jnp.float16, 1000, 8, 8, 128),
  'attention, window, softcap': _attention(
    jnp.bfloat16, 4096, 8, 4, 128, causal=True, window=700, softcap=50.0
  ),
  'gradients, bf16, causal, width 128': _gradients(
    jnp.bfloat16, 4096, 16, 4, 128, causal=True
  ),
  'gradients, bf16, grouped, width 64': _gradients(
    jnp.bfloat16, 4096, 9, 3, 64, causal=True
  ),
  'gradients, f16, not causal': _gradients(jnp.float16, 1000, 8, 8, 128),
  'gradients, window, softcap': _gradients(
    jnp.bfloat16, 4096, 8, 4, 128, causal=True, window=700, softcap=50.0
  ),
  'gradients, window, softcap, width 64': _gradients(
    jnp.float16, 4096, 8, 4, 64, window=700, softcap=50.0
  ),
  'decode, bf16, one query': _decode(jnp.bfloat16, 1, 8192, 32, 8, 128),
  'decode, bf16, tree of 64': _decode(
    jnp.bfloat16, 64, 8192, 32, 8, 128, ancestors=jnp.eye(64, dtype=bool)
  ),
  'decode, f16, window, width 64': _decode(
    jnp.float16, 4, 8192, 9, 3, 64, batch=1, window=4096
  ),
  'decode, int8 cache, bf16, one query': _decode_int8(
    jnp.bfloat16, 1, 8192, 32, 8, 128
  ),
  'decode, int8 cache, bf16, tree of 64': _decode_int8(
    jnp.bfloat16, 64, 8192, 32, 8, 128, ancestors=jnp.eye(64, dtype=bool)
  ),
  'decode, int8 cache, f16, window, width 64': _decode_int8(
    jnp.float16, 4, 8192, 9, 3, 64, batch=1, window=4096, softcap=30.0
  ),
  'int8, bf16, 8192^3': _int8(jnp.bfloat16, 8192, 8192, 8192),
  'int8, f32, odd sizes': _int8(jnp.float32, 33, 1000, 130),
  'int8 weights, one bf16 row': _weights(
    'int8', jnp.bfloat16, 1, 8192, 8192, 8192
  ),
  'int4 weights, one bf16 row': _weights(
    'int4', jnp.bfloat16, 1, 8192, 8192, 64
  ),
  'NF4 weights, one bf16 row': _weights('nf4', jnp.bfloat16, 1, 8192, 8192, 64),
  'int8 weights, four f16 rows, groups of 32': _weights(
    'int8', jnp.float16, 4, 8192, 8192, 32
  ),
  'int4 weights, four bf16 rows': _weights(
    'int4', jnp.bfloat16, 4, 8192, 28672, 128, jnp.float32
  ),
  'NF4 weights, four bf16 rows, odd sizes': _weights(
    'nf4', jnp.bfloat16, 4, 4096, 1030, 64
  ),
  'NF4 weights, 8 bf16 rows': _weights('nf4', jnp.bfloat16, 8, 8192, 8192, 64),
  'NF4 weights, 64 f16 rows': _weights('nf4', jnp.float16, 64, 8192, 8192, 64),
  'NF4 weights, 4096 bf16 rows': _weights(
    'nf4', jnp.bfloat16, 4096, 4096, 4096, 64
  ),
  'int4 weights, groups of 32, 128 bf16 rows': _weights(
    'int4', jnp.bfloat16, 128, 8192, 8192, 32, jnp.float32
  ),
  'int8 weights, odd sizes': _weights('int8', jnp.float16, 33, 1000, 130, 1000),
  'binary 4096^3': _binary(4096, 4096, 4096),
}


def compile_all():
  """Compiles each case, with its name before what the assembler says."""
  topology = topologies.get_topology_desc(
    platform='cuda',
    target_config=(HERE / 'h200.txtpb').read_text(),
    topology='1x1x1',
  )
  single = sharding.SingleDeviceSharding(topology.devices[0])
  for name, (run, shapes) in CASES.items():
    print(f'case: {name}', file=sys.stderr, flush=True)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=single) for shape in shapes]
    with hopper.described():
      jax.jit(run).lower(*arrays).compile()


@pytest.fixture(scope='module')
def reports():
  """What the assembler said of each case."""
  pytest.importorskip('jax_cuda13_plugin', reason='make test-aot installs it')
  asked = {'JAX_PLATFORMS': 'cpu', 'MOSAIC_GPU_DUMP_PTXAS': '1'}
  child = subprocess.run(
    [sys.executable, '-m', 'tests.pallas_kernels.compile_cuda_test'],
    cwd=HERE.parents[1],
    env=os.environ | asked,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=900,
  )
  assert child.returncode == 0, child.stdout[-2000:]
  parts = re.split(r'^case: (.*)$', child.stdout, flags=re.M)
  return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize('case', CASES)
def test_it_compiles_without_spills(reports, case):
  registers = re.findall(r'Used (\d+) registers', reports[case])
  spills = re.findall(r'(\d+) bytes spill (?:stores|loads)', reports[case])
  print(f'\n{"H200":12} {case:42} {registers} registers, spills {spills}')
  assert registers
  assert len(spills) == 2 * len(registers)
  assert set(spills) == {'0'}


if __name__ == '__main__':
  compile_all()
