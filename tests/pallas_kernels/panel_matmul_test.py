"""Tests of products with a matrix in panels."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu as cpu
from pallas_kernels.panel_matmul import api
from pallas_kernels.panel_matmul import llvm_cpu
from pallas_kernels.panel_matmul import reference

pytestmark = pytest.mark.short
_kernel = pytest.mark.skipif(bool(cpu.missing()), reason=str(cpu.missing()))
_IMPLEMENTATIONS = (
  'reference',
  'blockwise',
  pytest.param('llvm_cpu', marks=_kernel),
)


def _operands(rows, inner, columns):
  rng = np.random.default_rng(rows * inner + columns)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return draw(rows, inner), draw(inner, columns)


def _run(x, w, implementation='llvm_cpu'):
  panels = reference.to_panels(w)
  return api.panel_matmul(x, panels, implementation=implementation)


def test_a_panel_is_some_columns_line_by_line():
  matrix = np.arange(2 * 64).reshape(2, 64)
  panels = reference.to_panels(matrix)
  np.testing.assert_array_equal(panels[0], matrix[:, :32])
  np.testing.assert_array_equal(panels[1], matrix[:, 32:])
  np.testing.assert_array_equal(reference.from_panels(panels), matrix)


@pytest.mark.parametrize('shape', [(4, 33), (32,), (1, 2, 32)])
def test_what_has_no_panels(shape):
  with pytest.raises(ValueError, match='a multiple of 32 columns'):
    reference.to_panels(np.zeros(shape))


@pytest.mark.parametrize('implementation', _IMPLEMENTATIONS)
@pytest.mark.parametrize('rows', [1, 2, 11, 12, 13, 25, 32, 100])
@pytest.mark.parametrize(('inner', 'columns'), [(1, 32), (75, 224), (576, 96)])
def test_it_is_the_product(rows, inner, columns, implementation):
  """Groups of one size and of two, fewer panels than parts and more."""
  x, w = _operands(rows, inner, columns)
  found = _run(x, w, implementation)
  expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  # Each of K additions rounds a sum of size sqrt(K) by 2^-24: K at most.
  np.testing.assert_allclose(found, expected, atol=max(3e-6, 2e-7 * inner))


@_kernel
@pytest.mark.parametrize('rows_bytes', [1, 4 * 75 * 24, 2**20])
def test_the_bits_of_a_row_do_not_depend_on_how_many_there_are(
  rows_bytes, monkeypatch
):
  """Not on its group, and not on how groups are cut into parts either."""
  monkeypatch.setattr(llvm_cpu, '_ROWS_BYTES', rows_bytes)
  jax.clear_caches()
  x, w = _operands(97, 75, 160)
  together = _run(x, w)
  for rows in (1, 2, 5, 16, 41):
    for first in range(0, 97 - rows + 1, rows):
      part = slice(first, first + rows)
      np.testing.assert_array_equal(_run(x[part], w), together[part])


@_kernel
def test_nothing_beyond_the_panels_counts():
  """What is asked for ahead of the last panel is no part of the sum."""
  x, w = _operands(3, 48, 64)
  padded = jnp.concatenate(
    [reference.to_panels(w), jnp.full((1, 48, 32), jnp.nan)]
  )
  found = api.panel_matmul(x, padded, implementation='llvm_cpu')
  np.testing.assert_array_equal(found[:, :64], _run(x, w))
  assert np.isnan(found[:, 64:]).all()


@_kernel
def test_gradients_are_those_of_the_product():
  x, w = _operands(4, 40, 96)
  weights = jnp.cos(jnp.arange(4 * 96.0)).reshape(4, 96)

  def loss(x, panels, product):
    return jnp.sum(jnp.sin(product(x, panels)) * weights)

  panels = reference.to_panels(w)
  found = jax.grad(loss, argnums=(0, 1))(
    x, panels, lambda x, p: api.panel_matmul(x, p, implementation='llvm_cpu')
  )
  expected = jax.grad(loss, argnums=(0, 1))(
    x, panels, lambda x, p: x @ reference.from_panels(p)
  )
  chex.assert_trees_all_close(found, expected, atol=1e-4)


@_kernel
def test_the_platform_chooses():
  """On a CPU the kernel for any number of rows, elsewhere XLA's product."""
  x, w = _operands(100, 32, 64)
  traced = jax.jit(api.panel_matmul).trace(x, reference.to_panels(w))
  here = traced.lower(lowering_platforms=('cpu',)).as_text()
  there = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'llvm_cpu_' in here
  assert 'llvm_cpu_' not in there


@_kernel
def test_what_the_kernel_does_not_take():
  x, w = _operands(2, 8, 32)
  with pytest.raises(NotImplementedError, match='not float32'):
    _run(x, w.astype(jnp.bfloat16))
  with pytest.raises(NotImplementedError, match='is empty'):
    _run(x[:0], w)


@pytest.mark.parametrize(
  ('x', 'panels'),
  [((2, 3), (1, 4, 32)), ((2, 3), (1, 3, 16)), ((2, 3), (3, 32))],
)
def test_shapes_that_do_not_multiply(x, panels):
  with pytest.raises(ValueError, match='do not multiply'):
    api.panel_matmul(jnp.ones(x), jnp.ones(panels))
