"""Products of signs against numpy's int64, for every implementation."""

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
from pallas_kernels import llvm_ir
from pallas_kernels.binary_matmul import api
from pallas_kernels.binary_matmul import blockwise
from pallas_kernels.binary_matmul import mosaic_tpu

INTERPRETED = {
  f'mosaic_tpu, {dtype}': functools.partial(
    mosaic_tpu.binary_matmul, dtype=dtype, interpret=True
  )
  for dtype in ('int8', 'bfloat16')
}
COUNTS = not llvm_cpu.missing() and llvm_ir.has('avx512vpopcntdq')
HERE = ('reference', 'blockwise') + (('llvm_cpu',) if COUNTS else ())
RUNNABLE = (*HERE, *INTERPRETED)
# What does not depend on the dtype of the unpacked signs runs with one.
OF_ONE_DTYPE = (*HERE, next(iter(INTERPRETED)), None)

# M, N, K: one, no multiples of a word, a register or a tile, several tiles.
SIZES = [
  (1, 1, 1),
  (1, 130, 32),
  (3, 5, 31),
  (5, 1, 33),
  (6, 9, 1000),
  (2, 3, 1025),  # words split in two by the TPU kernel
  (7, 9, 2049),  # words left whole
  (9, 6, 8200),  # several slices of them
  (2, 3, 33000),  # words too many to be summed in one go
  (271, 530, 70),  # several tiles
]


@pytest.fixture(autouse=True, scope='module')
def interpreted():
  """The TPU kernel under names that run here."""
  with pytest.MonkeyPatch.context() as patch:
    for name, function in INTERPRETED.items():
      patch.setitem(api.IMPLEMENTATIONS, name, api.on_clean_words(function))
    yield


def _random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


def _signs(x):
  return np.where(x >= 0, 1, -1).astype(np.int64)


def _exact(x, y):
  return _signs(x) @ _signs(y).swapaxes(-1, -2)


def _races_found():
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module

  # A global in jax 0.10, and a function that returns it later.
  races = module.get_races() if hasattr(module, 'get_races') else module.races
  return races.races_found


# A TPU will not run what LLVM makes of its kernel here: no effort on it.
_NO_EFFORT = {'xla_backend_optimization_level': 0}
_pack = jax.jit(api.pack_signs, static_argnums=1)
_unpack = jax.jit(api.unpack_signs, static_argnums=(1, 2))


def _jit(function, name):
  options = _NO_EFFORT if name in INTERPRETED else None
  return jax.jit(function, compiler_options=options)


def _product(name, x, y):
  """The product of the signs of two arrays of numbers, compiled."""

  def run(x, y):
    a, b = api.pack_signs(x), api.pack_signs(y)
    return api.binary_matmul(a, b, x.shape[-1], implementation=name)

  return _jit(run, name)(x, y)


@pytest.mark.parametrize('name', RUNNABLE)
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_the_product_is_exact(name, sizes):
  m, n, k = sizes
  x, y = _random(m, k), _random(n, k, seed=1)
  got = _product(name, x, y)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, _exact(x, y))


@pytest.mark.parametrize('name', RUNNABLE)
def test_signs_that_all_agree_or_all_differ(name):
  """The largest sums there are; bfloat16 cannot hold them, float32 can."""
  x = np.ones((2, 8199)) * [[1], [-1]]
  right = [[8199, -8199], [-8199, 8199]]
  np.testing.assert_array_equal(_product(name, x, x), right)


@pytest.mark.parametrize('name', OF_ONE_DTYPE)
@pytest.mark.parametrize('rows', [2, 40])
@pytest.mark.parametrize('size', [1, 45, 1025, 1101])
def test_bits_beyond_the_inner_size_do_not_matter(name, rows, size):
  x, y = _random(rows, size), _random(6, size, seed=1)
  a, b = (np.array(_pack(z)) for z in (x, y))
  rng = np.random.default_rng(2)
  for words in (a, b):
    garbage = rng.integers(0, 2**32, len(words), np.uint32)
    words[:, -1] |= garbage << np.uint32(size % 32)
  run = functools.partial(api.binary_matmul, size=size, implementation=name)
  got = _jit(run, name)(a, b)
  np.testing.assert_array_equal(got, _exact(x, y))


