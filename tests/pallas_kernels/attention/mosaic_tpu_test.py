"""The TPU kernels of attention: tiles, segments, gradients, what is fetched."""

import functools

import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.attention import api
from pallas_kernels.attention import blockwise
from pallas_kernels.attention import mosaic_tpu
from pallas_kernels.attention import mosaic_tpu_backward
from pallas_kernels.attention import mosaic_tpu_tiles
from tests.pallas_kernels import attention_cases as cases

TILE = (16, 128)
KEPT = ((0, 2), (1,), ())
CASES = {
  'tiles': {'tiles': KEPT},
  'tiles, causal, grouped': {
    'tiles': ((0, 1, 2), (0, 2), (2,)),
    'causal': True,
    'offset': (120, 270),
    'heads': (4, 2),
  },
  'tiles, window, lengths, softcap': {
    'tiles': ((0, 1), (0, 1, 2), (1, 2)),
    'window': 90,
    'offset': 130,
    'kv_length': (300, 150),
    'softcap': 2.0,
  },
  'tiles, segments': {'tiles': ((1,), (0, 1, 2), (0,)), 'segments': 2},
  'tiles of a column that none keeps': {'tiles': ((0,), (0,), (0, 2))},
}


def _make(case):
  options = {'sizes': (40, 300), 'tile': TILE, **case}
  return cases.make(**options)


def _attention(interpret):
  return blockwise.differentiable(
    functools.partial(mosaic_tpu.forward, interpret=interpret),
    functools.partial(mosaic_tpu_backward.backward, interpret=interpret),
  )


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'interpreted', _attention(True))
  monkeypatch.setattr(mosaic_tpu, 'TILE', (128, 128))
  monkeypatch.setattr(mosaic_tpu_backward, 'TILE', (128, 128))


@pytest.mark.parametrize('case', CASES)
def test_outputs_and_gradients_with_tiles(case):
  arrays, options = _make(CASES[case])
  cotangents = cases.cotangents(arrays)
  *outputs, dq, dk, dv = cases.outputs_and_gradients(
    'interpreted', arrays, options, cotangents
  )
  got = dq, dk, dv
  exact = cases.exact(arrays, options, *cotangents)
  for mine, right in zip(outputs, exact[:2], strict=True):
    assert cases.error(mine, right) < 2e-6
  for mine, right in zip(got, exact[2:], strict=True):
    assert cases.error(mine, right) < 2e-5
  seen = cases.mask(40, 300, options)
  assert (np.asarray(dq)[~seen.any(2)] == 0).all()
  for grad in (dk, dv):
    assert (np.asarray(grad)[~seen.any(1)] == 0).all()


def test_gradients_in_bfloat16_lose_no_more_than_products_of_that_dtype():
  arrays, options = cases.make(causal=True, sizes=(90, 90), dtype=jnp.bfloat16)
  rng = np.random.default_rng(3)
  d_out = rng.standard_normal((2, 90, 2, 8)).astype(jnp.bfloat16)
  seen = cases.mask(90, 90, options)[:, None]

  def same_dtype(q, k, v):
    scores = jnp.einsum('bihd,bjhd->bhij', q, k).astype(jnp.float32) * 8**-0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum('bhij,bjhd->bihd', weights.astype(q.dtype), v)

  _, _, *mine = cases.outputs_and_gradients(
    'interpreted', arrays, options, (d_out, np.zeros((2, 2, 90)))
  )
  plain = jax.jit(
    lambda *a: jax.vjp(same_dtype, *a)[1](d_out),
    compiler_options={'xla_allow_excess_precision': False},
  )(*arrays)
  exact = cases.exact(arrays, options, np.asarray(d_out, np.float64), 0.0)
  for got, other, right in zip(mine, plain, exact[2:], strict=True):
    assert got.dtype == jnp.bfloat16
    assert cases.error(got, right) <= 2 * cases.error(other, right)


def test_keys_that_no_query_sees_do_not_matter_with_segments_and_tiles():
  options = {'tiles': ((0,), (0, 2), (2,)), 'segments': 2, 'causal': True}
  (q, k, v), options = _make({**options, 'offset': 200})
  hidden = ~cases.mask(40, 300, options).any(1)
  assert (hidden.sum(1) > 170).all()  # column 1, the future, other segments
  run = lambda *a: cases.outputs_and_gradients('interpreted', a, options)
  spoilt_k, spoilt_v = (
    np.where(hidden[..., None, None], np.float32(bad), x)
    for x, bad in ((k, np.nan), (v, np.inf))
  )
  got = run(q, spoilt_k, spoilt_v)
  for mine, right in zip(got, run(q, k, v), strict=True):
    np.testing.assert_array_equal(mine, right)


def test_none_of_the_kernels_has_races():
  options = {'sizes': (20, 150), 'heads': (2, 1), 'segments': 2, 'causal': True}
  (q, k, v), options = _make(
    {**options, 'offset': 130, 'tiles': ((0, 1), (1,))}
  )
  rule = masks.Rule(scale=0.3, causal=True, tiles=options['tiles'])
  limits = masks.Limits(
    np.int32([130, 90]),
    np.int32([150, 20]),
    options['q_segments'],
    options['kv_segments'],
  )
  params = pltpu.InterpretParams(detect_races=True)

  grads = tuple(
    np.float32(np.random.default_rng(3).standard_normal(shape))
    for shape in ((2, 20, 2, 8), (2, 2, 20))
  )

  def run(attention):
    @functools.partial(
      jax.jit, compiler_options={'xla_backend_optimization_level': 0}
    )
    def outputs_and_gradients(*arrays):
      outputs, pull_back = jax.vjp(
        lambda *a: attention(rule, *a, limits), *arrays
      )
      return *outputs, *pull_back(grads)

    return jax.block_until_ready(outputs_and_gradients(q, k, v))

  got = run(_attention(params))
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  assert interpret_pallas_call.races is not None
  assert not interpret_pallas_call.races.races_found
  for mine, whole in zip(got, run(blockwise.attention), strict=True):
    np.testing.assert_allclose(mine, whole, atol=1e-5)


