"""The one matrix product."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import leaves
from efficiency_jax import linear
from efficiency_jax.quantization.absmax import Integers
from efficiency_jax.quantization.codebooks import Codes
from efficiency_jax.quantization.gobo import Gobo
from efficiency_jax.quantization.number_formats import Floats

_linear = jax.jit(linear.linear)
_logits = jax.jit(linear.logits_from_table)
_embed = jax.jit(linear.embed)
_rows_of_table = jax.jit(linear.rows_of_table)
_dequantize = jax.jit(leaves.dequantize)


def _normal(seed, *shape):
  return np.float32(np.random.default_rng(seed).standard_normal(shape))


def _arrays(dtype, rows=3):
  shapes = (rows, 32), (32, 24), (24,)
  x, kernel, bias = (
    _normal(i, *shape).astype(dtype) for i, shape in enumerate(shapes)
  )
  return x, kernel, bias


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_linear_is_the_product_rounded_once(dtype):
  x, kernel, bias = _arrays(dtype)
  exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
  exact = exact + np.asarray(bias, np.float64)
  got = _linear(x, kernel, bias)
  assert got.dtype == dtype
  rounded = np.float32(exact).astype(dtype)
  # One unit in the last place of the result: sums are in float32.
  np.testing.assert_allclose(
    np.asarray(got, np.float64),
    np.asarray(rounded, np.float64),
    rtol=float(jnp.finfo(dtype).eps),
    atol=1e-5,
  )
  without = _linear(x, kernel)
  np.testing.assert_array_equal(
    without, _linear(x, kernel, np.zeros_like(bias))
  )


def test_leading_axes_are_kept():
  x, kernel, _ = _arrays(jnp.float32, rows=6)
  y = np.asarray(_linear(x.reshape(2, 3, 32), kernel))
  assert y.shape == (2, 3, 24)
  np.testing.assert_allclose(y.reshape(6, 24), _linear(x, kernel), rtol=1e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_one_row_alone_is_one_of_two(dtype):
  """The padding that keeps narrow weights narrow changes no bit."""
  x, kernel, _ = _arrays(dtype, rows=2)
  for product in (_linear, lambda x, k: _logits(x, k.T)):
    both, alone = product(x, kernel), product(x[:1], kernel)
    assert alone.shape == (1, 24)
    if dtype == jnp.bfloat16:
      np.testing.assert_array_equal(alone, np.asarray(both)[:1])
    else:
      np.testing.assert_allclose(alone, np.asarray(both)[:1], atol=1e-5)


def test_one_narrow_row_converts_no_weight():
  x, kernel, _ = _arrays(jnp.bfloat16, rows=1)
  program = _linear.lower(x, kernel).compile().as_text()
  assert 'f32[32,24]' not in program


def test_logits_score_every_row_of_the_table_in_float32():
  x, kernel, _ = _arrays(jnp.bfloat16)
  logits = _logits(x[None], kernel.T)
  assert logits.shape == (1, 3, 24)
  assert logits.dtype == jnp.float32
  exact = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
  np.testing.assert_allclose(np.asarray(logits)[0], exact, atol=1e-4)


def test_embedding_takes_rows():
  table = jnp.arange(12.0).reshape(4, 3)
  rows = linear.embed(jnp.asarray([[3, 0]]), table)
  np.testing.assert_array_equal(rows, [[[9, 10, 11], [0, 1, 2]]])
  # Placeholders beyond the table must not make a NaN.
  assert np.isfinite(linear.embed(jnp.asarray([7, -1]), table)).all()


@pytest.mark.parametrize('width', [4, 6, 7, 64])  # in parts, or not divisible
def test_one_row_is_the_same_product_in_parts(width):
  rng = np.random.default_rng(width)
  row, weight = rng.standard_normal((1, width)), rng.standard_normal((width, 5))
  row, weight = np.float32(row), np.float32(weight)
  got = _linear(row, weight)
  np.testing.assert_allclose(got, row @ weight, rtol=1e-5, atol=1e-6)
  # Twice the row is not one row: the ordinary product.
  both = np.asarray(_linear(np.concatenate([row, row]), weight))
  np.testing.assert_allclose(both[:1], got, rtol=1e-5, atol=1e-6)


def test_one_row_does_not_widen_a_narrow_weight():
  row = jax.ShapeDtypeStruct((1, 64), jnp.float32)
  weight = jax.ShapeDtypeStruct((64, 31), jnp.bfloat16)
  traced = str(jax.make_jaxpr(linear.linear)(row, weight))
  assert 'f32[64,31]' not in traced
  assert 'f32[4,16,31]' not in traced


_METHODS = {
  'int8': Integers(),
  'int8 per tensor': Integers(per='tensor'),
  'int8 group': Integers(per=32),
  'int8 zero point': Integers(symmetric=False),
  'int5': Integers(bits=5, per=32),
  'int4': Integers(bits=4, per=32),
  'int4 zero point': Integers(bits=4, per=32, symmetric=False),
  'int4 half scales': Integers(bits=4, per=32, scale_dtype=jnp.float16),
  'int4 groups of 16': Integers(bits=4, per=16),
  'NF4': Codes(),
  'NF4 double': Codes(double=True),
  'bf16': Floats(format='bf16'),
  'fp8': Floats(format='fp8 e4m3', per='channel'),
  'GOBO': Gobo(bits=3, threshold=-2.0),
}


@functools.cache
def _quantized(method):
  """A weight of a method, and the matrix that it stands for."""
  quantize = _METHODS[method]
  if isinstance(quantize, Integers | Codes):  # others look at the values
    quantize = jax.jit(quantize.__call__)
  q = quantize(_normal(0, 64, 48))
  return q, np.asarray(_dequantize(q))


@pytest.mark.parametrize('method', _METHODS)
@pytest.mark.parametrize('rows', [1, 3, 40])
def test_a_quantized_weight_multiplies_as_the_weight_it_stands_for(
  method, rows
):
  q, matrix = _quantized(method)
  x = _normal(1, rows, 64)
  table = dataclasses.replace(q, transposed=True)

  @jax.jit
  def products(x, q, table):
    return linear.linear(x, q), linear.logits_from_table(x, table)

  product, logits = products(x, q, table)
  exact = x.astype(np.float64) @ matrix
  np.testing.assert_allclose(product, exact, atol=1e-4)
  # As a table its transpose scores, and rows are looked up.
  np.testing.assert_allclose(logits, exact, atol=1e-4)
  whole = np.asarray(_dequantize(table))
  tokens = np.array([[5, 0], [47, 5]])
  np.testing.assert_array_equal(_embed(tokens, table), whole[tokens])
  if q.outliers is None:
    index = np.array([5, 47])
    few = _rows_of_table(table, index)
    assert isinstance(few, leaves.QTensor)
    np.testing.assert_array_equal(_dequantize(few), whole[index])


@pytest.mark.parametrize('bits', [4, 8])
@pytest.mark.parametrize('per', ['row', 'tensor'])
@pytest.mark.parametrize('weights', ['int8', 'int8 group', 'int4', 'int5'])
def test_integers_multiply_integers(bits, per, weights):
  """(q_x s_x) @ w', with the scale of a row of x or of all of it."""
  activation = leaves.Activation(bits=bits, per=per)
  plain, matrix = _quantized(weights)
  q = dataclasses.replace(plain, activation=activation)
  x = _normal(1, 3, 64) * np.float32([[1], [2], [9]])
  largest = 2 ** (bits - 1) - 1
  axes = 1 if per == 'row' else (0, 1)
  scales = np.abs(np.asarray(x)).max(axes, keepdims=True) / largest
  rounded = np.round(np.asarray(x) / scales) * scales
  expected = rounded @ matrix
  got = np.asarray(_linear(x, q))
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
  # That is not the product of floats.
  assert np.abs(got - np.asarray(_linear(x, plain))).max() > 1e-3


