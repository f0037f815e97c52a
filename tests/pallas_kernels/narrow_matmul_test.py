"""Tests of products of a few rows and a matrix."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu as cpu
from pallas_kernels.narrow_matmul import api
from pallas_kernels.narrow_matmul import llvm_cpu

pytestmark = [
  pytest.mark.short,
  pytest.mark.skipif(bool(cpu.missing()), reason=str(cpu.missing())),
]


def _operands(rows, inner, columns, transposed):
  rng = np.random.default_rng(rows * inner + columns)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  shape = (columns, inner) if transposed else (inner, columns)
  return draw(rows, inner), draw(*shape)


def _exact(x, w, transposed):
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  return x @ (w.T if transposed else w)


@pytest.mark.parametrize('transposed', [False, True])
@pytest.mark.parametrize('rows', [1, 2, 3, 8, 9, 17, 32])
@pytest.mark.parametrize(('inner', 'columns'), [(32, 16), (48, 4096)])
def test_the_kernel_is_the_product(rows, inner, columns, transposed):
  """Some sizes leave tiles of one row over, or have more parts than cores."""
  x, w = _operands(rows, inner, columns, transposed)
  found = api.narrow_matmul(
    x, w, transposed=transposed, implementation='llvm_cpu'
  )
  expected = _exact(x, w, transposed)
  # sqrt(K) roundings of 2^-24 each, of terms of size 1.
  np.testing.assert_allclose(found, expected, atol=3e-5)


@pytest.mark.parametrize('inner', [1, 13, 75])
def test_lines_may_be_any_number(inner):
  """Those of 75 are read five side by side, those of 13 one by one."""
  x, w = _operands(3, inner, 160, False)
  found = api.narrow_matmul(x, w, implementation='llvm_cpu')
  np.testing.assert_allclose(found, _exact(x, w, False), atol=3e-5)


def test_rows_do_not_depend_on_each_other():
  """Row for row the same bits, whatever stands beside it in its group."""
  x, w = _operands(8, 64, 160, False)
  together = api.narrow_matmul(x, w, implementation='llvm_cpu')
  turned = api.narrow_matmul(x[::-1], w, implementation='llvm_cpu')
  np.testing.assert_array_equal(together, turned[::-1])


@pytest.mark.parametrize(
  ('inner', 'transposed'), [(48, False), (75, False), (464, False), (48, True)]
)
def test_the_bits_of_a_row_do_not_depend_on_how_many_there_are(
  inner, transposed, monkeypatch
):
  """Parts of the work are more where there are more rows."""
  monkeypatch.setattr(llvm_cpu, '_SUMS', 512)
  x, w = _operands(32, inner, 160, transposed)
  run = lambda x: api.narrow_matmul(
    x, w, transposed=transposed, implementation='llvm_cpu'
  )
  together = run(x)
  for rows in (1, 2, 5, 16):
    for first in range(0, 32 - rows + 1, rows):
      part = slice(first, first + rows)
      np.testing.assert_array_equal(run(x[part]), together[part])


@pytest.mark.parametrize('transposed', [False, True])
def test_an_empty_sum_is_zero(transposed):
  x, w = _operands(3, 0, 16, transposed)
  found = api.narrow_matmul(x, w, transposed=transposed)
  np.testing.assert_array_equal(found, np.zeros((3, 16)))


def test_a_table_may_have_any_number_of_rows():
  """1,001 columns fit no tile of several; untransposed they fill no vectors."""
  x, w = _operands(5, 64, 1001, True)
  found = api.narrow_matmul(x, w, transposed=True, implementation='llvm_cpu')
  np.testing.assert_allclose(found, _exact(x, w, True), atol=3e-5)
  with pytest.raises(NotImplementedError, match='does not fill vectors'):
    api.narrow_matmul(x, w.T, implementation='llvm_cpu')


@pytest.mark.parametrize('transposed', [False, True])
def test_gradients_are_those_of_the_product(transposed):
  x, w = _operands(4, 32, 48, transposed)
  weights = jnp.cos(jnp.arange(4 * 48.0)).reshape(4, 48)

  def loss(implementation, x, w):
    out = api.narrow_matmul(
      x, w, transposed=transposed, implementation=implementation
    )
    return jnp.sum(jnp.sin(out) * weights)

  found, expected = (
    jax.grad(loss, argnums=(1, 2))(name, x, w)
    for name in ('llvm_cpu', 'blockwise')
  )
  chex.assert_trees_all_close(found, expected, atol=1e-4)


def test_the_platform_chooses():
  """On a CPU the kernel, elsewhere XLA's own product."""
  x, w = _operands(4, 32, 48, False)
  traced = jax.jit(api.narrow_matmul).trace(x, w)
  here = traced.lower(lowering_platforms=('cpu',)).as_text()
  there = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert 'llvm_cpu_' in here
  assert 'llvm_cpu_' not in there
  wide = jax.jit(api.narrow_matmul).trace(jnp.ones((33, 32)), w)
  assert 'llvm_cpu_' not in wide.lower().as_text()


@pytest.mark.parametrize(
  ('x', 'w', 'message'),
  [
    (jnp.ones((33, 16)), jnp.ones((16, 16)), '33 rows are more than 32'),
    (jnp.ones((2, 16)), jnp.ones((16, 24)), 'does not fill vectors'),
    (jnp.ones((2, 16)), jnp.ones((16, 16), jnp.bfloat16), 'not float32'),
  ],
)
def test_what_the_kernel_does_not_take(x, w, message):
  with pytest.raises(NotImplementedError, match=message):
    api.narrow_matmul(x, w, implementation='llvm_cpu')


def test_shapes_that_do_not_multiply():
  with pytest.raises(ValueError, match='do not multiply'):
    api.narrow_matmul(jnp.ones((2, 3)), jnp.ones((4, 5)))
  with pytest.raises(ValueError, match='do not multiply'):
    api.narrow_matmul(jnp.ones((2, 3)), jnp.ones((3, 5)), transposed=True)
