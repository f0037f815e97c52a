"""Decode attention against its definition in float64, each implementation."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax import sharding
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu
from pallas_kernels.attention import api as flash
from pallas_kernels.decode_attention import api
from pallas_kernels.decode_attention import blockwise
from pallas_kernels.decode_attention import mosaic_tpu

RUNNABLE = ('reference', 'blockwise', 'interpreted') + (
  () if llvm_cpu.missing() else ('llvm_cpu',)
)
INTERPRETED = functools.partial(mosaic_tpu.attention, interpret=True)
#      0
#     / \      A tree of tokens, by the parent of each.
#    1   2
#   / \   \
#  3   4   5
PARENTS = (-1, 0, 0, 1, 1, 2)

CASES = {
  'one query': {},
  'several': {'time': 5},
  'grouped': {'time': 3, 'heads': (6, 2)},
  'a whole cache': {'length': (256, 128), 'time': 2},
  'an empty row': {'length': (0, 77)},
  'shorter than the queries': {'length': (2, 9), 'time': 4},
  'window': {'window': 40, 'time': 4, 'length': (200, 30)},
  'window of one': {'window': 1, 'time': 3},
  'softcap': {'softcap': 2.0, 'scale': 1.7, 'time': 2},
  'tree': {'tree': PARENTS, 'time': 6},
  'two trees': {'tree': (-1, -1, 0, 1, 1, 2), 'time': 6},
  'tree, window': {'tree': PARENTS, 'time': 6, 'window': 2},
  'tree at a border': {'tree': PARENTS, 'time': 6, 'length': (131, 6)},
  'int8': {'int8': True, 'time': 3, 'heads': (4, 2)},
  'int8, window': {'int8': True, 'window': 9, 'length': (256, 0)},
  'int8, tree': {'int8': True, 'time': 6, 'tree': PARENTS, 'softcap': 3.0},
  'two parts': {'splits': 2, 'time': 2, 'length': (250, 90)},
  'two parts, tree': {
    'splits': 2,
    'tree': PARENTS,
    'time': 6,
    'length': (131, 4),
  },
  'wide values': {'widths': (16, 48), 'time': 2},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks even of a small cache; Mosaic keeps its lanes of 128."""
  monkeypatch.setattr(blockwise, 'BLOCK', 16)
  monkeypatch.setattr(mosaic_tpu, 'BLOCKS', (128,))
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'interpreted', INTERPRETED)


def _ancestors(parents=PARENTS):
  bits = np.eye(len(parents), dtype=bool)
  for node, parent in enumerate(parents):
    if parent >= 0:
      bits[node] |= bits[parent]
  return bits


def _case(
  seed=0,
  time=1,
  slots=256,
  heads=(2, 2),
  widths=(16, 16),
  length=(201, 37),
  int8=False,
  tree=None,
  dtype=jnp.float32,
  **options,
):
  """Random arrays, and the options of `api.decode_attention`."""
  rng = np.random.default_rng(seed)
  (h, kh), (d, dv) = heads, widths
  q = rng.standard_normal((2, time, h, d)).astype(dtype)
  shapes = (2, kh, slots, d), (2, kh, slots, dv)
  if int8:
    k, v = (np.int8(rng.integers(-127, 128, shape)) for shape in shapes)
    for name in ('k_scales', 'v_scales'):
      scales = rng.uniform(0.001, 0.03, (2, kh, slots))
      options[name] = np.float32(scales)
  else:
    k, v = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
  if tree:
    options['ancestors'] = _ancestors(tree)
  return (q, k, v, np.asarray(length, np.int32)), options


def _attention(arrays, others, name, options):
  return api.decode_attention(
    *arrays, implementation=name, **others, **dict(options)
  )


# One program of a case; what tests patch is the same for all in this module.
_compile = functools.partial(jax.jit, static_argnames=('name', 'options'))
_program = _compile(_attention)
# A TPU will not run what LLVM makes of its kernel here: no effort on it.
_interpreted_program = _compile(
  _attention, compiler_options={'xla_backend_optimization_level': 0}
)


def _run(name, arrays, options):
  others = {k: x for k, x in options.items() if isinstance(x, np.ndarray)}
  static = tuple(pair for pair in options.items() if pair[0] not in others)
  program = _interpreted_program if name == 'interpreted' else _program
  return program(arrays, others, name, static)


