"""The gradients of the Hopper kernel of attention, interpreted and lowered.

See `attention.mosaic_gpu_test` for where the interpreter runs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.attention import api
from pallas_kernels.attention import blockwise
from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention import mosaic_gpu_backward
from tests.pallas_kernels import attention_cases as cases
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.short

CASES = {
  'causal, grouped': {'causal': True, 'heads': (2, 1), 'offset': (0, 60)},
  'lengths, one of zero': {'kv_length': (129, 0), 'sizes': (20, 200)},
  'window': {
    'causal': True,
    'window': 60,
    'sizes': (70, 400),
    'offset': (300, 20),
  },
  'window both ways, soft-cap': {
    'window': 50,
    'softcap': 1.5,
    'offset': (100, -90),
    'sizes': (150, 260),
  },
  'width 128, f16': {
    'causal': True,
    'widths': (128, 128),
    'dtype': jnp.float16,
    'heads': (1, 1),
    'kv_length': (100, 130),
  },
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  if jax.__version_info__ >= (0, 11) or jax.default_backend() == 'gpu':
    interpret = hopper.interpreter()
    kernel = blockwise.differentiable(
      functools.partial(mosaic_gpu.forward, interpret=interpret),
      functools.partial(mosaic_gpu_backward.backward, interpret=interpret),
    )
    monkeypatch.setitem(api.IMPLEMENTATIONS, 'interpreted', kernel)


def _make(case):
  options = {
    'sizes': (140, 200),
    'widths': (64, 64),
    'heads': (1, 1),
    'dtype': jnp.bfloat16,
    **case,
  }
  return cases.make(**options)


def _cotangents(arrays):
  q, _, v = arrays
  rng = np.random.default_rng(9)
  d_out = rng.standard_normal((*q.shape[:3], v.shape[3]))
  d_lse = rng.standard_normal((q.shape[0], q.shape[2], q.shape[1]))
  return jnp.asarray(d_out, q.dtype), jnp.asarray(d_lse, jnp.float32)


def _gradients(name, arrays, options):
  run = lambda *a: api.attention(*a, implementation=name, **options)
  return jax.vjp(run, *arrays)[1](_cotangents(arrays))


@hopper.runs_the_kernel
@pytest.mark.parametrize('case', CASES)
def test_gradients_of_both_outputs(case):
  arrays, options = _make(CASES[case])
  mine = _gradients('interpreted', arrays, options)
  # Blockwise rounds p and ds to the dtype of the inputs, too.
  other = _gradients('blockwise', arrays, options)
  wide = (np.asarray(x, np.float64) for x in _cotangents(arrays))
  exact = cases.exact(arrays, options, *wide)[2:]
  for got, same_dtype, right in zip(mine, other, exact, strict=True):
    assert got.dtype == arrays[0].dtype
    assert cases.error(got, right) <= 2 * cases.error(same_dtype, right)
  seen = cases.mask(arrays[0].shape[1], arrays[1].shape[1], options)
  assert (np.asarray(mine[0])[~seen.any(2)] == 0).all()
  for grad in mine[1:]:
    assert (np.asarray(grad)[~seen.any(1)] == 0).all()


@hopper.runs_the_kernel
def test_the_kernels_have_no_races():
  """Rings of two slots go around: five tiles of keys, four of queries."""
  arrays, _ = _make({'sizes': (150, 600), 'heads': (2, 1)})
  arrays = [x[:1] for x in arrays]
  rule = masks.Rule(scale=0.125, causal=True)
  limits = masks.Limits(jnp.asarray([450]), jnp.asarray([600]), None, None)
  out, lse = blockwise.forward(rule, *arrays, limits)
  args = rule, *arrays, limits, out, lse, *_cotangents(arrays)
  got = mosaic_gpu_backward.backward(
    *args, interpret=hopper.interpreter(detect_races=True)
  )
  assert not hopper.races_found()
  for mine, right in zip(got, blockwise.backward(*args), strict=True):
    np.testing.assert_allclose(
      np.asarray(mine, np.float32), np.asarray(right, np.float32), atol=0.03
    )


@hopper.runs_the_kernel
def test_what_hidden_keys_hold_does_not_matter():
  """Behind the length, and before and after all windows."""
  (q, k, v), options = _make(
    {'window': 30, 'offset': (20, 60), 'kv_length': (200, 120)}
  )
  clean = _gradients('interpreted', (q, k, v), options)
  hidden = ~cases.mask(140, 200, options).any(1)
  assert hidden.sum(1).tolist() == [11, 31 + 80]
  k, v = (jnp.where(hidden[:, :, None, None], jnp.nan, x) for x in (k, v))
  got = _gradients('interpreted', (q, k, v), options)
  for mine, right in zip(got, clean, strict=True):
    np.testing.assert_array_equal(mine, right)


@pytest.mark.parametrize('implementation', [None, 'mosaic_gpu'])
def test_it_lowers_for_cuda_with_three_kernels(implementation):
  shape = jax.ShapeDtypeStruct((1, 300, 4, 64), jnp.bfloat16)
  run = functools.partial(
    api.attention, causal=True, implementation=implementation
  )
  grad = jax.grad(lambda *a: run(*a)[0].astype('f4').sum(), (0, 1, 2))
  text = hopper.lower(grad, shape, shape, shape)
  assert text.count('custom_call @mosaic_gpu') == 3
  if implementation is None:
    lowered = jax.jit(grad).trace(shape, shape, shape)
    assert 'mosaic_gpu' not in lowered.lower().as_text()
