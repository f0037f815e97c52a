"""The CPU's kernel of flash attention: any mask it takes, and no other."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu as cpu
from pallas_kernels.attention import api
from tests.pallas_kernels import attention_cases as cases

pytestmark = [
  pytest.mark.short,
  pytest.mark.skipif(bool(cpu.missing()), reason=str(cpu.missing())),
]

# Tiles are of 64 keys. Parts are of 192 queries, six at a time; backward they
# depend on the number of cores.
CASES = {
  'plain': {'sizes': (7, 5), 'widths': (16, 16)},
  'causal': {'sizes': (200, 200), 'causal': True},
  'grouped': {'sizes': (100, 130), 'heads': (6, 2), 'widths': (64, 64)},
  'shared by all': {'sizes': (97, 65), 'heads': (4, 1)},
  'offset a row': {'sizes': (70, 90), 'causal': True, 'offset': (20, -5)},
  'window': {'sizes': (150, 150), 'causal': True, 'window': 70},
  'window both ways': {'sizes': (99, 99), 'window': 5},
  'lengths': {'sizes': (20, 140), 'kv_length': (70, 0)},
  'more queries': {'sizes': (193, 21), 'causal': True},
  'wide heads': {'sizes': (12, 66), 'widths': (80, 144), 'scale': 0.3},
  'widest heads': {'sizes': (7, 70), 'widths': (512, 512)},
  'segments': {'sizes': (70, 190), 'segments': 3},
  'packed': {
    'sizes': (200, 200),
    'segments': 9,
    'packed': True,
    'causal': True,
  },
  'negative scale': {'sizes': (30, 70), 'widths': (16, 16), 'scale': -0.3},
}
_run = functools.partial(api.attention, implementation='llvm_cpu')
_both = functools.partial(cases.outputs_and_gradients, 'llvm_cpu')


@pytest.mark.parametrize('case', CASES)
def test_both_outputs_and_the_gradients_of_both(case):
  arrays, options = cases.make(**{'widths': (32, 48), **CASES[case]})
  cotangents = cases.cotangents(arrays)
  out, lse, *got = _both(arrays, options, cotangents)
  exact = cases.exact(arrays, options, *cotangents)
  assert cases.error(out, exact[0]) < 3e-6
  assert cases.error(lse, exact[1]) < 3e-6
  for mine, right in zip(got, exact[2:], strict=True):
    assert cases.error(mine, right) < 3e-5


@pytest.mark.parametrize('parts', [1, 128])
def test_any_number_of_cores_adds_up_the_same_gradients(monkeypatch, parts):
  monkeypatch.setattr(cpu, 'parts', lambda: parts)
  arrays, options = cases.make(
    sizes=(600, 130), heads=(6, 3), widths=(32, 16), causal=True, offset=-20
  )
  d_out, d_lse = cases.cotangents(arrays, seed=5)
  # A program keeps the number of parts that it was traced with.
  jax.clear_caches()
  _, lse, *got = _both(arrays, options, (d_out, d_lse))
  # Of queries that see nothing the definition has no log-sum-exp.
  d_lse = np.where(np.isinf(lse), 0, d_lse)
  exact = cases.exact(arrays, options, d_out, d_lse)
  for mine, right in zip(got, exact[2:], strict=True):
    assert cases.error(mine, right) < 3e-5


def test_scores_far_below_zero_leave_gradients_finite():
  """2^-lse is infinite: what fills up a block must not be multiplied by it."""
  (q, k, v), options = cases.make(sizes=(7, 70), widths=(16, 16))
  q, k = np.float32(5 + 0.1 * q), np.float32(-5 + 0.1 * k)
  out, lse, *got = _both((q, k, v), options)
  assert lse.max() < -90
  exact = cases.exact(
    (q, k, v), options, np.ones(out.shape), np.ones(lse.shape)
  )
  for mine, right in zip(got, exact[2:], strict=True):
    assert cases.error(mine, right) < 3e-4


@pytest.mark.parametrize(('parts', 'packed'), [(4, True), (128, False)])
def test_memory_of_gradients_grows_with_the_length(monkeypatch, parts, packed):
  monkeypatch.setattr(cpu, 'parts', lambda: parts)
  sizes = []
  for length in (2048, 4096):
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    of = jax.ShapeDtypeStruct((1, length), jnp.int32) if packed else None

    def loss(q, k, v, of):
      out, _ = _run(q, k, v, causal=True, q_segments=of, kv_segments=of)
      return out.sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
    program = gradients.lower(x, x, x, of).compile()
    sizes.append(program.memory_analysis().temp_size_in_bytes)
  assert sizes[1] < 2.2 * sizes[0]


def test_gradients_are_the_same_in_every_call():
  arrays, options = cases.make(
    sizes=(300, 200), heads=(6, 3), widths=(32, 16), causal=True
  )
  gradients = jax.jit(jax.grad(lambda a: _run(*a, **options)[0].sum()))
  first = gradients(arrays)
  for _ in range(10):
    jax.tree.map(np.testing.assert_array_equal, gradients(arrays), first)


@hypothesis.settings(deadline=None)
@hypothesis.given(
  sizes=st.sampled_from([(1, 70), (97, 140)]),
  heads=st.just((6, 2)),
  causal=st.booleans(),
  offset=st.integers(-10, 50),
  window=st.one_of(st.none(), st.integers(1, 80)),
  kv_length=st.tuples(st.integers(0, 140), st.integers(0, 140)),
  segments=st.sampled_from([None, 2, 5]),
  packed=st.booleans(),
  seed=st.integers(0, 99),
)
def test_any_mask_and_any_size(kv_length, **drawn):
  kv_length = tuple(min(n, drawn['sizes'][1]) for n in kv_length)
  arrays, options = cases.make(kv_length=kv_length, widths=(16, 32), **drawn)
  d_out, d_lse = cases.cotangents(arrays, drawn['seed'])
  seen = cases.mask(*drawn['sizes'], options).any(-1)[:, None]
  cotangents = d_out, np.where(seen, d_lse, 0)
  mine = _both(arrays, options, cotangents)
  exact = cases.exact(arrays, options, *cotangents)
  bounds = [4e-6] * 2 + [3e-5] * 3
  for got, right, bound in zip(mine, exact, bounds, strict=True):
    assert cases.error(got, right) < bound


@pytest.mark.parametrize('segments', [None, 4])
@pytest.mark.parametrize('bad', [np.nan, np.inf, 3e38])
def test_what_hidden_keys_hold_does_not_matter(bad, segments):
  (q, k, v), options = cases.make(
    *(0, (110, 130)),
    widths=(16, 16),
    kv_length=(11, 130),
    causal=True,
    offset=-2,
    window=9,
    segments=segments,
  )
  clean = _both((q, k, v), options)
  hidden = ~cases.mask(110, 130, options).any(1)
  k, v = (np.where(hidden[..., None, None], np.float32(bad), x) for x in (k, v))
  for got, right in zip(_both((q, k, v), options), clean, strict=True):
    np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_stands_behind_packed_texts_does_not_matter(bad):
  """Each key is seen by the query at its place, or lies beyond the length."""
  (q, k, v), options = cases.make(
    *(0, (130, 130)),
    widths=(16, 16),
    kv_length=(100, 130),
    causal=True,
    segments=5,
    packed=True,
  )
  options['kv_segments'] = options['q_segments']
  clean = _both((q, k, v), options)
  exact = cases.exact((q, k, v), options, *map(np.ones_like, clean[:2]))
  # Queries of texts that are all hidden see nothing.
  for got, right in zip(clean[:2], exact[:2], strict=True):
    assert cases.error(got, right) < 3e-6
  hidden = ~cases.mask(130, 130, options).any(1)
  assert hidden.sum() == 30
  k, v = (np.where(hidden[..., None, None], np.float32(bad), x) for x in (k, v))
  for got, right in zip(_both((q, k, v), options), clean, strict=True):
    np.testing.assert_array_equal(got, right)


def test_a_query_that_sees_nothing_is_zero():
  arrays, options = cases.make(
    *(0, (20, 41)), widths=(16, 16), kv_length=(0, 41), causal=True, offset=-3
  )
  out, lse = cases.outputs('llvm_cpu', arrays, options)
  empty = ~cases.mask(20, 41, options).any(-1)
  assert empty[0].all()
  assert empty[1].sum() == 3
  assert (np.asarray(out)[empty] == 0).all()
  assert np.isneginf(np.asarray(lse).transpose(0, 2, 1)[empty]).all()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'widths': (20, 16)}, 'no multiples of'),
    ({'dtype': jnp.bfloat16}, 'not float32'),
    ({'softcap': 2.0}, 'not soft-capped'),
    ({'tiles': ((0,), (1,), (2,))}, 'nor tiles listed'),
  ],
)
def test_what_the_kernel_does_not_take(change, message):
  arrays, options = cases.make(**{'widths': (16, 16), **change})
  with pytest.raises(NotImplementedError, match=message):
    _run(*arrays, **options)


@pytest.mark.parametrize('devices', [1, 8])
def test_the_platform_chooses_where_nothing_is_divided(monkeypatch, devices):
  monkeypatch.setattr(jax, 'device_count', lambda: devices)
  arrays, options = cases.make(widths=(16, 16), causal=True)
  program = jax.jit(lambda *a: api.attention(*a, **options)[0])
  lowered = program.lower(*arrays).as_text()
  assert ('llvm_cpu' in lowered) == (devices == 1)
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
  assert 'llvm_cpu' not in program.lower(*narrow).as_text()
  # Other platforms keep their kernels.
  arrays, _ = cases.make(sizes=(128, 128), widths=(128, 128))
  for_tpu = program.trace(*arrays).lower(lowering_platforms=('tpu',))
  assert 'tpu_custom_call' in for_tpu.as_text()