def _sees(b, t, slot, arrays, options):
  """The definition, one pair at a time."""
  time, length = arrays[0].shape[1], int(arrays[3][b])
  start, node = length - time, slot - (length - time)
  if slot >= length:
    return False
  depth = lambda n: n
  if 'ancestors' in options:
    bits = np.broadcast_to(options['ancestors'], (2, time, time))[b]
    depth = lambda n: int(bits[n].sum()) - 1
    if node >= 0 and not bits[t, node]:
      return False
  elif node > t:
    return False
  at = slot if node < 0 else start + depth(node)
  window = options.get('window')
  return window is None or at > start + depth(t) - window


def _exact(arrays, options):
  """Out and log-sum-exp in float64, query by query."""
  q, k, v = (np.asarray(x, np.float64) for x in arrays[:3])
  if 'k_scales' in options:
    k, v = (
      x * np.asarray(options[name], np.float64)[..., None]
      for x, name in ((k, 'k_scales'), (v, 'v_scales'))
    )
  groups = q.shape[2] // k.shape[1]
  out = np.zeros((*q.shape[:3], v.shape[3]))
  lse = np.full((q.shape[0], q.shape[2], q.shape[1]), -np.inf)
  for b, t, h in np.ndindex(q.shape[:3]):
    seen = [s for s in range(k.shape[2]) if _sees(b, t, s, arrays, options)]
    if not seen:
      continue
    scale = options.get('scale') or q.shape[-1] ** -0.5
    scores = k[b, h // groups, seen] @ q[b, t, h] * scale
    if options.get('softcap'):
      scores = options['softcap'] * np.tanh(scores / options['softcap'])
    total = np.exp(scores).sum()
    out[b, t, h] = np.exp(scores) / total @ v[b, h // groups, seen]
    lse[b, h, t] = np.log(total)
  return out, lse


def _error(got, exact):
  got = np.asarray(got, np.float64)
  np.testing.assert_array_equal(np.isinf(got), np.isinf(exact))
  finite = np.isfinite(exact)
  return np.abs(np.where(finite, got - np.where(finite, exact, 0), 0)).max()


@pytest.mark.short
@pytest.mark.parametrize('name', RUNNABLE)
@pytest.mark.parametrize('case', CASES)
def test_output_and_log_sum_exp(name, case):
  arrays, options = _case(**CASES[case])
  if name == 'llvm_cpu' and {'softcap', 'splits'} & options.keys():
    with pytest.raises(NotImplementedError, match='not soft-capped'):
      _run(name, arrays, options)
    return
  out, lse = _run(name, arrays, options)
  assert out.dtype == arrays[0].dtype
  assert lse.dtype == jnp.float32
  exact = _exact(arrays, options)
  assert _error(out, exact[0]) < 2e-6
  assert _error(lse, exact[1]) < 2e-6


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_lose_no_more_than_a_product_of_that_dtype(dtype):
  arrays, options = _case(dtype=dtype, length=(256, 256), time=4)
  exact = _exact(arrays, options)
  q, k, v, _ = arrays

  @functools.partial(
    jax.jit, compiler_options={'xla_allow_excess_precision': False}
  )
  def plain(q, k, v):
    scores = jnp.einsum('bthd,bhsd->bhts', q, k).astype(jnp.float32) * 16**-0.5
    mask = np.arange(256)[None] <= np.arange(252, 256)[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf)).astype(dtype)
    return jnp.einsum('bhts,bhsd->bthd', weights, v)

  same_dtype = plain(q, k, v)
  allowed = 2 * _error(same_dtype, exact[0])
  names = ('blockwise', 'interpreted')[: 2 if dtype == jnp.bfloat16 else 1]
  for name in names:
    out, lse = _run(name, arrays, options)
    assert out.dtype == dtype
    assert _error(out, exact[0]) <= allowed
    assert _error(lse, exact[1]) < 1e-4  # statistics stay float32


@pytest.mark.parametrize('name', RUNNABLE)
@pytest.mark.parametrize('bad', [np.nan, np.inf, 3e38])
def test_what_unseen_slots_hold_does_not_matter(name, bad):
  (q, k, v, length), options = _case(time=3, window=50, length=(201, 0))
  clean = _run(name, (q, k, v, length), options)
  slot = np.arange(256)
  seen = (slot < 201) & (slot > 201 - 3 - 50)
  unseen = ~np.stack([seen, np.zeros(256, bool)])[:, None, :, None]
  k, v = (np.where(unseen, np.float32(bad), x) for x in (k, v))
  for got, right in zip(_run(name, (q, k, v, length), options), clean):
    np.testing.assert_array_equal(got, right)
  assert (np.asarray(clean[0])[1] == 0).all()
  assert np.isneginf(np.asarray(clean[1])[1]).all()


@pytest.mark.parametrize('name', RUNNABLE)
def test_what_unseen_scales_hold_does_not_matter(name):
  arrays, options = _case(int8=True, length=(201, 0))
  clean = _run(name, arrays, options)
  unseen = np.arange(256)[None] >= arrays[3][:, None]
  for scales in ('k_scales', 'v_scales'):
    options[scales] = np.where(
      unseen[:, None], np.float32(np.nan), options[scales]
    )
  for got, right in zip(_run(name, arrays, options), clean):
    np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize('name', RUNNABLE)
def test_a_chain_is_the_tree_whose_tokens_are_each_others_children(name):
  arrays, _ = _case(time=6)
  chain = _run(name, arrays, {})
  tree = _run(name, arrays, {'ancestors': np.tri(6, dtype=bool)})
  for got, right in zip(tree, chain, strict=True):
    np.testing.assert_allclose(got, right, atol=1e-6)


@pytest.mark.parametrize('name', RUNNABLE)
def test_a_branch_of_a_tree_is_a_chain(name):
  """Each path from the root gives what decoding that path alone gives."""
  (q, k, v, length), options = _case(time=6, tree=PARENTS, length=(140, 37))
  out = np.asarray(_run(name, (q, k, v, length), options)[0])
  for leaf in (3, 4, 5):
    path = np.flatnonzero(_ancestors()[leaf])
    start = length - 6
    alone_k, alone_v = k.copy(), v.copy()
    for b in range(2):
      for buffer, old in ((alone_k, k), (alone_v, v)):
        slots = start[b] + np.arange(len(path))
        buffer[b][:, slots] = old[b][:, start[b] + path]
    arrays = q[:, path], alone_k, alone_v, start + len(path)
    alone, _ = _run(name, arrays, {})
    np.testing.assert_allclose(out[:, path], alone, atol=2e-6)


@hypothesis.given(
  time=st.integers(1, 9),
  slots=st.integers(9, 50),
  heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
  length=st.tuples(st.integers(0, 50), st.integers(0, 50)),
  window=st.one_of(st.none(), st.integers(1, 30)),
  softcap=st.sampled_from([None, 3.0]),
  int8=st.booleans(),
  splits=st.integers(1, 3),
  parents=st.one_of(st.none(), st.randoms(use_true_random=False)),
  seed=st.integers(0, 99),
)
def test_any_tree_and_any_size(time, slots, length, parents, **drawn):
  length = tuple(min(n, slots) for n in length)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blockwise, 'BLOCK', 16)
    arrays, options = _case(time=time, slots=slots, length=length, **drawn)
    if parents is not None:
      chosen = [parents.randint(-1, node - 1) for node in range(time)]
      options['ancestors'] = _ancestors(chosen)
    out, lse = _run('blockwise', arrays, options)
    exact = _exact(arrays, options)
    assert _error(out, exact[0]) < 4e-6
    assert _error(lse, exact[1]) < 4e-6


