"""The Hopper kernel of decode attention, interpreted and lowered.

See `attention.mosaic_gpu_test` for where the interpreter runs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.decode_attention import api
from pallas_kernels.decode_attention import mosaic_gpu
from pallas_kernels.decode_attention import reference
from tests.pallas_kernels import hopper

pytestmark = pytest.mark.short

CASES = {
  'one query, grouped': {'heads': (4, 1)},
  'several, in two parts': {'time': 6, 'heads': (2, 2), 'splits': 2},
  'an empty row': {'length': (0, 77), 'splits': 3},
  'shorter than the queries': {'length': (2, 9), 'time': 4},
  'window': {'window': 40, 'time': 4, 'length': (200, 30)},
  'softcap': {'softcap': 2.0, 'scale': 0.7},
  'two trees': {'time': 6, 'tree': (-1, -1, 0, 1, 1, 2), 'length': (131, 6)},
  'tree, window': {'time': 6, 'tree': (-1, 0, 0, 1, 1, 2), 'window': 2},
  'more rows than a tile': {'time': 33, 'heads': (2, 1), 'length': (250, 40)},
  'width 128': {'width': 128, 'dtype': jnp.float16, 'time': 3},
  'int8, grouped, in two parts': {
    'int8': 0.02,
    'heads': (4, 1),
    'time': 2,
    'splits': 2,
  },
  'int8, window, an empty row': {
    'int8': 0.02,
    'window': 40,
    'time': 4,
    'length': (200, 0),
    'width': 128,
  },
  'int8, tree, softcap': {
    'int8': 0.02,
    'time': 6,
    'tree': (-1, 0, 0, 1, 1, 2),
    'softcap': 2.0,
  },
  # Weights times scales as they are would be subnormal numbers of float16.
  'int8, float16, small values': {'int8': 3e-6, 'dtype': jnp.float16},
}


def _case(
  time=1,
  heads=(1, 1),
  width=64,
  slots=256,
  length=(201, 37),
  dtype=jnp.bfloat16,
  tree=None,
  splits=1,
  scale=0.125,
  int8=0.0,
  **options,
):
  rng = np.random.default_rng(0)
  q = jnp.asarray(rng.standard_normal((2, time, heads[0], width)), dtype)
  k, v = (
    jnp.asarray(rng.standard_normal((2, heads[1], slots, width)), dtype)
    for _ in range(2)
  )
  scales = None, None
  if int8:
    k, v = (
      jnp.asarray(rng.integers(-127, 128, k.shape), jnp.int8) for _ in range(2)
    )
    # Keys of a usual size, so that the scores are.
    scales = [
      jnp.asarray(rng.uniform(0.2, 1, k.shape[:3]) * size, jnp.float32)
      for size in (0.02, int8)
    ]
  ancestors = None
  if tree is not None:
    ancestors = np.eye(time, dtype=bool)
    for node, parent in enumerate(tree):
      ancestors[node] |= ancestors[parent] & (parent >= 0)
    ancestors = jnp.broadcast_to(ancestors, (2, time, time))
  length = jnp.asarray(length, jnp.int32)
  limits = masks.Limits(length - time, length, None, None, ancestors)
  rule = masks.Rule(scale=scale, causal=True, **options)
  return rule, splits, (q, k, v, limits, *scales)


def _run(rule, splits, arrays, **options):
  return mosaic_gpu.attention(
    rule,
    splits,
    *arrays,
    interpret=hopper.interpreter(**options),
  )


def _exact(rule, arrays):
  """From float32 copies of the inputs, by products in float32."""
  q, k, v, *rest = arrays
  wide = (x.astype(jnp.float32) for x in (q, k, v))
  with jax.default_matmul_precision('highest'):
    return reference.attention(rule, 1, *wide, *rest)


def _error(got, exact):
  got, exact = (np.asarray(x, np.float64) for x in (got, exact))
  np.testing.assert_array_equal(np.isinf(got), np.isinf(exact))
  finite = np.isfinite(exact)
  return np.abs(got[finite] - exact[finite]).max(initial=0)


@hopper.runs_the_kernel
@pytest.mark.parametrize('case', CASES)
def test_it_is_the_formula(case):
  rule, splits, arrays = _case(**CASES[case])
  out, lse = _run(rule, splits, arrays)
  exact = _exact(rule, arrays)
  dtype = arrays[0].dtype
  unit = float(jnp.finfo(dtype).eps) / 2
  assert out.dtype == dtype
  assert _error(out, exact[0]) <= 2 * unit * float(jnp.abs(exact[0]).max())
  assert _error(lse, exact[1]) < 1e-4


@hopper.runs_the_kernel
@pytest.mark.parametrize('int8', [0.0, 0.02])
def test_it_has_no_races(int8):
  # More tiles a part than the ring has slots.
  rule, _, arrays = _case(time=2, slots=512, length=(512, 100), int8=int8)
  out, _ = _run(rule, 1, arrays, detect_races=True)
  assert not hopper.races_found()
  assert _error(out, _exact(rule, arrays)[0]) < 0.01


@hopper.runs_the_kernel
@pytest.mark.parametrize('window', [None, 50])
def test_what_unseen_slots_hold_does_not_matter(window):
  rule, splits, (q, k, v, limits, *none) = _case(time=3, window=window)
  clean = _run(rule, splits, (q, k, v, limits, *none))
  seen = _seen(limits, window)
  k, v = (jnp.where(seen[..., None], x, jnp.nan) for x in (k, v))
  unclean = _run(rule, splits, (q, k, v, limits, *none))
  for got, right in zip(unclean, clean, strict=True):
    np.testing.assert_array_equal(got, right)


@hopper.runs_the_kernel
@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
@pytest.mark.parametrize('window', [None, 50])
def test_what_unseen_scales_hold_does_not_matter(window, bad):
  rule, splits, (*arrays, limits, k_scales, v_scales) = _case(
    time=3, window=window, int8=0.02
  )
  clean = _run(rule, splits, (*arrays, limits, k_scales, v_scales))
  seen = _seen(limits, window)
  scales = (jnp.where(seen, x, bad) for x in (k_scales, v_scales))
  unclean = _run(rule, splits, (*arrays, limits, *scales))
  for got, right in zip(unclean, clean, strict=True):
    np.testing.assert_array_equal(got, right)


def _seen(limits, window):
  """Slots that some query of a row sees, [B, 1, S]."""
  slot = jnp.arange(256)[None]
  seen = slot < limits.kv_length[:, None]
  if window:
    seen &= slot > limits.offset[:, None] - window
  return seen[:, None]


@pytest.mark.parametrize('implementation', [None, 'mosaic_gpu'])
def test_it_lowers_for_cuda_with_the_kernel(implementation):
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
  cache = shape(2, 2, 512, 64)
  length = jax.ShapeDtypeStruct((2,), jnp.int32)
  run = lambda *arrays: api.decode_attention(
    *arrays, implementation=implementation
  )
  lowered = hopper.lower(run, shape(2, 4, 8, 64), cache, cache, length)
  assert 'custom_call @mosaic_gpu' in lowered


@pytest.mark.parametrize('width', [64, 128])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_an_int8_cache_lowers_for_cuda_with_the_kernel(dtype, width):
  shape = jax.ShapeDtypeStruct
  cache = shape((2, 2, 512, width), jnp.int8)
  scales = shape((2, 2, 512), jnp.float32)
  run = lambda q, k, v, length, k_scales, v_scales: api.decode_attention(
    q, k, v, length, k_scales=k_scales, v_scales=v_scales
  )
  q, length = shape((2, 4, 8, width), dtype), shape((2,), jnp.int32)
  lowered = hopper.lower(run, q, cache, cache, length, scales, scales)
  assert 'custom_call @mosaic_gpu' in lowered


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'dtype': jnp.float32}, 'float32 is not a dtype of this kernel'),
    ({'width': 80}, 'heads of width 80 and 80 are not'),
    ({'slots': 100}, '100 slots are not tiles of 64'),
  ],
)
def test_what_it_does_not_take_is_said(change, message):
  rule, splits, arrays = _case(**change)
  with pytest.raises(NotImplementedError, match=message):
    mosaic_gpu.attention(rule, splits, *arrays)
