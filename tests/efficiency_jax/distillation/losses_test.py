"""Losses of distillation against float64 numpy and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.distillation import losses

_SHAPE = (3, 4, 7)


def _softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _kl(p, q):
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(-1)


_FORMULAS = {
  'forward_kl': _kl,
  'reverse_kl': lambda p, q: _kl(q, p),
  'jensen_shannon': lambda p, q: (
    _kl(p, (p + q) / 2) / 2 + _kl(q, (p + q) / 2) / 2
  ),
  'total_variation': lambda p, q: np.abs(p - q).sum(-1) / 2,
  'cross_entropy': lambda p, q: _kl(p, q) - _kl(p, np.ones_like(p)),
}


def _logits(seed, forbidden=()):
  logits = 2 * np.random.default_rng(seed).standard_normal(_SHAPE)
  logits[..., list(forbidden)] = -np.inf
  return logits


def _case(seed, **options):
  return jnp.asarray(_logits(seed, **options), jnp.float32)


@pytest.mark.parametrize('name', list(losses.LOSSES))
@pytest.mark.parametrize('forbidden', [(), (2, 5)])
@pytest.mark.parametrize('temperature', [1.0, 2.5])
def test_a_loss_is_its_formula(name, forbidden, temperature):
  teacher, student = _logits(0, forbidden), _logits(1, forbidden)
  mask = np.random.default_rng(2).integers(0, 3, _SHAPE[:2]).astype(float)
  p, q = _softmax(teacher / temperature), _softmax(student / temperature)
  values = _FORMULAS[name](p, q)
  loss = jax.jit(losses.named(name), static_argnames=('temperature', 'squared'))
  args = [jnp.asarray(x, jnp.float32) for x in (teacher, student)]
  got = loss(*args, temperature=temperature)
  np.testing.assert_allclose(got, values.mean(), rtol=2e-5)
  right = (values * mask).sum() / mask.sum()
  got = loss(*args, jnp.asarray(mask), temperature=temperature)
  np.testing.assert_allclose(got, right, rtol=2e-5)
  got = loss(*args, jnp.asarray(mask), temperature=temperature, squared=True)
  np.testing.assert_allclose(got, right * temperature**2, rtol=2e-5)
  # Log-probabilities are logits.
  if temperature == 1:
    logs = [jax.nn.log_softmax(x) for x in args]
    np.testing.assert_allclose(loss(*logs), values.mean(), rtol=2e-5)


@pytest.mark.parametrize('name', list(losses.LOSSES))
def test_gradients_are_finite_and_right(name):
  """Against differences of the formula, with tokens of probability zero."""
  teacher, student = _logits(0, (2,)), _logits(1, (2,))
  grads = jax.grad(losses.named(name), argnums=(0, 1))(
    jnp.asarray(teacher, jnp.float32), jnp.asarray(student, jnp.float32)
  )
  direction = np.random.default_rng(3).standard_normal((2, *_SHAPE))
  step = 1e-6
  for which, grad in enumerate(grads):
    assert np.isfinite(grad).all()
    ends = []
    for sign in (1, -1):
      logits = [teacher, student]
      logits[which] = logits[which] + sign * step * direction[which]
      ends.append(_FORMULAS[name](*map(_softmax, logits)).mean())
    slope = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(
      (np.asarray(grad) * direction[which]).sum(), slope, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize('name', ['forward_kl', 'cross_entropy'])
@pytest.mark.parametrize('squared', [False, True])
def test_the_gradient_of_forward_kl_is_q_minus_p(name, squared):
  teacher, student = _logits(0), _logits(1)
  t = 2.0
  got = jax.grad(losses.named(name), argnums=1)(
    _case(0), _case(1), temperature=t, squared=squared
  )
  right = _softmax(student / t) - _softmax(teacher / t)
  right *= (t if squared else 1 / t) / np.prod(_SHAPE[:2])
  np.testing.assert_allclose(got, right, atol=1e-6)


def test_acceptance_is_one_less_the_total_variation():
  p, q = _softmax(_logits(0, (1,))), _softmax(_logits(1, (3, 4)))
  got = losses.acceptance(_case(0, forbidden=(1,)), _case(1, forbidden=(3, 4)))
  np.testing.assert_allclose(got, np.minimum(p, q).sum(-1), rtol=1e-5)


def test_what_lies_outside_a_part_of_the_vocabulary_is_never_accepted():
  """The teacher's first three tokens are a part, and the student's all."""
  whole = _softmax(_logits(0))
  q = _softmax(_logits(1)[..., :3])
  got = losses.acceptance(
    _case(0)[..., :3],
    _case(1)[..., :3],
    coverage=jnp.asarray(whole[..., :3].sum(-1), jnp.float32),
  )
  expected = np.minimum(whole[..., :3], q).sum(-1)
  np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_where_the_student_cannot_go():
  """KL(p || q) is infinite, the other direction and the bounded ones not."""
  teacher, student = _case(0), _case(1, forbidden=(0,))
  assert losses.forward_kl(teacher, student) == np.inf
  for name in ('reverse_kl', 'jensen_shannon', 'total_variation'):
    value, grad = jax.value_and_grad(losses.named(name), argnums=1)(
      teacher, student
    )
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
  np.testing.assert_allclose(
    losses.jensen_shannon(
      _case(0, forbidden=(0, 1, 2)), _case(1, forbidden=(3, 4, 5, 6))
    ),
    np.log(2),
    rtol=1e-6,
  )


def test_equal_distributions_are_at_distance_zero():
  for name in set(losses.LOSSES) - {'cross_entropy'}:
    got = losses.named(name)(_case(0), _case(0) + 3.0)
    np.testing.assert_allclose(got, 0, atol=1e-6)


def test_what_is_masked_does_not_matter():
  mask = jnp.zeros(_SHAPE[:2]).at[0, 1].set(2.0)
  clean = losses.forward_kl(_case(0), _case(1), mask)
  np.testing.assert_allclose(
    clean, losses.forward_kl(_case(0)[0, 1], _case(1)[0, 1]), rtol=1e-6
  )
  dirty = _case(1).at[2].set(jnp.nan)
  assert losses.forward_kl(_case(0), dirty, mask) == clean
  assert losses.forward_kl(_case(0), _case(1), jnp.zeros(_SHAPE[:2])) == 0


def test_wrong_arguments_are_refused():
  with pytest.raises(ValueError, match='temperature must be > 0, got 0'):
    losses.forward_kl(_case(0), _case(1), temperature=0.0)
  with pytest.raises(ValueError, match="loss 'l2' is unknown"):
    losses.named('l2')