def test_tiles_of_rows_that_do_not_divide_them(monkeypatch):
  monkeypatch.setattr(blockwise, 'TILE', 50)  # 24 rows in three tiles
  x, y = _random(23, 100), _random(5, 100, seed=1)
  np.testing.assert_array_equal(_product('blockwise', x, y), _exact(x, y))


@hypothesis.settings(max_examples=20)
@hypothesis.given(
  m=st.integers(1, 40),
  n=st.integers(1, 40),
  k=st.integers(1, 400),
  tile=st.sampled_from([1, 50, 1000]),
  seed=st.integers(0, 99),
)
def test_any_size_in_any_tiles(m, n, k, tile, seed):
  x, y = _random(m, k, seed=seed), _random(n, k, seed=seed + 100)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(blockwise, 'TILE', tile)
    got = _product('blockwise', x, y)
  np.testing.assert_array_equal(got, _exact(x, y))


@pytest.mark.parametrize('name', OF_ONE_DTYPE)
def test_leading_axes_and_vmap_give_the_same(name):
  x, y = _random(2, 3, 9, 70), _random(2, 5, 70, seed=1)
  run = functools.partial(_product, name)
  np.testing.assert_array_equal(run(x, y[0]), _exact(x, y[0]))
  np.testing.assert_array_equal(run(x[0, 0, 0], y[0]), _exact(x, y[0])[0, 0, 0])
  over_both = jax.vmap(run)(x, y)
  np.testing.assert_array_equal(over_both, _exact(x, y[:, None]))
  over_b = jax.vmap(run, (None, 0))(x[0, 0], y)
  np.testing.assert_array_equal(over_b, _exact(x[0, 0], y))


@pytest.mark.parametrize('name', OF_ONE_DTYPE)
def test_no_rows_are_an_empty_product(name):
  x, nothing = _random(4, 40), _random(0, 40)
  assert _product(name, nothing, x).shape == (0, 4)
  assert _product(name, x, nothing).shape == (4, 0)


def test_bit_b_of_word_w_is_the_sign_of_number_32_w_plus_b():
  x = _random(3, 77)
  bits = np.pad(x >= 0, ((0, 0), (0, 96 - 77)))
  expected = np.packbits(bits, axis=1, bitorder='little').view('<u4')
  got = api.pack_signs(x)
  assert got.dtype == jnp.uint32
  np.testing.assert_array_equal(got, expected)


def test_zeros_of_both_signs_count_as_plus_one():
  x = jnp.asarray([0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf, 1e-30, -1e-30])
  right = [1, 1, -1, 1, -1, 1, -1]
  for pack in (api.pack_signs, jax.jit(api.pack_signs)):
    np.testing.assert_array_equal(api.unpack_signs(pack(x), 7), right)
  whole = api.pack_signs(jnp.asarray([3, 0, -2], jnp.int8))
  np.testing.assert_array_equal(whole, [0b011])