def test_vmap_jit_and_shards_give_the_same():
  arrays, options = _case(time=3, heads=(4, 2))
  right = api.decode_attention(*arrays, **options)
  each = jax.vmap(
    lambda *a: jax.tree.map(
      lambda x: x[0], api.decode_attention(*(x[None] for x in a))
    )
  )
  for got, whole in zip(jax.jit(each)(*arrays), right, strict=True):
    np.testing.assert_allclose(got, whole, atol=2e-6)
  eight = [np.concatenate([x] * 4) for x in arrays]
  mesh = sharding.Mesh(np.asarray(jax.devices()[:8]), ('data',))
  spec = sharding.PartitionSpec('data')
  sharded = jax.jit(
    jax.shard_map(
      api.decode_attention,
      mesh=mesh,
      in_specs=(spec,) * 4,
      out_specs=spec,
      check_vma=False,
    )
  )(*eight)
  for got, whole in zip(sharded, right, strict=True):
    np.testing.assert_allclose(got, np.concatenate([whole] * 4), atol=2e-6)


def test_results_over_parts_of_a_cache_merge():
  (q, k, v, length), _ = _case(time=1, length=(256, 200))

  @jax.jit
  def halves_and_whole(q, k, v, length):
    # One query sees every used slot, so parts need no shifted positions.
    halves = [
      api.decode_attention(q, k[:, :, :128], v[:, :, :128], length * 0 + 128),
      api.decode_attention(q, k[:, :, 128:], v[:, :, 128:], length - 128),
    ]
    return flash.merge(halves), api.decode_attention(q, k, v, length)

  for got, right in zip(*halves_and_whole(q, k, v, length), strict=True):
    np.testing.assert_allclose(got, right, atol=2e-6)


