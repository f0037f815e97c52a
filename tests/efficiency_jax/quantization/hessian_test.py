"""Eigenvalues against the whole Hessian, and budgets that are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.quantization import hessian

pytestmark = pytest.mark.short

_A, _B = (
  jax.random.normal(jax.random.key(i), shape)
  for i, shape in enumerate([(5, 5), (3, 3)])
)


def _loss(params, batch):
  """Quadratic in each, with a term between them that must not count."""
  a, b = params['a'], params['b']['kernel']
  return (
    batch * 0.5 * a @ (_A + _A.T) @ a
    + 0.5 * b @ (_B @ _B.T) @ b
    + 10 * jnp.sum(a) * jnp.sum(b)
  )


_PARAMS = {'a': jnp.ones(5), 'b': {'kernel': jnp.ones(3)}}
_GROUPS = {'first': '^a$', 'second': 'kernel'}


def test_eigenvalues_are_those_of_the_block_of_the_hessian():
  found = hessian.top_eigenvalues(
    _loss, _PARAMS, _GROUPS, [1.0, 2.0, -1.0], iterations=300
  )
  of_a = np.linalg.eigvalsh(_A + _A.T)
  largest = of_a[np.abs(of_a).argmax()]
  np.testing.assert_allclose(
    found['first'], np.array([1, 2, -1]) * largest, rtol=1e-4
  )
  of_b = np.linalg.eigvalsh(_B @ _B.T)
  np.testing.assert_allclose(found['second'], of_b.max(), rtol=1e-4)


def test_a_flat_loss_has_eigenvalue_zero():
  flat = lambda params, batch: jnp.sum(params['a']) * batch
  found = hessian.top_eigenvalues(flat, _PARAMS, _GROUPS, [1.0])
  assert found['first'] == found['second'] == [0.0]


def test_sensitivity_is_mean_and_spread():
  values = np.array([-3.0, -1.0])
  assert hessian.sensitivity(values) == 2 + 1


def test_the_most_sensitive_get_more_bits_within_the_budget():
  bits = hessian.allocate(
    {'a': 5.0, 'b': 9.0, 'c': 1.0, 'd': 4.0},
    {'a': 100, 'b': 100, 'c': 100, 'd': 100},
    few=2,
    many=4,
    mean_bits=3.0,
  )
  assert bits == {'b': 4, 'a': 4, 'd': 2, 'c': 2}
  # A large group that does not fit leaves room for a small one.
  bits = hessian.allocate(
    {'a': 5.0, 'b': 9.0, 'c': 1.0},
    {'a': 300, 'b': 100, 'c': 100},
    few=2,
    many=3,
    mean_bits=2.4,
  )
  assert bits == {'b': 3, 'a': 2, 'c': 3}


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (
      lambda: hessian.top_eigenvalues(_loss, _PARAMS, {'x': 'nothing'}, [1.0]),
      "group 'x': 'nothing' matches no path",
    ),
    (
      lambda: hessian.top_eigenvalues(
        lambda p, b: jnp.sum(p['a'] ** 2) * jnp.inf, _PARAMS, _GROUPS, [1.0]
      ),
      'is not finite',
    ),
    (
      lambda: hessian.allocate({'a': 1.0}, {}, few=2, many=4, mean_bits=3),
      'the same groups',
    ),
    (
      lambda: hessian.allocate(
        {'a': 1.0}, {'a': 1}, few=2, many=4, mean_bits=5
      ),
      'between 2 and 4, got 5',
    ),
  ],
)
def test_what_cannot_be_done_is_said(call, message):
  with pytest.raises(ValueError, match=message):
    call()