def test_a_calibrated_scale_of_x_is_used_as_it_is_and_clips():
  q, matrix = _quantized('int8')
  q = dataclasses.replace(q, activation=leaves.Activation())
  x = np.ones((2, 64), np.float32)
  x[1, 3] = 100
  static = dataclasses.replace(q, x_scale=np.float32(0.1))
  clipped = np.minimum(x, 12.7)
  np.testing.assert_allclose(_linear(x, static), clipped @ matrix, rtol=1e-4)


def test_outlying_columns_of_x_are_multiplied_in_floats():
  q, matrix = _quantized('int8')
  x = _normal(1, 4, 64)
  x[2, 7] = 80

  def error(activation):
    got = _linear(x, dataclasses.replace(q, activation=activation))
    return np.abs(np.asarray(got) - x @ matrix).mean()

  kept = error(leaves.Activation(threshold=6.0))
  lost = error(leaves.Activation())
  assert kept < lost / 3


def test_inputs_are_scaled_first():
  q, _ = _quantized('int8')
  scales = np.linspace(0.5, 2, 64, dtype=np.float32)
  x = _normal(1, 4, 64)
  np.testing.assert_allclose(
    _linear(x, dataclasses.replace(q, input_scales=scales)),
    _linear(x * scales, q),
    atol=1e-5,
  )


