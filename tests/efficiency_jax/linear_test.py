"""The one matrix product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax import linear


def _arrays(dtype, rows=3):
  x, kernel, bias = (
    jax.random.normal(jax.random.key(i), shape).astype(dtype)
    for i, shape in enumerate([(rows, 32), (32, 24), (24,)])
  )
  return x, kernel, bias


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_linear_is_the_product_rounded_once(dtype):
  x, kernel, bias = _arrays(dtype)
  exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
  exact = exact + np.asarray(bias, np.float64)
  got = jax.jit(linear.linear)(x, kernel, bias)
  assert got.dtype == dtype
  rounded = jnp.asarray(exact, jnp.float32).astype(dtype)
  # One unit in the last place of the result: sums are in float32.
  np.testing.assert_allclose(
    np.asarray(got, np.float64),
    np.asarray(rounded, np.float64),
    rtol=float(jnp.finfo(dtype).eps),
    atol=1e-5,
  )
  without = linear.linear(x, kernel)
  np.testing.assert_array_equal(
    without, linear.linear(x, kernel, jnp.zeros_like(bias))
  )


def test_leading_axes_are_kept():
  x, kernel, _ = _arrays(jnp.float32, rows=6)
  y = linear.linear(x.reshape(2, 3, 32), kernel)
  assert y.shape == (2, 3, 24)
  np.testing.assert_allclose(
    y.reshape(6, 24), linear.linear(x, kernel), rtol=1e-6
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_one_row_alone_is_one_of_two(dtype):
  """The padding that keeps narrow weights narrow changes no bit."""
  x, kernel, _ = _arrays(dtype, rows=2)
  for product in (linear.linear, lambda x, k: linear.logits_from_table(x, k.T)):
    product = jax.jit(product)
    both, alone = product(x, kernel), product(x[:1], kernel)
    assert alone.shape == (1, 24)
    if dtype == jnp.bfloat16:
      np.testing.assert_array_equal(alone, both[:1])
    else:
      np.testing.assert_allclose(alone, both[:1], atol=1e-5)


def test_one_narrow_row_converts_no_weight():
  x, kernel, _ = _arrays(jnp.bfloat16, rows=1)
  program = jax.jit(linear.linear).lower(x, kernel).compile().as_text()
  assert 'f32[32,24]' not in program


def test_logits_score_every_row_of_the_table_in_float32():
  x, kernel, _ = _arrays(jnp.bfloat16)
  logits = linear.logits_from_table(x[None], kernel.T)
  assert logits.shape == (1, 3, 24)
  assert logits.dtype == jnp.float32
  exact = np.asarray(x, np.float32) @ np.asarray(kernel, np.float32)
  np.testing.assert_allclose(logits[0], exact, atol=1e-4)


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
  got = jax.jit(linear.linear)(jnp.float32(row), jnp.float32(weight))
  np.testing.assert_allclose(got, row @ weight, rtol=1e-5, atol=1e-6)
  # Twice the row is not one row: the ordinary product.
  both = linear.linear(jnp.float32([row[0], row[0]]), jnp.float32(weight))
  np.testing.assert_allclose(both[:1], got, rtol=1e-5, atol=1e-6)


def test_one_row_does_not_widen_a_narrow_weight():
  row = jax.ShapeDtypeStruct((1, 64), jnp.float32)
  weight = jax.ShapeDtypeStruct((64, 31), jnp.bfloat16)
  traced = str(jax.make_jaxpr(linear.linear)(row, weight))
  assert 'f32[64,31]' not in traced
  assert 'f32[4,16,31]' not in traced
