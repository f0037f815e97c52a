"""Products with quantized weights: every implementation against float64."""

import functools
import math
import re

import hypothesis
from hypothesis import strategies as st
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dequant_matmul import api
from pallas_kernels.dequant_matmul import blockwise
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.dequant_matmul import mosaic_tpu

# Small tiles, so that small shapes have several and hang over the edges.
SMALL = mosaic_tpu.Tiles(32, 128, 128)
_interpreted = functools.partial(
  mosaic_tpu.dequant_matmul, tiles=SMALL, interpret=True
)
RUNNABLE = ('reference', 'blockwise', 'interpreted')
every = pytest.mark.parametrize('name', RUNNABLE)

QUANTIZE = {
  kind: jax.jit(getattr(formats, f'quantize_{kind}'), static_argnums=1)
  for kind in ('int8', 'int4', 'nf4')
}
# Format, group, M, K, N.
CASES = [
  ('int8', 1, 1, 1, 1),
  ('int8', 129, 33, 129, 257),  # a scale a column; every side hangs over
  ('int8', 1000, 2, 1000, 40),  # that serves several tiles
  ('int8', 16, 3, 304, 130),  # a tile of part of the groups
  ('int4', 32, 1, 32, 1),
  ('int4', 32, 70, 352, 257),
  ('int4', 512, 3, 1024, 140),  # groups of several tiles
  ('int4', 480, 2, 480, 5),
  ('nf4', 64, 1, 576, 130),
  ('nf4', 64, 40, 320, 257),
  ('nf4', 128, 17, 256, 128),
]


@pytest.fixture(autouse=True, scope='module')
def small_and_interpreted():
  """The TPU kernel under a name that runs here; blocks of 128 columns."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(api.IMPLEMENTATIONS, 'interpreted', _interpreted)
    patch.setattr(blockwise, 'BLOCK', 1)
    yield


def _random(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@functools.cache
def _weight(kind, group, k, n, seed=1):
  """A quantized weight with a group of zeros, and scales of all sizes."""
  w = _random(k, n, seed=seed) * 10.0 ** (np.arange(n) % 5 - 2)
  if group < k:
    w[:group, n // 2] = 0
  return QUANTIZE[kind](w.astype(np.float32), group)


def _numpy_weight(quantized):
  """The definition in float64, element by element of the packed bytes."""
  values, scales, codebook = (
    None if part is None else np.asarray(part) for part in quantized
  )
  if values.dtype == np.uint8:
    w = np.zeros((2 * len(values), values.shape[1]), np.int64)
    for row, byte in enumerate(values):
      block, place = divmod(row, 16)
      w[32 * block + place] = byte % 16
      w[32 * block + place + 16] = byte // 16
    values = np.where(w > 7, w - 16, w) if codebook is None else codebook[w]
  group = len(values) // len(scales)
  return values.astype(np.float64) * np.repeat(scales, group, 0)


@functools.cache
def _product(name):
  return jax.jit(functools.partial(api.dequant_matmul, implementation=name))


@functools.cache
def _product_and_gradient(name, **options):
  run = functools.partial(api.dequant_matmul, implementation=name, **options)

  def both(x, d_out, *quantized):
    out, pull_back = jax.vjp(lambda x: run(x, *quantized), x)
    return out, *pull_back(d_out.astype(out.dtype))

  # A TPU will not run what LLVM makes of its kernel here: no effort on it.
  effort = {'xla_backend_optimization_level': 0}
  return jax.jit(
    both, compiler_options=effort if name == 'interpreted' else None
  )


def _both(name, x, quantized, d_out, **options):
  """The product and the gradient of x, in one compiled program."""
  return _product_and_gradient(name, **options)(x, d_out, *quantized)


def _error(got, x, w):
  """Largest error of x @ w, in units of |x| @ |w|."""
  size = np.abs(x) @ np.abs(w)
  size[size == 0] = 1
  return np.max(np.abs(np.asarray(got, np.float64) - x @ w) / size)


@functools.cache
def _case(kind, group, m, k, n, dtype):
  """Operands of a case, the same in float64, and the reference's results."""
  quantized = _weight(kind, group, k, n)
  x, d_out = (_random(m, s, seed=s).astype(dtype) for s in (k, n))
  w = _numpy_weight(quantized)
  exact = (np.asarray(x, np.float64), w), (np.asarray(d_out, np.float64), w.T)
  args = x, quantized, d_out
  return args, exact, _both('reference', *args)


