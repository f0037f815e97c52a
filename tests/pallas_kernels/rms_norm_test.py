"""Tests of RMS norms of a few rows."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu as cpu
from pallas_kernels.rms_norm import api

pytestmark = pytest.mark.short
compiled = pytest.mark.skipif(bool(cpu.missing()), reason=str(cpu.missing()))
NAMES = ('blockwise', pytest.param('llvm_cpu', marks=compiled))


def _operands(*shape):
  rng = np.random.default_rng(sum(shape))
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return 3 * draw(*shape), draw(shape[-1])


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('shape', [(16,), (1, 48), (3, 5, 64), (1100, 16)])
def test_it_is_the_formula(name, shape):
  x, scale = _operands(*shape)
  found = api.rms_norm(x, scale, epsilon=0.25, implementation=name)
  exact = np.asarray(x, np.float64)
  root = np.sqrt((exact**2).mean(-1, keepdims=True) + 0.25)
  np.testing.assert_allclose(found, exact / root * scale, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_zeros_stay_zeros_and_nan_stays_in_its_row(name):
  x, scale = _operands(3, 32)
  x = x.at[0].set(0).at[1, 5].set(jnp.nan)
  found = api.rms_norm(x, scale, epsilon=1e-5, implementation=name)
  assert (found[0] == 0).all()
  assert jnp.isnan(found[1]).all()
  assert jnp.isfinite(found[2]).all()


@compiled
@pytest.mark.parametrize('width', [16, 80, 576])
def test_the_bits_of_a_row_do_not_depend_on_the_others(width):
  x, scale = _operands(48, width)
  norm = jax.jit(lambda x: api.rms_norm(x, scale, epsilon=1e-5))
  together = norm(x)
  for rows in (1, 3, 8, 16):
    parts = [norm(x[i : i + rows]) for i in range(0, 48, rows)]
    np.testing.assert_array_equal(jnp.concatenate(parts), together)


@compiled
def test_gradients_are_those_of_the_formula():
  x, scale = _operands(4, 32)
  weights = jnp.cos(jnp.arange(4 * 32.0)).reshape(4, 32)

  def loss(name, x, scale):
    out = api.rms_norm(x, scale, epsilon=1e-5, implementation=name)
    return jnp.sum(jnp.sin(out) * weights)

  found, expected = (
    jax.grad(loss, argnums=(1, 2))(name, x, scale)
    for name in ('llvm_cpu', 'blockwise')
  )
  chex.assert_trees_all_close(found, expected, atol=1e-5)


@compiled
def test_the_platform_chooses():
  x, scale = _operands(4, 32)
  traced = jax.jit(lambda x: api.rms_norm(x, scale, epsilon=1e-5)).trace(x)
  lower = lambda platform: traced.lower(
    lowering_platforms=(platform,)
  ).as_text()
  assert 'llvm_cpu_' in lower('cpu')
  assert 'llvm_cpu_' not in lower('tpu')


def test_half_precision_is_computed_in_float32():
  x, scale = _operands(2, 64)
  narrow = api.rms_norm(x.astype(jnp.bfloat16), scale, epsilon=0.0)
  assert narrow.dtype == jnp.bfloat16
  wide = api.rms_norm(
    x.astype(jnp.bfloat16).astype(jnp.float32), scale, epsilon=0.0
  )
  np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize('shape', [(0, 16), (3, 0), (2, 0, 32)])
def test_nothing_has_no_norm(shape):
  x, scale = jnp.ones(shape), jnp.ones(shape[-1])
  assert api.rms_norm(x, scale, epsilon=1.0).shape == shape


def test_what_does_not_fit_is_refused():
  x, scale = _operands(2, 16)
  for wrong, message in ((scale[:3], r'must be \[D\]'), (x, r'must be \[D\]')):
    with pytest.raises(ValueError, match=message):
      api.rms_norm(x, wrong, epsilon=0.0)
  with pytest.raises(ValueError, match='epsilon must be >= 0, got -1'):
    api.rms_norm(x, scale, epsilon=-1)


@compiled
@pytest.mark.parametrize(
  ('x', 'message'),
  [
    (jnp.ones((2, 20)), '2 rows of 20 numbers do not fill vectors'),
    (jnp.ones((0, 16)), '0 rows of 16'),
    (jnp.ones((2, 16), jnp.bfloat16), 'the dtype is bfloat16'),
  ],
)
def test_what_the_kernel_does_not_take_is_said(x, message):
  with pytest.raises(NotImplementedError, match=message):
    api.rms_norm(
      x, jnp.ones(x.shape[-1]), epsilon=0.0, implementation='llvm_cpu'
    )
