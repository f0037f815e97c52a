"""Attention against its definition in float64, for every implementation."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import sharding
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import api
from pallas_kernels.attention import blockwise
from pallas_kernels.attention import mosaic_tpu
from pallas_kernels.attention import mosaic_tpu_backward
from tests.pallas_kernels import attention_cases as cases

INTERPRETED = blockwise.differentiable(
  functools.partial(mosaic_tpu.forward, interpret=True),
  functools.partial(mosaic_tpu_backward.backward, interpret=True),
)
RUNNABLE = ('reference', 'blockwise', 'interpreted')

# Sizes and options that make a case; sizes are no multiples of any tile.
CASES = {
  'plain': {},
  'causal': {'causal': True},
  'grouped': {'heads': (6, 2), 'causal': True},
  'shared by all': {'heads': (4, 1)},
  'one query': {'sizes': (1, 45), 'causal': True, 'offset': 44},
  'more keys': {'sizes': (21, 50), 'causal': True, 'offset': 29},
  'more queries': {'sizes': (50, 21), 'causal': True},
  'negative offset': {'sizes': (30, 30), 'causal': True, 'offset': -7},
  'offset a row': {'causal': True, 'offset': (3, -5)},
  'window': {'causal': True, 'window': 7},
  'window of one': {'causal': True, 'window': 1},
  'window both ways': {'window': 5},
  'lengths': {'kv_length': (29, 0)},
  'lengths and causal': {'kv_length': (11, 40), 'causal': True},
  'segments': {'segments': 3},
  'segments, causal': {'segments': 2, 'causal': True, 'window': 9},
  'softcap': {'softcap': 2.0, 'causal': True, 'scale': 1.7},
  'long': {'sizes': (140, 290), 'causal': True, 'offset': 150, 'window': 200},
  'wide heads': {'widths': (72, 40), 'causal': True},
  'tiles': {'tiles': ((0, 2), (1,), ()), 'sizes': (40, 41), 'causal': False},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """Several tiles even of small arrays; Mosaic keeps its lanes of 128."""
  monkeypatch.setattr(blockwise, 'TILE', cases.TILE)
  monkeypatch.setattr(blockwise, 'BACKWARD_TILE', cases.TILE)
  monkeypatch.setattr(mosaic_tpu, 'TILE', (128, 128))
  monkeypatch.setattr(mosaic_tpu_backward, 'TILE', (128, 128))
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'interpreted', INTERPRETED)


@functools.cache
def _case(case):
  """Inputs, options, cotangents and the five exact results of a case."""
  arrays, options = cases.make(**CASES[case])
  cotangents = cases.cotangents(arrays)
  exact = cases.exact(arrays, options, *cotangents)
  return arrays, options, cotangents, exact


@pytest.mark.parametrize('case', CASES)
def test_the_reference_is_the_definition(case):
  arrays, options, _, exact = _case(case)
  out, lse = cases.outputs('reference', arrays, options)
  assert out.dtype == arrays[0].dtype
  assert lse.dtype == jnp.float32
  assert cases.error(out, exact[0]) < 2e-6
  assert cases.error(lse, exact[1]) < 2e-6


@pytest.mark.parametrize('name', ['blockwise', 'interpreted'])
@pytest.mark.parametrize('case', CASES)
def test_both_outputs_and_the_gradients_of_both(name, case):
  arrays, options, cotangents, exact = _case(case)
  if name == 'interpreted' and 'tiles' in options:
    pytest.skip('tiles of 16 x 16 are not for a TPU; see mosaic_tpu_test')
  out, lse, *got = cases.outputs_and_gradients(
    name, arrays, options, cotangents
  )
  assert out.dtype == arrays[0].dtype
  assert lse.dtype == jnp.float32
  assert cases.error(out, exact[0]) < 2e-6
  assert cases.error(lse, exact[1]) < 2e-6
  for mine, right, like in zip(got, exact[2:], arrays, strict=True):
    assert mine.dtype == like.dtype
    assert cases.error(mine, right) < 2e-5


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_lose_no_more_than_a_product_of_that_dtype(dtype):
  arrays, options = cases.make(causal=True, sizes=(90, 90), dtype=dtype)
  exact = cases.exact(arrays, options)
  q, k, v = arrays
  # The products are two programs: within one, XLA may keep more digits.
  scores = np.asarray(jnp.einsum('bihd,bjhd->bhij', q, k), np.float32) * 8**-0.5
  seen = cases.mask(90, 90, options)[:, None]
  weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
  weights = (weights / weights.sum(-1, keepdims=True)).astype(dtype)
  same_dtype = jnp.einsum('bhij,bjhd->bihd', weights, v)
  allowed = 2 * cases.error(same_dtype, exact[0])
  names = (
    ('blockwise', 'interpreted') if dtype == jnp.bfloat16 else ('blockwise',)
  )
  for name in names:
    out, lse = cases.outputs(name, arrays, options)
    assert out.dtype == dtype
    assert cases.error(out, exact[0]) <= allowed
    assert cases.error(lse, exact[1]) < 1e-4  # statistics stay float32


@pytest.mark.parametrize('name', ['blockwise', 'interpreted'])
def test_a_query_that_sees_nothing_is_zero_and_so_are_its_gradients(name):
  arrays, options = cases.make(kv_length=(0, 41), causal=True, offset=-3)
  out, lse, dq, dk, dv = cases.outputs_and_gradients(
    *(name, arrays, options),
    (np.ones((2, 37, 2, 8)), np.ones((2, 2, 37))),
  )
  empty = ~cases.mask(37, 41, options).any(-1)
  assert empty[0].all()
  assert empty[1].sum() == 3
  assert (np.asarray(out)[empty] == 0).all()
  assert np.isneginf(np.asarray(lse).transpose(0, 2, 1)[empty]).all()
  assert (np.asarray(dq)[empty] == 0).all()
  assert (np.asarray(dk)[0] == 0).all()
  assert (np.asarray(dv)[0] == 0).all()
  assert all(np.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.parametrize('name', RUNNABLE)
@pytest.mark.parametrize('bad', [np.nan, np.inf, 3e38])
def test_what_hidden_keys_hold_does_not_matter(name, bad):
  (q, k, v), options = cases.make(kv_length=(11, 41), causal=True, offset=-2)
  hidden = ~cases.mask(37, 41, options).any(1)
  spoilt = (
    np.where(hidden[..., None, None], x.dtype.type(bad), x) for x in (k, v)
  )
  if name == 'reference':
    run = lambda *arrays: cases.outputs(name, arrays, options)
  else:
    ones = np.ones((2, 37, 2, 8)), np.zeros((2, 2, 37))
    run = lambda *arrays: cases.outputs_and_gradients(
      name, arrays, options, ones
    )
  clean, got = run(q, k, v), run(q, *spoilt)
  for mine, right in zip(got[:2], clean[:2], strict=True):
    np.testing.assert_array_equal(mine, right)
  grads = got[2:]
  assert all(np.isfinite(x).all() for x in grads)
  for grad in grads[1:]:
    assert (np.asarray(grad)[hidden] == 0).all()


def test_hidden_tiles_are_not_computed():
  """A tile whose scores would overflow to NaN leaves no trace if it is not
  kept: it is never multiplied."""
  (q, k, v), options = cases.make(tiles=((0,), (1,), (2,)), sizes=(40, 41))
  run = lambda *arrays: np.asarray(
    cases.outputs('blockwise', arrays, options)[0]
  )
  got = run(q, k, v)
  k[:, :16] = np.nan
  other = run(q, k, v)
  np.testing.assert_array_equal(got[:, 16:], other[:, 16:])
  assert np.isnan(other[:, :16]).all()


def test_results_over_parts_of_the_keys_merge():
  (q, k, v), _ = cases.make(sizes=(23, 60))

  @jax.jit
  def parts_and_whole(q, k, v):
    parts = [
      api.attention(q, k[:, low:high], v[:, low:high])
      for low, high in ((0, 13), (13, 45), (45, 60))
    ]
    nothing = api.attention(q, k, v, kv_length=jnp.zeros(2, jnp.int32))
    return (
      api.merge([*parts, nothing]),
      api.attention(q, k, v),
      api.merge([nothing, nothing]),
    )

  merged, whole, (out, lse) = parts_and_whole(q, k, v)
  for got, right in zip(merged, whole, strict=True):
    np.testing.assert_allclose(got, right, atol=2e-6)
  assert (np.asarray(out) == 0).all()
  assert np.isneginf(lse).all()


@hypothesis.given(
  sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
  heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
  causal=st.booleans(),
  offset=st.integers(-10, 30),
  window=st.one_of(st.none(), st.integers(1, 30)),
  kv_length=st.tuples(st.integers(0, 40), st.integers(0, 40)),
  segments=st.sampled_from([None, 1, 3]),
  softcap=st.sampled_from([None, 3.0]),
  seed=st.integers(0, 99),
)
def test_any_mask_and_any_size(kv_length, **drawn):
  sizes = drawn['sizes']
  kv_length = tuple(min(n, sizes[1]) for n in kv_length)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blockwise, 'TILE', cases.TILE)
    arrays, options = cases.make(kv_length=kv_length, **drawn)
    out, lse = cases.outputs('blockwise', arrays, options)
    exact = cases.exact(arrays, options)
    assert cases.error(out, exact[0]) < 4e-6
    assert cases.error(lse, exact[1]) < 4e-6


def test_vmap_jit_and_shards_give_the_same():
  arrays, options = cases.make(causal=True, kv_length=(30, 41))
  right = api.attention(*arrays, **options)
  run = lambda q, k, v, n: api.attention(
    q, k, v, causal=True, kv_length=n, implementation='blockwise'
  )
  each = jax.vmap(
    lambda *a: jax.tree.map(lambda x: x[0], run(*(x[None] for x in a)))
  )
  several = jax.jit(each)(*arrays, options['kv_length'])
  for got, whole in zip(several, right, strict=True):
    np.testing.assert_allclose(got, whole, atol=2e-6)
  eight = [np.concatenate([x] * 4) for x in (*arrays, options['kv_length'])]
  mesh = sharding.Mesh(np.asarray(jax.devices()[:8]), ('data',))
  spec = sharding.PartitionSpec('data')
  sharded = jax.jit(
    jax.shard_map(
      run, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False
    )
  )(*eight)
  for got, whole in zip(sharded, right, strict=True):
    np.testing.assert_allclose(got, np.concatenate([whole] * 4), atol=2e-6)


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
  monkeypatch.setattr(blockwise, 'TILE', (128, 128))
  monkeypatch.setattr(blockwise, 'BACKWARD_TILE', (128, 128))

  def temporary(size):
    shape = jax.ShapeDtypeStruct((1, size, 2, 16), jnp.float32)
    loss = lambda q, k, v: api.attention(q, k, v, causal=True)[0].sum()
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape)
    return program.compile().memory_analysis().temp_size_in_bytes

  assert temporary(4096) < 2.2 * temporary(2048)


def test_it_lowers_for_tpu_with_its_kernel_and_for_cuda_without_it():
  shape = jax.ShapeDtypeStruct((1, 300, 4, 64), jnp.bfloat16)
  run = jax.jit(functools.partial(api.attention, causal=True))
  lower = lambda *platforms: (
    run.trace(shape, shape, shape).lower(lowering_platforms=platforms).as_text()
  )
  assert 'tpu_custom_call' in lower('tpu')
  assert 'tpu_custom_call' not in lower('cuda')


def test_a_kernel_for_another_platform_says_so():
  arrays, _ = cases.make()
  with pytest.raises(Exception, match='mosaic_tpu is a kernel for tpu'):
    jax.jit(lambda *a: api.attention(*a, implementation='mosaic_tpu'))(*arrays)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'window': 0}, 'window must be >= 1'),
    ({'softcap': -1.0}, 'softcap must be > 0'),
    ({'implementation': 'cuda'}, "no implementation 'cuda'; there are ref"),
    ({'heads': (3, 2)}, '3 query heads cannot share 2 key heads'),
    ({'q_segments': np.zeros((2, 37), np.int32)}, 'come together'),
    ({'tiles': ((0,), (1,))}, 'are 3 x 3, got 2 rows'),
    ({'tiles': ((0,), (3,), ())}, 'are 3 x 3, got 3 rows and column 3'),
  ],
)
def test_what_does_not_fit_is_refused(change, message):
  arrays, options = cases.make(**change)
  with pytest.raises(ValueError, match=message):
    api.attention(*arrays, **options)


def test_shapes_that_do_not_fit_are_refused():
  (q, k, v), _ = cases.make()
  for wrong, message in (
    ((q[0], k, v), 'must be'),
    ((q[:1], k, v), 'agree in B'),
    ((q, k, v[:, :5]), 'k and v in Sk'),
    ((q[..., :4], k, v), 'width 4'),
  ):
    with pytest.raises(ValueError, match=message):
      api.attention(*wrong)
