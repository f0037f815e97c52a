"""Every TPU kernel through the real TPU compiler, without a TPU.

Prints the VMEM of each: python -m pytest -m aot -s (make test-aot).
"""

import functools
import os
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import api as attention
from pallas_kernels.attention import patterns
from pallas_kernels.binary_matmul import api as binary_matmul
from pallas_kernels.decode_attention import api as decode_attention
from pallas_kernels.dequant_matmul import api as dequant_matmul
from pallas_kernels.int8_matmul import api as int8_matmul

pytestmark = pytest.mark.aot

CHIPS = ('v5e:2x2', 'v6e:2x2', 'tpu7x:2x2x1')
VMEM = 64 * 2**20  # of the smallest of them; a kernel also needs room to spare


def _attention(dtype, size, heads, kv_heads, width, **options):
  shape = lambda n: ((1, size, n, width), dtype)
  run = functools.partial(
    attention.attention, implementation='mosaic_tpu', **options
  )
  return lambda *arrays: run(*arrays)[0], [
    shape(heads),
    shape(kv_heads),
    shape(kv_heads),
  ]


def _attention_backward(*args, **options):
  run, shapes = _attention(*args, **options)
  loss = lambda *arrays: run(*arrays).sum()
  return jax.grad(loss, (0, 1, 2)), shapes


def _decode(dtype, cache, time, slots, heads, kv_heads, width, tree=False):
  shapes = [
    ((4, time, heads, width), dtype),
    *[((4, kv_heads, slots, width), cache)] * 2,
    ((4,), jnp.int32),
  ]
  names = []
  if cache == jnp.int8:
    names += ['k_scales', 'v_scales']
    shapes += [((4, kv_heads, slots), jnp.float32)] * 2
  if tree:
    names += ['ancestors']
    shapes += [((time, time), jnp.bool)]
  run = functools.partial(
    decode_attention.decode_attention, implementation='mosaic_tpu'
  )
  call = lambda q, k, v, n, *more: run(q, k, v, n, **dict(zip(names, more)))
  return call, shapes


def _int8(dtype, m, k, n):
  run = functools.partial(int8_matmul.int8_matmul, implementation='mosaic_tpu')
  return run, [((m, k), dtype), ((k, n), jnp.int8), ((n,), jnp.float32)]


