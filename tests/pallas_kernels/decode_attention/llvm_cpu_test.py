"""The CPU's kernel of decode attention: any size it takes, and its bits."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu as cpu
from pallas_kernels.decode_attention import api

pytestmark = [
  pytest.mark.short,
  pytest.mark.skipif(bool(cpu.missing()), reason=str(cpu.missing())),
]


def _cache(seed, time, slots=192, heads=(6, 2), width=32, int8=False, batch=2):
  rng = np.random.default_rng(seed)
  q = jnp.asarray(rng.normal(size=(batch, time, heads[0], width)), jnp.float32)
  shape = (batch, heads[1], slots, width)
  if not int8:
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    return (q, k, v), {}
  k, v = (jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for _ in 'kv')
  scales = {
    name: jnp.asarray(rng.uniform(0.001, 0.02, shape[:3]), jnp.float32)
    for name in ('k_scales', 'v_scales')
  }
  return (q, k, v), scales


# Nobody but itself sees the fourth of five tokens.
_NO_FOURTH = (np.arange(5) != 3) | np.eye(5, dtype=bool)


def _run(name, arrays, length, **options):
  call = lambda *a: api.decode_attention(*a, implementation=name, **options)
  return jax.jit(call)(*arrays, jnp.asarray(length, jnp.int32))


@hypothesis.settings(max_examples=12, deadline=None)
@hypothesis.given(
  time=st.integers(1, 9),
  vectors=st.integers(1, 9),
  heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
  width=st.sampled_from([16, 48, 256]),
  length=st.tuples(st.integers(0, 144), st.integers(0, 144)),
  window=st.one_of(st.none(), st.integers(1, 90)),
  int8=st.booleans(),
  parents=st.one_of(st.none(), st.randoms(use_true_random=False)),
)
def test_any_size_that_fills_vectors(time, vectors, length, parents, **drawn):
  window = drawn.pop('window')
  slots = 16 * vectors
  length = [min(n, slots) for n in length]
  arrays, options = _cache(0, time, slots, **drawn)
  if parents is not None:
    bits = np.eye(time, dtype=bool)
    for node in range(1, time):
      bits[node] |= bits[parents.randint(0, node - 1)]
    options['ancestors'] = jnp.asarray(bits)
  options['window'] = window
  found = _run('llvm_cpu', arrays, length, **options)
  expected = _run('reference', arrays, length, **options)
  for got, right in zip(found, expected, strict=True):
    np.testing.assert_allclose(got, right, atol=5e-6, rtol=2e-6)


@pytest.mark.parametrize('int8', [False, True])
@pytest.mark.parametrize('window', [None, 70])
def test_the_bits_of_a_query_do_not_depend_on_the_others(int8, window):
  """Sixteen at once, in fours, or one by one; a block ends among them."""
  (q, k, v), scales = _cache(1, 16, int8=int8)
  last = np.asarray([136, 73])
  together = _run('llvm_cpu', (q, k, v), last, window=window, **scales)
  for width in (1, 4):
    for first in range(0, 16, width):
      part = slice(first, first + width)
      length = last - 16 + first + width
      alone = _run(
        'llvm_cpu', (q[:, part], k, v), length, window=window, **scales
      )
      np.testing.assert_array_equal(alone[0], together[0][:, part])
      np.testing.assert_array_equal(alone[1], together[1][:, :, part])


@pytest.mark.parametrize('int8', [False, True])
@pytest.mark.parametrize('tree', [False, True])
def test_heads_of_the_same_keys_may_be_one_part(monkeypatch, int8, tree):
  """Which a large batch chooses, and which changes no bit."""
  arrays, options = _cache(6, 5, int8=int8, batch=4)
  if tree:
    options['ancestors'] = jnp.asarray(np.tri(5, dtype=bool) & _NO_FOURTH)
  call, chosen, found = cpu.call, [], []

  def watched(*args, parts, **others):
    chosen.append(parts)
    return call(*args, parts=parts, **others)

  monkeypatch.setattr(cpu, 'call', watched)
  for parts in (100, 1):
    monkeypatch.setattr(cpu, 'parts', lambda n=parts: n)
    jax.clear_caches()  # of what was traced for other parts
    found.append(_run('llvm_cpu', arrays, [136, 73, 5, 64], **options))
  assert all(map(np.array_equal, *found))
  assert chosen == [24, 8]
  expected = _run('reference', arrays, [136, 73, 5, 64], **options)
  np.testing.assert_allclose(found[1][0], expected[0], atol=5e-6, rtol=2e-6)


def test_the_bits_of_a_branch_are_those_of_a_chain():
  """Of a path that stands first in its tree, where nothing has to be moved."""
  (q, k, v), _ = _cache(2, 6)
  ancestors = np.tri(6, dtype=bool)
  ancestors[4:] = np.eye(6, dtype=bool)[4:]
  ancestors[4:, 0] = True  # the others are children of the root
  tree = _run('llvm_cpu', (q, k, v), [137, 70], ancestors=ancestors)
  chain = _run('llvm_cpu', (q[:, :4], k, v), [135, 68])
  np.testing.assert_array_equal(tree[0][:, :4], chain[0])


def test_a_query_that_is_no_number_gives_none():
  (q, k, v), _ = _cache(3, 2)
  q = q.at[0, 1, 2, 3].set(jnp.nan)
  out, lse = _run('llvm_cpu', (q, k, v), [30, 40])
  expected = np.zeros(out.shape[:3], bool)
  expected[0, 1, 2] = True
  np.testing.assert_array_equal(np.isnan(out).all(-1), expected)
  np.testing.assert_array_equal(np.isnan(out).any(-1), expected)
  np.testing.assert_array_equal(np.isnan(lse), expected.transpose(0, 2, 1))


def test_scores_far_apart_do_not_overflow():
  (q, k, v), _ = _cache(4, 3)
  found = _run('llvm_cpu', (300 * q, k, v), [90, 60], scale=1.0)
  expected = _run('reference', (300 * q, k, v), [90, 60], scale=1.0)
  for got, right in zip(found, expected, strict=True):
    np.testing.assert_allclose(got, right, rtol=2e-5, atol=2e-5)


def test_the_platform_chooses():
  """On a CPU the kernel takes what fills vectors; elsewhere it is unknown."""
  arrays, _ = _cache(5, 1)
  length = jnp.asarray([3, 4], jnp.int32)
  traced = jax.jit(api.decode_attention).trace(*arrays, length)
  lower = lambda platform: traced.lower(
    lowering_platforms=(platform,)
  ).as_text()
  assert 'llvm_cpu_' in lower('cpu')
  assert 'llvm_cpu_' not in lower('tpu')


@pytest.mark.parametrize(
  ('change', 'options', 'message'),
  [
    ({'width': 20}, {}, 'do not fill vectors'),
    ({'slots': 100}, {}, 'do not fill vectors'),
    ({'batch': 0}, {}, '0 times 1 queries'),
    ({}, {'softcap': 3.0}, 'not soft-capped'),
    ({}, {'splits': 2}, 'nor parts merged'),
  ],
)
def test_what_it_does_not_take_is_said(change, options, message):
  arrays, _ = _cache(0, 1, **change)
  with pytest.raises(NotImplementedError, match=message):
    _run('llvm_cpu', arrays, [3, 4][: len(arrays[0])], **options)


@pytest.mark.parametrize('which', [(0, 1, 2), (0,), (1,), (2,)])
def test_other_dtypes_are_not_taken(which):
  arrays = list(_cache(0, 1)[0])
  for i in which:
    arrays[i] = arrays[i].astype(jnp.bfloat16)
  with pytest.raises(NotImplementedError, match='bfloat16.* not float32'):
    _run('llvm_cpu', arrays, [3, 4])


def test_lengths_and_scales_may_be_narrow():
  arrays, scales = _cache(6, 3, int8=True)
  ancestors = np.tri(3, dtype=bool)
  options = {'ancestors': ancestors, **scales}
  right = _run('llvm_cpu', arrays, [130, 60], **options)
  options |= {k: s.astype(jnp.float16) for k, s in scales.items()}
  call = lambda *a: api.decode_attention(
    *a, implementation='llvm_cpu', **options
  )
  got = jax.jit(call)(*arrays, jnp.asarray([130, 60], jnp.int16))
  np.testing.assert_allclose(got[0], right[0], rtol=0.01, atol=0.01)
