"""Every operation inside `shard_map`, with JAX's checks of what varies.

Each device has its own part of some arrays and shares the others. Results and
gradients are those of one device, whichever implementation runs.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels import llvm_cpu
from pallas_kernels import shards
from pallas_kernels.attention import api as attention
from pallas_kernels.binary_matmul import api as binary_matmul
from pallas_kernels.decode_attention import api as decode_attention
from pallas_kernels.int8_matmul import api as int8_matmul

_MINE, _SHARED = P('device'), P()
_NAMES = [None, 'blockwise', 'reference']
_ATTENTION = _NAMES if llvm_cpu.missing() else [*_NAMES, 'llvm_cpu']


def _normal(*shape, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), dtype)


def _check(run, specs, out_specs, *arrays, tolerance=1e-5):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('device',))
  sharded = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out_specs)
  got, right = jax.jit(sharded)(*arrays), jax.jit(run)(*arrays)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance
    ),
    got,
    right,
  )


@pytest.mark.short
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', _ATTENTION)
def test_attention(name, dtype):
  """Keys and values may be shared, and the offsets each device's own."""
  if name == 'llvm_cpu' and dtype != jnp.float32:
    pytest.skip('the kernel takes float32')
  run = functools.partial(
    attention.attention, causal=True, window=20, implementation=name
  )
  q = _normal(4, 70, 4, 64, dtype=dtype)
  k, v = (_normal(4, 70, 2, 64, dtype=dtype, seed=s) for s in (1, 2))
  lengths = jnp.asarray([70, 3, 50, 64])
  with_lengths = lambda q, k, v, n: run(q, k, v, kv_length=n)
  tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
  _check(
    with_lengths,
    (_MINE,) * 4,
    _MINE,
    *(q, k, v, lengths),
    tolerance=tolerance,
  )
  one = lambda q, k, v: run(q, *(jnp.repeat(x, len(q), 0) for x in (k, v)))
  _check(
    one, (_MINE, _SHARED, _SHARED), _MINE, q, k[:1], v[:1], tolerance=tolerance
  )


@pytest.mark.parametrize('name', _ATTENTION)
def test_gradients_of_shared_keys_are_summed_over_devices(name):
  # Heads of queries are divided, the one head of keys is shared.
  q, k, v = _normal(2, 40, 4, 64), _normal(2, 40, 1, 64), _normal(2, 40, 1, 64)

  def loss(q, k, v):
    out, lse = attention.attention(q, k, v, causal=True, implementation=name)
    return jnp.sum(out**2) + jnp.sum(lse)

  def run(q, k, v):
    return jax.grad(loss, (0, 1, 2))(q, k, v)

  heads = P(None, None, 'device')
  _check(
    run,
    (heads, _SHARED, _SHARED),
    (heads, _SHARED, _SHARED),
    *(q, k, v),
    tolerance=1e-4,
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', _NAMES)
def test_decode_attention(name, dtype):
  run = functools.partial(
    decode_attention.decode_attention, splits=2, implementation=name
  )
  q = _normal(4, 3, 4, 64, dtype=dtype)
  k, v = (_normal(4, 2, 128, 64, dtype=dtype, seed=s) for s in (1, 2))
  lengths = jnp.asarray([128, 3, 50, 64])
  _check(
    lambda *arrays: run(*arrays),
    (_MINE,) * 4,
    _MINE,
    *(q, k, v, lengths),
    tolerance=1e-5 if dtype == jnp.float32 else 3e-2,
  )


@pytest.mark.parametrize('name', _NAMES)
def test_products(name):
  """Rows divided and weights shared, and the other way round."""
  x = _normal(8, 64)
  w = jnp.asarray(np.random.default_rng(1).integers(-127, 128, (64, 32)))
  w, scales = w.astype(jnp.int8), jnp.arange(1.0, 33.0)
  run = functools.partial(int8_matmul.int8_matmul, implementation=name)
  run = functools.partial(lambda f, *arrays: f(*arrays), run)
  columns = P(None, 'device')
  _check(run, (_MINE, _SHARED, _SHARED), _MINE, x, w, scales, tolerance=0)
  _check(run, (_SHARED, columns, _MINE), columns, x, w, scales, tolerance=0)

  a, b = (binary_matmul.pack_signs(_normal(n, 70, seed=n)) for n in (64, 16))
  signs = lambda a, b: binary_matmul.binary_matmul(
    a, b, 70, implementation=name
  )
  _check(signs, (_MINE, _SHARED), _MINE, a, b, tolerance=0)
  _check(signs, (_SHARED, _MINE), columns, a, b, tolerance=0)


def test_nothing_is_marked_outside():
  x = {'a': jnp.ones(3), 'b': (jnp.zeros(2), None)}
  assert shards.alike(x)['a'] is x['a']
  assert shards.full((2,), 7, jnp.int32, x['a']).tolist() == [7, 7]
  made = shards.out_shape((2, 3), jnp.int8, x['a'])
  assert (made.shape, made.dtype) == ((2, 3), jnp.int8)