@hypothesis.given(
  causal=st.booleans(),
  window=st.one_of(st.none(), st.integers(1, 20)),
  offset=st.tuples(st.integers(-20, 30), st.integers(-20, 30)),
  kv_length=st.tuples(st.integers(0, 27), st.integers(0, 27)),
  sizes=st.tuples(st.integers(1, 18), st.integers(1, 27)),
  kept=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
  columns_first=st.booleans(),
)
def test_it_visits_the_tiles_in_which_something_is_seen_and_fetches_no_other(
  causal, window, offset, kv_length, sizes, kept, columns_first
):
  size, tiles = (4, 6), None
  count = tuple(-(-s // n) for s, n in zip(sizes, size, strict=True))
  if kept is not None:
    matrix = np.random.default_rng(kept).random(count) < 0.5
    tiles = masks.Tiles.of(size, matrix)
  rule = masks.Rule(scale=1.0, causal=causal, window=window, tiles=tiles)
  cut = mosaic_tpu_tiles.Layout(rule, size, count, sizes, segmented=False)
  walk_of = mosaic_tpu_tiles.walk_rows
  if columns_first:
    walk_of = mosaic_tpu_tiles.walk_columns

  @jax.jit
  def walked(offset, kv_length):
    limits = masks.Limits(offset, kv_length, None, None)
    walk, scalars = walk_of(cut, limits)
    b, line, step = jnp.indices((2, walk.lines, walk.steps), sparse=True)
    return masks.as_array(rule, limits, *sizes), walk.at(scalars, b, line, step)

  visible, (tiles, new) = jax.tree.map(
    np.asarray, walked(np.int32(offset), np.int32(kv_length))
  )
  seen = np.zeros((2, count[0] * size[0], count[1] * size[1]), bool)
  seen[:, : sizes[0], : sizes[1]] = visible
  seen = seen.reshape(2, count[0], size[0], count[1], size[1]).any((2, 4))
  if columns_first:
    seen = seen.transpose(0, 2, 1)
  assert tiles.shape == new.shape
  assert tiles.shape[:2] == seen.shape[:2]
  assert tiles.shape[2] <= seen.shape[2]
  for b, line in np.ndindex(seen.shape[:2]):
    named = tiles[b, line].tolist()
    needed = tiles[b, line][new[b, line]].tolist()
    assert needed == np.flatnonzero(seen[b, line]).tolist()
    # What is named in the other steps is there already, but for a line that
    # sees nothing, which fetches one tile.
    assert sorted(set(named)) == (needed or named[:1])
    assert 0 <= min(named) <= max(named) < seen.shape[2]


def test_the_inner_axis_is_as_long_as_the_longest_line():
  limits = masks.Limits(jnp.zeros(1, jnp.int32), jnp.full(1, 4096), None, None)
  layout = functools.partial(
    mosaic_tpu_tiles.Layout,
    size=(128, 128),
    count=(32, 32),
    lengths=(4096, 4096),
    segmented=False,
  )
  steps = lambda rule: tuple(
    walk(layout(rule), limits)[0].steps
    for walk in (mosaic_tpu_tiles.walk_rows, mosaic_tpu_tiles.walk_columns)
  )
  butterfly = masks.Tiles.of((128, 128), np.eye(32, k=-1) + np.eye(32) > 0)
  assert steps(masks.Rule(scale=1.0)) == (32, 32)
  assert steps(masks.Rule(scale=1.0, tiles=butterfly)) == (2, 2)
  assert steps(masks.Rule(scale=1.0, causal=True, window=129)) == (3, 3)
  assert steps(masks.Rule(scale=1.0, window=1)) == (2, 2)


def test_the_gradients_lower_for_tpu_with_kernels_of_their_own():
  shape = jax.ShapeDtypeStruct((1, 300, 4, 64), jnp.bfloat16)
  tiles = masks.Tiles(TILE, ((0, 1),) * 19)
  segments = jnp.zeros((1, 300), jnp.int32)

  def loss(q, k, v):
    both = {'q_segments': segments, 'kv_segments': segments}
    out, lse = api.attention(q, k, v, tiles=tiles, causal=True, **both)
    return out.astype(jnp.float32).sum() + lse.sum()

  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  for name in (
    'flash_attention',
    'flash_attention_dq',
    'flash_attention_dk_dv',
  ):
    assert f'kernel_name = "{name}"' in text


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'dtype': jnp.float16}, 'float16: the TPU kernels take'),
    ({'tiles': KEPT, 'tile': (16, 16)}, 'tiles of 16 x 16: those of a TPU'),
    ({'tiles': KEPT, 'tile': (20, 128)}, 'multiples of 16 queries and 128'),
  ],
)
def test_what_it_does_not_take_is_said(change, message):
  arrays, options = cases.make(**{'sizes': (40, 41), **change})
  with pytest.raises(NotImplementedError, match=message):
    mosaic_tpu.attention(
      masks.Rule(scale=1.0, tiles=options.get('tiles')),
      *arrays,
      masks.Limits(
        jnp.zeros(2, jnp.int32), jnp.full(2, 41, jnp.int32), None, None
      ),
    )