def test_the_tpu_kernel_has_no_races():
  arrays, options = _case(time=6, tree=PARENTS, int8=True, length=(200, 30))
  params = pltpu.InterpretParams(detect_races=True)
  interpreted = functools.partial(mosaic_tpu.attention, interpret=params)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(api.IMPLEMENTATIONS, 'blockwise', interpreted)
    got = api.decode_attention(*arrays, implementation='blockwise', **options)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert interpret_pallas_call.races is not None
  assert not interpret_pallas_call.races.races_found
  for mine, whole in zip(got, _exact(arrays, options), strict=True):
    assert _error(mine, whole) < 2e-6


def test_it_lowers_for_tpu_with_the_kernel_and_for_cuda_without():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
  arrays = shape(2, 4, 8, 64), shape(2, 2, 512, 64), shape(2, 2, 512, 64)
  length = jax.ShapeDtypeStruct((2,), jnp.int32)
  traced = jax.jit(api.decode_attention).trace(*arrays, length)
  lower = lambda platform: traced.lower(lowering_platforms=(platform,))
  assert 'tpu_custom_call' in lower('tpu').as_text()
  assert 'tpu_custom_call' not in lower('cuda').as_text()


def test_a_kernel_that_does_not_take_its_arguments_says_why():
  arrays, _ = _case(slots=200, length=(9, 8))
  with pytest.raises(NotImplementedError, match='not 1 parts of whole blocks'):
    api.decode_attention(*arrays, implementation='mosaic_tpu')
  arrays, _ = _case(dtype=jnp.float16)
  with pytest.raises(NotImplementedError, match='float16 is not a dtype'):
    api.decode_attention(*arrays, implementation='mosaic_tpu')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'window': 0}, 'window must be >= 1'),
    ({'splits': 0}, 'splits must be >= 1'),
    ({'softcap': -1.0}, 'softcap must be > 0'),
    ({'heads': (3, 2)}, '3 query heads cannot share 2 key heads'),
    ({'length': (3,)}, r'length must be \[B\] = \[2\]'),
    ({'ancestors': np.ones((3, 3), bool)}, 'with T = 1, got'),
    ({'ancestors': np.ones((1, 1), np.float32)}, 'must be bool, got float32'),
    (
      {'k_scales': np.ones((2, 2, 256), np.float32)},
      'or neither does, got float32',
    ),
    (
      {'int8': True, 'heads': (2, 1), 'slots': 16, 'v_scales': 0},
      r'scales must be \(2, 1, 16\), got \(\)',
    ),
  ],
)
def test_what_does_not_fit_is_refused(change, message):
  scales = change.pop('v_scales', None)
  arrays, options = _case(**change)
  if scales is not None:
    options['v_scales'] = np.float32(scales)
  with pytest.raises(ValueError, match=message):
    api.decode_attention(*arrays, **options)


def test_shapes_that_do_not_fit_are_refused():
  (q, k, v, length), _ = _case()
  for wrong, message in (
    ((q[0], k, v), 'must be'),
    ((q[:1], k, v), 'agree in B'),
    ((q, k, v[:, :, :5]), 'k and v in K and S'),
    ((q[..., :4], k, v), 'width 4'),
  ):
    with pytest.raises(ValueError, match=message):
      api.decode_attention(*wrong, length)