@pytest.mark.parametrize('method', ['int4', 'int5', 'NF4', 'GOBO'])
def test_gradients_reach_x_through_a_quantized_weight(method):
  """What LoRA over a quantized model needs."""
  q, matrix = _quantized(method)
  x, pull = _normal(1, 3, 64), _normal(2, 3, 48)
  loss = lambda x: jnp.sum(linear.linear(x, q) * pull)
  got = jax.jit(jax.grad(loss))(x)
  np.testing.assert_allclose(got, pull @ matrix.T, atol=1e-4)


def _weight_and_rows_of_peers():
  return (
    np.array(jax.random.normal(jax.random.key(seed), shape))
    for seed, shape in enumerate([(256, 128), (6, 256)])
  )


@pytest.mark.peers
def test_dynamic_int8_is_that_of_torchao():
  """Rows of x and columns of W, symmetric: bounds of 127 and 127.5."""
  import torch
  from torchao import quantization as torchao

  w, x = _weight_and_rows_of_peers()
  layer = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False))
  layer[0].weight.data = torch.tensor(w.T.copy())
  torchao.quantize_(layer, torchao.Int8DynamicActivationInt8WeightConfig())
  with torch.inference_mode():
    theirs = layer(torch.tensor(x)).numpy()
  q = Integers(activation=leaves.Activation())(jnp.asarray(w))
  ours = np.asarray(linear.linear(jnp.asarray(x), q))
  exact = x.astype(np.float64) @ w
  error = lambda y: np.sqrt(np.mean((y - exact) ** 2))
  assert 0.8 < error(ours) / error(theirs) < 1.25
  np.testing.assert_allclose(ours, theirs, atol=8 * error(theirs))


@pytest.mark.peers
def test_outlier_decomposition_is_that_of_bitsandbytes():
  from bitsandbytes import functional as bnb
  import torch

  w, x = _weight_and_rows_of_peers()
  x[2, 7], x[4, 100] = 60.0, -9.0
  half = torch.tensor(x, dtype=torch.float16)
  _, _, columns = bnb.int8_vectorwise_quant(half, threshold=6.0)
  assert sorted(columns.tolist()) == [7, 100]
  kept = np.isin(np.arange(256), [7, 100])
  values, scales, _ = bnb.int8_vectorwise_quant(
    torch.tensor(np.where(kept, 0, x), dtype=torch.float16)
  )
  rows, w_scales, _ = bnb.int8_vectorwise_quant(
    torch.tensor(w.T.copy(), dtype=torch.float16)
  )
  regular = bnb.int8_linear_matmul(values, rows)
  theirs = bnb.int8_mm_dequant(regular, scales, w_scales).numpy()
  restored = rows.numpy() * w_scales.numpy()[:, None] / 127
  theirs = theirs + x[:, kept] @ restored.T[kept]
  q = Integers(activation=leaves.Activation(threshold=6.0))(jnp.asarray(w))
  ours = np.asarray(linear.linear(jnp.asarray(x), q))
  exact = x.astype(np.float64) @ w
  # They compute in float16.
  assert np.abs(ours - exact).mean() < 1.05 * np.abs(theirs - exact).mean()
  # A weight that rounds the other way counts up to 60 times.
  assert (np.abs(ours - theirs) > 0.6).mean() < 0.01