def _check(name, case, dtype):
  """At most twice the error of the reference."""
  args, exact, baseline = _case(*case, dtype)
  results = baseline if name == 'reference' else _both(name, *args)
  # The reference may be right by luck: what float32 sums of another order may
  # lose is always granted. A term too few would be a thousandth or more.
  least = 2 * float(jnp.finfo(jnp.float32).eps)
  limit = 8 * float(jnp.finfo(dtype).eps)
  for got, plain, operands in zip(results, baseline, exact, strict=True):
    assert got.dtype == dtype
    assert _error(plain, *operands) <= limit
    assert _error(got, *operands) <= 2 * max(_error(plain, *operands), least)


@every
@pytest.mark.parametrize('case', CASES, ids=str)
def test_the_product_and_its_gradient_are_those_of_the_weight(name, case):
  _check(name, case, jnp.float32)


@every
@pytest.mark.parametrize('case', [CASES[1], CASES[5], CASES[8]], ids=str)
def test_bfloat16_is_as_exact_as_the_reference(name, case):
  _check(name, case, jnp.bfloat16)


@hypothesis.given(
  kind=st.sampled_from(list(QUANTIZE)),
  group=st.integers(1, 4),
  groups=st.integers(1, 5),
  m=st.integers(0, 5),
  n=st.integers(0, 300),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
@hypothesis.settings(max_examples=6)
def test_any_sizes_even_none(kind, group, groups, m, n, dtype):
  group = group * 7 if kind == 'int8' else group * 32
  case = (kind, group, m, group * groups, n)
  if 0 in (m, n):
    x = np.zeros((m, group * groups), dtype)
    empty = QUANTIZE[kind](np.zeros((group * groups, n), np.float32), group)
    assert api.dequant_matmul(x, *empty).shape == (m, n)
  else:
    _check('blockwise', case, dtype)


@every
def test_the_result_may_be_wider_and_the_gradient_is_not(name):
  quantized = _weight('nf4', 64, 128, 24)
  x, d_out = _random(3, 128).astype(jnp.bfloat16), _random(3, 24)
  out, d_x = _both(name, x, quantized, d_out, out_dtype=jnp.float32)
  assert (out.dtype, d_x.dtype) == (jnp.float32, jnp.bfloat16)
  right = np.asarray(x, np.float64) @ _numpy_weight(quantized)
  narrow = _product(name)(x, *quantized)
  np.testing.assert_array_equal(np.asarray(out).astype(jnp.bfloat16), narrow)
  np.testing.assert_allclose(out, right, rtol=0.02, atol=0.02 * right.std())


@every
def test_the_gradient_of_the_gradient_is_the_product(name):
  quantized = _weight('int4', 32, 64, 24)
  run = functools.partial(api.dequant_matmul, implementation=name)
  x, d_out = _random(3, 64), _random(3, 24, seed=2)

  @jax.jit
  def product_again(x, d_out):
    d_x = lambda d_out: jax.vjp(lambda x: run(x, *quantized), x)[1](d_out)[0]
    return jax.vjp(d_x, d_out)[1](x)[0]

  np.testing.assert_array_equal(
    product_again(x, d_out), _product(name)(x, *quantized)
  )


@every
def test_leading_axes_and_vmap_give_the_same(name):
  quantized = _weight('nf4', 64, 128, 24)
  x = _random(3, 4, 128)
  run = _product(name)
  right = x.astype(np.float64) @ _numpy_weight(quantized)
  close = functools.partial(
    np.testing.assert_allclose, rtol=1e-5, atol=1e-5 * np.abs(right).max()
  )
  close(run(x, *quantized), right)
  close(run(x[0, 0], *quantized), right[0, 0])
  close(jax.vmap(run, (0, None, None, None))(x, *quantized), right)
  two = jax.tree.map(np.asarray, quantized[:2])
  two = tuple(np.stack([a, a[::-1]]) for a in two)
  flipped = formats.Quantized(*(part[1] for part in two), quantized.codebook)
  got = jax.vmap(run, (None, 0, 0, None))(x[0], *two, quantized.codebook)
  close(got[0], right[0])
  close(got[1], x[0].astype(np.float64) @ _numpy_weight(flipped))


@pytest.mark.parametrize('cut', ['rows', 'columns'])
@pytest.mark.parametrize('name', [*RUNNABLE, None])
def test_rows_or_columns_may_lie_on_several_devices(name, cut):
  """With gradients, which devices with different columns must sum."""
  quantized = _weight('nf4', 64, 64, 80)
  x, d_out = _random(16, 64), _random(16, 80, seed=2)
  mesh = jax.make_mesh((8,), ('d',), (jax.sharding.AxisType.Auto,))
  none, first, last = (
    jax.sharding.PartitionSpec(*axes) for axes in ((), ('d',), (None, 'd'))
  )
  x_spec, w_spec, out_spec = (
    (first, none, first) if cut == 'rows' else (none, last, last)
  )
  run = jax.shard_map(
    functools.partial(api.dequant_matmul, implementation=name),
    mesh=mesh,
    in_specs=(x_spec, w_spec, w_spec, none),
    out_specs=out_spec,
    # The interpreter of kernels does not keep track of what varies.
    check_vma=name != 'interpreted',
  )

  @jax.jit
  def both(x, d_out):
    out, pull_back = jax.vjp(lambda x: run(x, *quantized), x)
    return out, pull_back(d_out)[0]

  w = _numpy_weight(quantized)
  rights = x @ w, d_out @ w.T
  for got, right in zip(both(x, d_out), rights, strict=True):
    np.testing.assert_allclose(got, right, atol=1e-5 * np.abs(right).max())
  shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, *quantized)]
  if name is None:
    assert 'tpu_custom_call' in _text(run, 'tpu', *shapes)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@every