def _binary(m, k, n):
  run = functools.partial(
    binary_matmul.binary_matmul, size=k, implementation='mosaic_tpu'
  )
  words = -(-k // 32)
  return run, [((m, words), jnp.uint32), ((n, words), jnp.uint32)]


def _dequant(dtype, m, k, n, *, bits=4, group=64, codebook=False):
  run = functools.partial(
    dequant_matmul.dequant_matmul, implementation='mosaic_tpu'
  )
  values = ((k, n), jnp.int8) if bits == 8 else ((k // 2, n), jnp.uint8)
  weight = [values, ((k // group, n), jnp.float32)]
  if codebook:
    weight.append(((16,), jnp.float32))
  return run, [((m, k), dtype), *weight]


def _dequant_backward(*args, **options):
  run, shapes = _dequant(*args, **options)
  return jax.grad(lambda *arrays: jnp.square(run(*arrays)).sum()), shapes


CASES = {
  'attention, bf16, width 128': _attention(
    jnp.bfloat16, 4096, 8, 8, 128, causal=True
  ),
  'attention, f32, grouped, width 64': _attention(
    jnp.float32, 4096, 9, 3, 64, causal=True
  ),
  'attention, bf16, window, softcap, 1000': _attention(
    jnp.bfloat16, 1000, 8, 4, 256, causal=True, window=300, softcap=50.0
  ),
  'attention with gradients, bf16': _attention_backward(
    jnp.bfloat16, 2048, 8, 8, 128, causal=True
  ),
  'attention with gradients, f32, grouped': _attention_backward(
    jnp.float32, 2048, 9, 3, 64, causal=True
  ),
  'attention with gradients, tiles, segments': _attention_backward(
    jnp.bfloat16,
    2048,
    8,
    4,
    128,
    tiles=patterns.butterfly((128, 128), 2048, 2048),
    q_segments=np.zeros((1, 2048), np.int32),
    kv_segments=np.zeros((1, 2048), np.int32),
    softcap=50.0,
  ),
  'attention with gradients, tiles of 16': _attention_backward(
    jnp.bfloat16,
    1000,
    2,
    1,
    64,
    tiles=patterns.local_global((16, 128), 1000, 1000, near=2, everywhere=1),
    q_segments=np.zeros((1, 1000), np.int32),
    kv_segments=np.zeros((1, 1000), np.int32),
    causal=True,
  ),
  'decode, bf16, one query': _decode(
    jnp.bfloat16, jnp.bfloat16, 1, 8192, 32, 8, 128
  ),
  'decode, bf16, int8 cache, tree of 64': _decode(
    jnp.bfloat16, jnp.int8, 64, 8192, 32, 8, 128, tree=True
  ),
  'decode, f32, 8 queries, width 64': _decode(
    jnp.float32, jnp.float32, 8, 384, 9, 3, 64
  ),
  'int8, bf16 rows quantized inside': _int8(jnp.bfloat16, 256, 4096, 4096),
  'int8, one f32 row': _int8(jnp.float32, 1, 576, 1536),
  'int8, odd sizes': _int8(jnp.float32, 33, 1000, 130),
  'binary 1024^3': _binary(1024, 1024, 1024),
  'binary, odd sizes': _binary(33, 1000, 130),
  'dequant, NF4, one bf16 row': _dequant(
    jnp.bfloat16, 1, 576, 49152, codebook=True
  ),
  'dequant, NF4, 1024 bf16 rows': _dequant(
    jnp.bfloat16, 1024, 4096, 4096, codebook=True
  ),
  'dequant, NF4, gradient, f32': _dequant_backward(
    jnp.float32, 300, 1536, 576, codebook=True
  ),
  'dequant, NF4, gradient, bf16': _dequant_backward(
    jnp.bfloat16, 1024, 4096, 4096, codebook=True
  ),
  'dequant, int4, groups of 32, f32': _dequant(
    jnp.float32, 128, 1536, 576, group=32
  ),
  'dequant, int4, groups of 128, gradient': _dequant_backward(
    jnp.bfloat16, 8, 4096, 1000, group=128
  ),
  'dequant, int4, groups of 2048': _dequant(
    jnp.bfloat16, 8, 4096, 1000, group=2048
  ),
  'dequant, int4, a scale a column': _dequant(
    jnp.bfloat16, 256, 11008, 4096, group=11008
  ),
  'dequant, int8, a scale a column, odd sizes': _dequant(
    jnp.float32, 33, 1000, 130, bits=8, group=1000
  ),
  'dequant, int8, groups of 40, gradient': _dequant_backward(
    jnp.bfloat16, 33, 2000, 700, bits=8, group=40
  ),
  'dequant, int8, bf16 rows': _dequant(
    jnp.bfloat16, 1024, 4096, 4096, bits=8, group=4096
  ),
}


@pytest.fixture(scope='module', params=CHIPS)
def chip(request):
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # there is no such server here
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['TPU_ACCELERATOR_TYPE'] = 'v5litepod-4'
  topology = topologies.get_topology_desc(request.param, platform='tpu')
  return request.param, jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.mark.parametrize('case', CASES)
def test_it_compiles_and_fits(chip, case):
  name, sharding = chip
  run, shapes = CASES[case]
  arrays = [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
  traced = jax.jit(run).trace(*arrays)
  program = traced.lower(lowering_platforms=('tpu',)).compile().as_text()
  kernels = [x for x in program.splitlines() if 'tpu_custom_call' in x]
  assert kernels
  found = re.findall(
    r'"used_scoped_memory_configs":\[\{[^]]*"size":"(\d+)"', '\n'.join(kernels)
  )
  assert found
  largest = max(map(int, found))
  print(f'\n{name:12} {case:42} {largest / 2**20:6.2f} MiB of VMEM')
  assert largest < VMEM