@hypothesis.settings(max_examples=15)
@hypothesis.given(
  shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
  data=st.data(),
)
def test_packing_and_unpacking_an_axis_gives_the_signs_back(shape, data):
  axis = data.draw(st.integers(-len(shape), len(shape) - 1))
  x = _random(*shape)
  words = _pack(x, axis)
  packed = list(shape)
  packed[axis] = -(-shape[axis] // 32)
  assert words.shape == tuple(packed)
  signs = _unpack(words, shape[axis], axis)
  assert signs.dtype == jnp.int8
  np.testing.assert_array_equal(signs, _signs(x))


def test_the_tpu_kernel_has_no_races():
  x, y = _random(40, 4200), _random(140, 4200, seed=1)
  got = mosaic_tpu.binary_matmul(
    4200,
    _pack(x),
    _pack(y),
    interpret=pltpu.InterpretParams(detect_races=True),
  )
  assert not _races_found()
  np.testing.assert_array_equal(got, _exact(x, y))


@pytest.mark.parametrize('rows', [(), (1,), (300,), (2, 77)])
def test_it_lowers_for_tpu_with_the_kernel_and_elsewhere_without(rows):
  a, b = (
    jax.ShapeDtypeStruct((*lead, 19), jnp.uint32) for lead in (rows, (700,))
  )
  run = jax.jit(functools.partial(api.binary_matmul, size=600))
  traced = run.trace(a, b)
  for platform in ('tpu', 'cuda', 'cpu'):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ('tpu_custom_call' in text) == (platform == 'tpu')


def test_it_lowers_for_tpu_under_vmap():
  a, b = (jax.ShapeDtypeStruct((4, n, 19), jnp.uint32) for n in (7, 9))
  run = jax.vmap(functools.partial(api.binary_matmul, size=600))
  lowered = jax.jit(run).trace(a, b).lower(lowering_platforms=('tpu',))
  assert 'tpu_custom_call' in lowered.as_text()


def test_the_tpu_kernel_says_that_it_is_for_tpu():
  run = functools.partial(
    api.binary_matmul, size=40, implementation='mosaic_tpu'
  )
  words = jnp.zeros((3, 2), jnp.uint32)
  sentence = 'mosaic_tpu is a kernel for tpu and this program is compiled for'
  for call in (run, jax.jit(run)):
    with pytest.raises(NotImplementedError, match=f'{sentence} cpu'):
      call(words, words)


@pytest.mark.parametrize(
  ('chip', 'dtype'), [('TPU v4', 'bf16'), ('TPU v5e', 'i8'), ('TPU v6e', 'i8')]
)
def test_signs_are_int8_where_the_chip_multiplies_it(chip, dtype):
  device = sharding.AbstractDevice(
    device_kind=chip, num_cores=1, platform='tpu'
  )
  mesh = sharding.AbstractMesh((), (), abstract_device=device)
  words = jax.ShapeDtypeStruct((3, 2), jnp.uint32)
  with sharding.use_abstract_mesh(mesh):
    kernel = functools.partial(mosaic_tpu.binary_matmul, 40)
    program = str(jax.make_jaxpr(kernel)(words, words))
  assert ('bf16[' in program) == (dtype == 'bf16')
  assert ('i8[' in program) == (dtype == 'i8')


def test_the_tpu_kernel_refuses_signs_of_another_dtype():
  words = _pack(_random(3, 40))
  with pytest.raises(NotImplementedError, match='bfloat16, not as float32'):
    mosaic_tpu.binary_matmul(40, words, words, dtype=jnp.float32)


def test_blockwise_never_holds_all_pairs_of_words():
  m, n, words = 256, 512, 64
  a, b = (jax.ShapeDtypeStruct((r, words), jnp.uint32) for r in (m, n))
  run = functools.partial(
    api.binary_matmul, size=32 * words, implementation='blockwise'
  )
  program = jax.jit(run).lower(a, b).compile()
  assert program.memory_analysis().temp_size_in_bytes < 2 * 4 * m * n


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'implementation': 'xnor'}, "no implementation 'xnor'; there are ref"),
    ({'size': 65}, 'a has 2 words along axis -1, and size=65 signs are 3'),
    ({'size': 0}, 'size is 0; a row holds at least one sign'),
    ({'b': np.zeros((4, 3), np.uint32)}, 'b has 3 words along axis -1'),
    ({'b': np.zeros((4, 2), np.int32)}, 'b is int32; pack_signs gives'),
    ({'b': np.zeros(2, np.uint32)}, r'b \(2,\): right are \[..., W\] and'),
    ({'a': np.zeros((), np.uint32)}, r'a has shape \(\) and b'),
  ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, message):
  words = np.zeros((4, 2), np.uint32)
  arguments = {'a': words, 'b': words, 'size': 40} | change
  with pytest.raises(ValueError, match=message) as error:
    api.binary_matmul(**arguments)
  assert '\n' not in str(error.value)


def test_unpacking_refuses_another_number_of_words():
  with pytest.raises(ValueError, match='words has 2 words along axis 0, and'):
    api.unpack_signs(np.zeros((2, 5), np.uint32), 32, axis=0)
