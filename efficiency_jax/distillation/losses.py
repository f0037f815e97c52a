"""How far a student's distribution q is from a teacher's p.

Every loss takes logits (or log-probabilities, which are logits) of teacher and
student [..., V], computes in float32, and gives the mean [] over the places
[...] where `mask` is positive, weighted by it. Tokens of logit -inf have
probability zero. Gradients flow into both arguments: stop those of the teacher
where it is not to learn. `acceptance`, no loss, gives all places.

`temperature` divides both logits (Hinton et al., arXiv 1503.02531). Gradients
then shrink with its square, which `squared` multiplies back in, so that a loss
keeps its weight beside others when the temperature changes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def mean(values: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Mean [] of `values` [...] weighted by `mask` [...]; 0 if it is all zero.

  What stands where the mask is zero does not matter, NaN included.
  """
  if mask is None:
    return jnp.mean(values)
  mask = jnp.broadcast_to(mask, values.shape).astype(jnp.float32)
  total = mask.sum()
  kept = jnp.where(mask > 0, values, 0.0) * mask
  return kept.sum() / jnp.where(total > 0, total, 1.0)


def _distance(pointwise):
  """A function of two log-probabilities [..., V] as a masked mean of logits."""

  def distance(
    teacher: jax.Array,
    student: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    squared: bool = False,
  ) -> jax.Array:
    values = pointwise(
      log_probabilities(teacher, temperature),
      log_probabilities(student, temperature),
    )
    return mean(values * (temperature**2 if squared else 1.0), mask)

  # Not functools.wraps, which would also show the signature of `pointwise`.
  distance.__name__ = distance.__qualname__ = pointwise.__name__
  distance.__doc__ = pointwise.__doc__
  return distance


def log_probabilities(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
  """log softmax(logits / temperature): [..., V] float32.

  Raises:
    ValueError: The temperature is not above 0.
  """
  if not temperature > 0:
    raise ValueError(f'temperature must be > 0, got {temperature}.')
  logits = logits.astype(jnp.float32) / temperature
  return jax.nn.log_softmax(logits, axis=-1)


def _weighted(log_p: jax.Array, *terms: jax.Array) -> jax.Array:
  """sum_v p_v sum(terms_v), where p_v = 0 counts nothing: [..., V] to [...].

  Terms may be infinite there, in value and in gradient.
  """
  live = log_p > -jnp.inf
  terms = [jnp.where(live, term, 0.0) for term in terms]
  return jnp.sum(jnp.where(live, jnp.exp(log_p), 0.0) * sum(terms), axis=-1)


@_distance
def forward_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL(p || q) = sum_v p_v (log p_v - log q_v), of supervised distillation.

  Its gradient with respect to the student's logits is q - p, over the
  temperature (DistillSpec, arXiv 2310.08461). It asks q to cover p.
  """
  return _weighted(log_p, log_p, -log_q)


@_distance
def reverse_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL(q || p): q is punished for what p finds unlikely (arXiv 2310.08461)."""
  return _weighted(log_q, log_q, -log_p)


@_distance
def jensen_shannon(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2 (arXiv 2310.08461).

  At most log 2.
  """
  live = jnp.maximum(log_p, log_q) > -jnp.inf
  log_m = jnp.logaddexp(
    jnp.where(live, log_p, 0.0), jnp.where(live, log_q, 0.0)
  ) - jnp.log(2.0)
  return (_weighted(log_p, log_p, -log_m) + _weighted(log_q, log_q, -log_m)) / 2


@_distance
def total_variation(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """sum_v |p_v - q_v| / 2, the chance that a drafted token is refused.

  Token verification accepts a token of q with the chance sum_v min(p_v, q_v),
  which is one minus this (arXiv 2211.17192, theorem 3.5), so it is what a draft
  is judged by (arXiv 2310.08461; 2602.23881). Its gradient vanishes where q is
  nearly zero: mix it with a cross entropy.
  """
  return jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1) / 2


@_distance
def cross_entropy(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
  """-sum_v p_v log q_v: `forward_kl` plus the entropy of p.

  The gradient for the student is that of `forward_kl` (arXiv 1503.02531).
  """
  return _weighted(log_p, -log_q)


def acceptance(
  teacher: jax.Array,  # [..., V]
  student: jax.Array,  # [..., V]
  coverage: jax.Array | None = None,  # [...]
) -> jax.Array:
  """sum_v min(p_v, q_v) = 1 - total variation at each place: [...] float32.

  Its mean is the alpha of arXiv 2211.17192. Where the logits are those of a
  part of the vocabulary, `coverage` is the probability that the teacher gives
  this part: p sums to it, and what lies outside is never accepted.
  """
  p, q = (jnp.exp(log_probabilities(x)) for x in (teacher, student))
  if coverage is not None:
    p = p * coverage[..., None]
  return jnp.minimum(p, q).sum(-1)


LOSSES: dict[str, Callable[..., jax.Array]] = {
  'forward_kl': forward_kl,
  'reverse_kl': reverse_kl,
  'jensen_shannon': jensen_shannon,
  'total_variation': total_variation,
  'cross_entropy': cross_entropy,
}


def named(name: str) -> Callable[..., jax.Array]:
  """The loss called `name`; a ValueError lists the names there are."""
  if name not in LOSSES:
    raise ValueError(
      f'loss {name!r} is unknown; there are {", ".join(LOSSES)}.'
    )
  return LOSSES[name]
