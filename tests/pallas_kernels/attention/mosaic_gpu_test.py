"""The Hopper kernel of attention, interpreted and lowered: no GPU is needed.

Where one is (`make test-gpu`), what is interpreted here runs on it.
The interpreter of jax before 0.11 lacks what the kernel uses, so there it is
only lowered; the short suite runs with a newer one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.attention import api
from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention import reference
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.short

CASES = {
  'plain': {},
  'causal, grouped': {'causal': True, 'heads': (4, 2)},
  'more keys': {'causal': True, 'sizes': (70, 300), 'offset': 230},
  'lengths, one of zero': {'kv_length': (129, 0), 'causal': True},
  'negative offset': {'causal': True, 'offset': -70, 'sizes': (140, 90)},
  'window': {'causal': True, 'window': 60, 'sizes': (200, 330), 'offset': 130},
  'window both ways': {'window': 150, 'sizes': (140, 400), 'offset': 100},
  'softcap': {'softcap': 2.0, 'scale': 0.7},
  'width 128': {'causal': True, 'width': 128, 'dtype': jnp.float16},
}


def _case(
  sizes=(130, 200),
  heads=(1, 1),
  width=64,
  dtype=jnp.bfloat16,
  offset=0,
  kv_length=None,
  scale=0.125,
  **options,
):
  rng = np.random.default_rng(0)
  batch = 1 if kv_length is None else 2
  (n, m), (h, kh) = sizes, heads
  q, k, v = (
    jnp.asarray(rng.standard_normal((batch, s, c, width)), dtype)
    for s, c in ((n, h), (m, kh), (m, kh))
  )
  lengths = jnp.asarray((m,) if kv_length is None else kv_length, jnp.int32)
  offsets = jnp.full(batch, offset, jnp.int32)
  limits = masks.Limits(offsets, lengths, None, None)
  return masks.Rule(scale=scale, **options), (q, k, v, limits)


def _exact(rule, arrays):
  """Out and log-sum-exp from float32 copies of the inputs."""
  q, k, v, limits = arrays
  wide = (x.astype(jnp.float32) for x in (q, k, v))
  with jax.default_matmul_precision('highest'):
    return reference.attention(rule, *wide, limits)


def _error(got, exact):
  got, exact = (np.asarray(x, np.float64) for x in (got, exact))
  np.testing.assert_array_equal(np.isinf(got), np.isinf(exact))
  finite = np.isfinite(exact)
  return np.abs(got[finite] - exact[finite]).max(initial=0)


@hopper.runs_the_kernel
@pytest.mark.parametrize('case', CASES)
def test_it_is_the_formula(case):
  rule, arrays = _case(**CASES[case])
  out, lse = mosaic_gpu.forward(rule, *arrays, interpret=hopper.interpreter())
  exact = _exact(rule, arrays)
  # What rounding the exact result and the weights to this dtype costs.
  dtype = arrays[0].dtype
  unit = float(jnp.finfo(dtype).eps) / 2
  largest = float(jnp.abs(exact[0]).max())
  assert out.dtype == dtype
  assert _error(out, exact[0]) <= 2 * unit * max(1.0, largest)
  assert _error(lse, exact[1]) < 1e-4


@hopper.runs_the_kernel
def test_it_has_no_races():
  rule, arrays = _case(causal=True, sizes=(128, 384), offset=256)
  out, _ = mosaic_gpu.forward(
    rule, *arrays, interpret=hopper.interpreter(detect_races=True)
  )
  assert not hopper.races_found()
  assert _error(out, _exact(rule, arrays)[0]) < 0.01


@hopper.runs_the_kernel
@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('options', [{'causal': True}, {'window': 9}], ids=str)
def test_what_hidden_keys_hold_does_not_matter(bad, options):
  rule, (q, k, v, limits) = _case(kv_length=(200, 20), offset=60, **options)
  run = functools.partial(
    mosaic_gpu.forward, rule, limits=limits, interpret=hopper.interpreter()
  )
  clean = run(q, k, v)
  hidden = ~masks.as_array(rule, limits, 130, 200).any(1)
  assert (hidden.sum(1) > 1).all()
  k, v = (jnp.where(hidden[:, :, None, None], bad, x) for x in (k, v))
  for got, right in zip(run(q, k, v), clean, strict=True):
    np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize('implementation', [None, 'mosaic_gpu'])
def test_it_lowers_for_cuda_with_the_kernel(implementation):
  shape = jax.ShapeDtypeStruct((1, 300, 4, 64), jnp.bfloat16)
  run = functools.partial(
    api.attention, causal=True, implementation=implementation
  )
  assert 'custom_call @mosaic_gpu' in hopper.lower(run, shape, shape, shape)


def test_without_a_gpu_the_platform_chooses_another():
  shape = jax.ShapeDtypeStruct((1, 300, 4, 64), jnp.bfloat16)
  traced = jax.jit(api.attention).trace(shape, shape, shape)
  for platform in ('cpu', 'tpu'):
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert 'mosaic_gpu' not in lowered
    assert ('tpu_custom_call' in lowered) == (platform == 'tpu')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'dtype': jnp.float32}, 'float32 is not a dtype of this kernel'),
    ({'width': 80}, 'heads of width 80 and 80 are not'),
    ({'tiles': masks.Tiles((64, 64), ((0,),))}, 'segments and tiles are not'),
  ],
)
def test_what_it_does_not_take_is_said(change, message):
  rule, arrays = _case(**change)
  with pytest.raises(NotImplementedError, match=message):
    mosaic_gpu.forward(rule, *arrays)


def test_mixed_dtypes_are_left_to_others():
  rule, (q, k, v, limits) = _case()
  k, v = k.astype(jnp.float16), v.astype(jnp.float16)
  with pytest.raises(NotImplementedError, match='dtypes: bfloat16, float16'):
    mosaic_gpu.forward(rule, q, k, v, limits)
  assert 'custom_call @mosaic_gpu' not in hopper.lower(api.attention, q, k, v)


def test_on_another_platform_it_says_so():
  _, (q, k, v, _) = _case()
  with pytest.raises(Exception, match='mosaic_gpu is a kernel for cuda'):
    jax.jit(lambda *a: api.attention(*a, implementation='mosaic_gpu'))(q, k, v)
