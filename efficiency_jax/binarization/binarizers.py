"""Functions to one bit, and the gradients that stand in for theirs.

A step function has slope zero wherever it has one, so that nothing before it
would learn. Training goes on all the same if the backward pass takes another
slope, as if the step were a gentler function (straight-through estimator, arXiv
1308.3432; binarized networks, arXiv 1602.02830):

    forward     y = f(x)
    backward    dL/dx = dL/dy p(x)         p is the pseudo-gradient

Only this slope is replaced: gradients and the weights that they change are real
numbers. All functions work on arrays of any shape, element by element.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

Binarizer = Callable[[jax.Array], jax.Array]


def straight_through(forward: Binarizer, slope: Binarizer) -> Binarizer:
  """`forward`, with the pseudo-gradient `slope`.

  Args:
    forward: x [...] to y [...], element by element.
    slope: p(x) [...], what dL/dy is multiplied by.
  """

  @jax.custom_vjp
  def function(x):
    return forward(x)

  def remember(x):
    return forward(x), x

  def backward(x, gradient):
    return (gradient * slope(x).astype(gradient.dtype),)

  function.defvjp(remember, backward)
  return function


def _sign(x: jax.Array) -> jax.Array:
  # Zero is +1, as `pack_signs` has it; `jnp.sign` would leave it zero.
  return jnp.where(x >= 0, 1, -1).astype(x.dtype)


def _within(x: jax.Array, bound: float | jax.Array = 1.0) -> jax.Array:
  return (jnp.abs(x) <= bound).astype(x.dtype)


def sign(x: jax.Array) -> jax.Array:
  """y = +1 if x >= 0 else -1;  p = 1 if |x| <= 1 else 0.

  p is the slope of the hard tanh: a number that is far from the step is left
  where it is. This is the binarizer of arXiv 1602.02830.
  """
  return _SIGN(x)


def sign_unclipped(x: jax.Array) -> jax.Array:
  """y = +1 if x >= 0 else -1;  p = 1.

  The first straight-through estimator (arXiv 1308.3432), kept to compare: the
  paper on binarized networks reports that without the clip training is worse.
  """
  return _SIGN_UNCLIPPED(x)


def approx_sign(x: jax.Array) -> jax.Array:
  """y = +1 if x >= 0 else -1;  p = max(0, 2 - 2 |x|).

  p is the slope of a parabola on each side of the step (Bi-Real Net, arXiv
  1808.00278).
  """
  return _APPROX_SIGN(x)


def swish_sign(x: jax.Array, beta: float = 5.0) -> jax.Array:
  """y = +1 if x >= 0 else -1;  p = b (2 - b x tanh(b x / 2)) / (1 + cosh(b x)).

  p is the slope of 2 s (1 + b x (1 - s)) - 1, s = sigmoid(b x), and negative
  far from the step (arXiv 1812.11800).
  """
  return _swish_sign(beta)(x)


def ternary(x: jax.Array, threshold: float | None = None) -> jax.Array:
  """y = +1 if x > t, -1 if x < -t, else 0;  p = 1 if |x| <= 1 else 0.

  Args:
    x: Any numbers.
    threshold: t; None is 0.7 times the mean of |x|, which is near the best for
      Gaussian x (ternary weight networks, arXiv 1605.04711). It counts as a
      constant.
  """
  if threshold is None:
    threshold = 0.7 * jnp.abs(x).mean()
  return _ternary(x, jnp.asarray(threshold, x.dtype))


def dorefa(x: jax.Array, bits: int) -> jax.Array:
  """y = round(n c) / n, c = min(max(x, 0), 1);  p = 1 if 0 <= x <= 1 else 0.

  n is 2^bits - 1: activations of few bits (DoReFa-Net, arXiv 1606.06160).

  Raises:
    ValueError: `bits` is not in 1..16.
  """
  if not 1 <= bits <= 16:
    raise ValueError(f'bits must be in 1..16, got {bits}.')
  return _dorefa(bits)(x)


def hard_sigmoid(x: jax.Array) -> jax.Array:
  """min(max((x + 1) / 2, 0), 1): how likely `stochastic_sign` is +1."""
  return jnp.clip((x + 1) / 2, 0, 1)


def stochastic_sign(x: jax.Array, key: jax.Array) -> jax.Array:
  """y = +1 with probability hard_sigmoid(x), else -1;  p as that of `sign`.

  The mean of y is x within [-1, 1] (arXiv 1511.00363, section 2.3).

  Args:
    x: Any numbers.
    key: Another key draws otherwise; the same one draws the same.
  """
  drawn = jax.random.uniform(key, x.shape, jnp.float32)
  return _stochastic(x, drawn)


@jax.custom_vjp
def _stochastic(x: jax.Array, drawn: jax.Array) -> jax.Array:
  # A uniform number is below 1 always, and at least 0: both ends are certain.
  return jnp.where(drawn < hard_sigmoid(x), 1, -1).astype(x.dtype)


_stochastic.defvjp(
  lambda x, drawn: (_stochastic(x, drawn), x),
  lambda x, gradient: (gradient * _within(x).astype(gradient.dtype), None),
)


@jax.custom_vjp
def _ternary(x: jax.Array, threshold: jax.Array) -> jax.Array:
  return (jnp.sign(x) * (jnp.abs(x) > threshold)).astype(x.dtype)


_ternary.defvjp(
  lambda x, threshold: (_ternary(x, threshold), x),
  lambda x, gradient: (gradient * _within(x).astype(gradient.dtype), None),
)

_SIGN = straight_through(_sign, _within)
_SIGN_UNCLIPPED = straight_through(_sign, jnp.ones_like)
_APPROX_SIGN = straight_through(
  _sign, lambda x: jnp.maximum(0, 2 - 2 * jnp.abs(x))
)


@functools.cache
def _swish_sign(beta: float) -> Binarizer:
  def slope(x):
    v = beta * x
    # 1 / (1 + cosh v) = 2 s (1 - s), s = sigmoid(v), which does not overflow.
    s = jax.nn.sigmoid(v)
    return beta * (2 - v * jnp.tanh(v / 2)) * 2 * s * (1 - s)

  return straight_through(_sign, slope)


@functools.cache
def _dorefa(bits: int) -> Binarizer:
  most = 2**bits - 1
  forward = lambda x: jnp.round(most * jnp.clip(x, 0, 1)) / most
  slope = lambda x: ((x >= 0) & (x <= 1)).astype(x.dtype)
  return straight_through(forward, slope)