def test_a_row_that_is_not_finite_spoils_no_other(name, bad):
  quantized = _weight('int4', 32, 64, 24)
  run = _product(name)
  x = _random(4, 64)
  right = np.asarray(run(x, *quantized))
  x[2, 5] = bad
  got = np.asarray(run(x, *quantized))
  rest = np.asarray([0, 1, 3])
  np.testing.assert_array_equal(got[rest], right[rest])
  assert not np.isfinite(got[2]).all()


@pytest.mark.parametrize(
  ('case', 'transposed'), [(CASES[9], False), (CASES[3], True)]
)
def test_the_kernel_has_no_races_and_reads_nothing_beyond(case, transposed):
  """Two cores share the tiles; memory that nothing wrote is NaN."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module

  kind, group, m, k, n = case
  quantized = _weight(kind, group, k, n)
  x, w = _random(m, n if transposed else k), _numpy_weight(quantized)
  right = x @ (w.T if transposed else w)
  got = mosaic_tpu.dequant_matmul(
    x,
    *quantized,
    transposed=transposed,
    out_dtype=jnp.float32,
    tiles=SMALL,
    interpret=pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2),
  )
  # A global in jax 0.10, and a function that returns it later.
  races = module.get_races() if hasattr(module, 'get_races') else module.races
  assert not races.races_found
  np.testing.assert_allclose(got, right, atol=1e-5 * np.abs(right).max())


# Programs.


def _text(function, platform, *shapes):
  traced = jax.jit(function).trace(*shapes)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def _shapes(kind, m, k, n, dtype=jnp.float32, group=64):
  rows = (k, jnp.int8) if kind == 'int8' else (k // 2, jnp.uint8)
  shapes = [
    ((m, k), dtype),
    ((rows[0], n), rows[1]),
    ((k // group, n), jnp.float32),
  ]
  if kind == 'nf4':
    shapes.append(((16,), jnp.float32))
  return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def _gradient(x, *quantized):
  loss = lambda x: jnp.square(api.dequant_matmul(x, *quantized)).sum()
  return jax.grad(loss)(x)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('kind', QUANTIZE)
def test_a_tpu_gets_the_kernel_and_others_do_not(kind, dtype):
  for m in (1, 600):
    shapes = _shapes(kind, m, 1536, 700, dtype)
    for platform in ('tpu', 'cuda', 'cpu'):
      on_tpu = platform == 'tpu'
      text = _text(api.dequant_matmul, platform, *shapes)
      assert text.count('tpu_custom_call') == on_tpu
      text = _text(_gradient, platform, *shapes)
      assert text.count('tpu_custom_call') == 2 * on_tpu
      assert ('dequant_matmul_transposed' in text) == on_tpu
  batched = jax.vmap(api.dequant_matmul, (0, *[None] * (len(shapes) - 1)))
  several = jax.ShapeDtypeStruct((4, 3, 1536), dtype)
  assert 'tpu_custom_call' in _text(batched, 'tpu', several, *shapes[1:])


@pytest.mark.parametrize(
  ('m', 'dtype'), [(1, jnp.float32), (1, jnp.bfloat16), (7, jnp.bfloat16)]
)
@pytest.mark.parametrize('kind', QUANTIZE)
def test_no_program_holds_a_whole_weight_of_wider_numbers(kind, dtype, m):
  k, n = 192, 2048
  shapes = _shapes(kind, m, k, n, dtype)
  for function in (api.dequant_matmul, _gradient):
    compiled = jax.jit(function).lower(*shapes).compile().as_text()
    for text, pattern in (
      (compiled, r'\b(?:f|bf|s|u)(?:16|32)\[([\d,]+)\]'),
      (
        _text(function, 'tpu', *shapes),
        r'tensor<([\dx]+)x(?:bf|f|i|ui)(?:16|32)>',
      ),
    ):
      sizes = [
        math.prod(map(int, re.split('[,x]', found)))
        for found in re.findall(pattern, text)
      ]
      assert sizes
      # Half a weight would be the low or the high halves of the bytes.
      assert max(sizes) < k * n / 2


@pytest.mark.parametrize('kind', QUANTIZE)
def test_blocks_are_as_wide_as_one_row_wants_them(kind):
  """A narrow block would be made wide again before a product of one row."""
  run = functools.partial(api.dequant_matmul, implementation='blockwise')
  k, n = 192, 2048
  for m in (1, 7):
    shapes = _shapes(kind, m, k, n, jnp.bfloat16)
    text = _text(run, 'cpu', *shapes)
    assert bool(re.search(r'tensor<(96|192)x128xbf16>', text)) == (m > 1)


def test_what_the_kernel_does_not_take_is_left_to_others():
  shapes = _shapes('nf4', 3, 128, 24, jnp.float16)
  assert 'tpu_custom_call' not in _text(api.dequant_matmul, 'tpu', *shapes)
  refused = functools.partial(api.dequant_matmul, implementation='mosaic_tpu')
  x = jnp.zeros((3, 2400))
  weight = functools.partial(QUANTIZE['int8'], np.ones((2400, 8), np.float32))
  cases = [
    ((x.astype(jnp.float16), *weight()), {}, 'x must be float32 or bfloat16'),
    ((x, *weight()), {'out_dtype': jnp.float16}, 'out_dtype must be float32'),
    ((x, *weight(12)), {}, 'a multiple of 8 rows or all of K, got 12'),
    ((x, *weight(1200)), {}, '1024 rows holds whole groups of 1200'),
  ]
  for args, options, sentence in cases:
    with pytest.raises(NotImplementedError, match=f'mosaic_tpu: .*{sentence}'):
      refused(*args, **options)
    others = functools.partial(api.dequant_matmul, **options)
    assert jax.eval_shape(others, *args).shape == (3, 8)


def test_the_kernel_is_for_tpu_and_names_are_known():
  quantized = _weight('nf4', 64, 64, 24)
  product = functools.partial(api.dequant_matmul, implementation='mosaic_tpu')
  sentence = 'mosaic_tpu is a kernel for tpu and this program is compiled for'
  for run in (product, jax.jit(product)):
    with pytest.raises(NotImplementedError, match=sentence):
      run(_random(3, 64), *quantized)
  with pytest.raises(ValueError, match='dequant_matmul has no implementation'):
    api.dequant_matmul(_random(3, 64), *quantized, implementation='x')
  # A list of names is as good as a tuple.
  names = ['mosaic_gpu_of_tomorrow', 'blockwise']
  with pytest.raises(ValueError, match="'mosaic_gpu_of_tomorrow'"):
    api.dequant_matmul(_random(3, 64), *quantized, implementation=names)
  api.dequant_matmul(_random(3, 64), *quantized, implementation=names[1:])


def test_what_does_not_fit_is_refused_in_one_line():
  x = _random(3, 64)
  values, scales, codebook = _weight('nf4', 64, 64, 24)
  eight = jnp.zeros((64, 24), jnp.int8)
  cases = [
    ((x.astype(np.int32), values, scales), r'float dtype, got \(3, 64\) int32'),
    ((x, values.astype(jnp.int32), scales), 'two values of 4 bits a byte, got'),
    ((x, values[:16], scales), r'\[K / 2, N\], got \(3, 64\) and \(16, 24\)'),
    ((x, eight[:9], scales), r'values \[K, N\], got \(3, 64\) and \(9, 24\)'),
    ((x, values, scales[:, :3]), r'scales must be \[K / G, 24\], got \(1, 3\)'),
    ((x, values, scales.astype(jnp.bfloat16)), 'scales must be float32'),
    ((x, values, scales[:0]), '0 groups of uint8 values must divide K = 64'),
    ((x, values, jnp.ones((4, 24))), 'divide K = 64 into multiples of 32'),
    ((x, eight, jnp.ones((3, 24))), '3 groups of int8 values must divide'),
    ((x, values, scales, codebook[:8]), r'\[16\] float32 and its codes uint8'),
    ((x, eight, scales, codebook), 'its codes uint8, got .* and int8'),
  ]
  for args, sentence in cases:
    with pytest.raises(ValueError, match=sentence) as error:
      api.dequant_matmul(*args)
    assert '\n' not in str(error.value)


def test_a_gradient_of_scales_is_refused_and_not_zero():
  x, (values, *rest) = _random(3, 64), _weight('nf4', 64, 64, 24)
  loss = lambda *rest: api.dequant_matmul(x, values, *rest).sum()
  for argument in (0, 1):
    with pytest.raises(NotImplementedError, match='no gradient for scales'):
      jax.grad(loss, argument)(*rest)
