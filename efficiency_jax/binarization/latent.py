"""Optax transformations for the real weights behind binary ones.

    optimizer = optax.chain(
      optax.scale_by_adam(),
      latent.scale_by_fans(),
      optax.scale_by_learning_rate(rate),
      latent.clip(),
    )

A binary weight is the sign of a latent one. Updates of latent weights are real
and small, and change a sign now and then (arXiv 1511.00363, 1602.02830).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


def clip() -> optax.GradientTransformation:
  """Keeps matrices within [-1, 1] after the update: the last of a chain.

  A latent weight beyond would be further from its step without being more of a
  sign, and where the pseudo-gradient is clipped it could never come back.
  Vectors, of normalization, are left alone.
  """

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('latent.clip needs the parameters: pass them to update.')

    def one(u, p):
      # p + (1 - p) is rounded twice and still no more than 1: the difference
      # is off by at most 2^-24, half of what lies between 1 and its neighbour.
      return u if p.ndim < 2 else jnp.clip(p + u, -1, 1) - p

    return jax.tree.map(one, updates, params), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_fans(rounded: bool = False) -> optax.GradientTransformation:
  """Multiplies updates of matrices by sqrt((fan_in + fan_out) / 1.5).

  One over the scale of Glorot's initialization: latent weights begin in [-1, 1]
  whatever the layer, and move in proportion (the code of arXiv 1511.00363 calls
  it W_LR_scale). A kernel is [fan_in, fan_out], of a convolution [height,
  width, channels in, channels out]. If `rounded`, the factor is the nearest
  power of two.
  """

  def update(updates, state, params=None):
    del params

    def scale(u):
      if u.ndim < 2:
        return u
      factor = (sum(_fans(u.shape)) / 1.5) ** 0.5
      return u * (power_of_two(factor) if rounded else factor)

    return jax.tree.map(scale, updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _fans(shape: tuple[int, ...]) -> tuple[int, int]:
  *window, fan_in, fan_out = shape
  taps = 1
  for size in window:
    taps *= size
  return taps * fan_in, taps * fan_out


class BopState(NamedTuple):
  """Moving averages of the gradients."""

  mean: optax.Params


def bop(
  threshold: float = 1e-8, decay: float = 1e-4
) -> optax.GradientTransformation:
  """Binary optimizer (arXiv 1906.02107): weights are signs, and are flipped.

      m <- (1 - decay) m + decay g
      w <- -w   where |m| > threshold and sign(m) = sign(w)

  A gradient that keeps pointing against a weight turns it; there is no learning
  rate. Vectors get no update: give them another optimizer with
  `optax.partition`.
  """

  def init(params):
    return BopState(jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    if params is None:
      raise ValueError('latent.bop needs the parameters: pass them to update.')
    mean = jax.tree.map(
      lambda m, g: (1 - decay) * m + decay * g, state.mean, updates
    )

    def one(m, w):
      flip = (jnp.abs(m) > threshold) & (jnp.sign(m) == jnp.sign(w))
      return jnp.where(flip & (w.ndim > 1), -2 * w, jnp.zeros_like(w))

    return jax.tree.map(one, mean, params), BopState(mean)

  return optax.GradientTransformation(init, update)


class ShiftAdaMaxState(NamedTuple):
  """Updates so far, mean of gradients, and largest recent |gradient|."""

  count: jax.Array
  mean: optax.Params
  largest: optax.Params


def shift_adamax(
  learning_rate: float = 2.0**-10,
  beta1: float = 1 - 2.0**-3,
  beta2: float = 1 - 2.0**-10,
) -> optax.GradientTransformation:
  """AdaMax that multiplies by powers of two alone (arXiv 1602.02830, alg. 4).

      m <- b1 m + (1 - b1) g
      v <- max(b2 v, |g|)
      w <- w - AP2(rate / (1 - b1^t)) m AP2(1 / v)

  AP2 is the nearest power of two (`power_of_two`), so that its products are
  shifts.
  """

  def init(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return ShiftAdaMaxState(jnp.int32(0), zeros(), zeros())

  def update(updates, state, params=None):
    del params
    count = state.count + 1
    mean = jax.tree.map(
      lambda m, g: beta1 * m + (1 - beta1) * g, state.mean, updates
    )
    largest = jax.tree.map(
      lambda v, g: jnp.maximum(beta2 * v, jnp.abs(g)), state.largest, updates
    )
    rate = power_of_two(
      learning_rate / (1 - beta1 ** count.astype(jnp.float32))
    )

    def one(m, v):
      # Where there never was a gradient there is no mean of any.
      inverse = power_of_two(1 / jnp.where(v > 0, v, 1))
      return (-rate * m * inverse).astype(m.dtype)

    new = jax.tree.map(one, mean, largest)
    return new, ShiftAdaMaxState(count, mean, largest)

  return optax.GradientTransformation(init, update)


def power_of_two(x: jax.Array) -> jax.Array:
  """AP2(x) = sign(x) 2^round(log2 |x|), and AP2(0) = 0 (arXiv 1602.02830)."""
  x = jnp.asarray(x)
  size = jnp.abs(x)
  exponent = jnp.round(jnp.log2(jnp.where(size > 0, size, 1)))
  power = jnp.ldexp(jnp.ones_like(x), exponent.astype(jnp.int32))
  return jnp.sign(x) * power
