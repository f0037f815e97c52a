"""Optimizers by name and schedule, and Adam with a state of eight bits."""

from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficiency_jax.training import offload

SCHEDULES = ('constant', 'cosine', 'linear')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW with warm-up, decay and clipping.

  Attributes:
    learning_rate: Its peak, reached after the warm-up.
    steps: Updates of the whole run; a decaying schedule ends there.
    warmup_steps: Updates over which the rate rises from zero.
    schedule: 'constant', 'cosine' or 'linear' after the warm-up.
    end_share: Share of the peak at which a decaying schedule ends.
    weight_decay: Decoupled, on matrices alone (arXiv 1711.05101).
    beta1: Decay of the mean of gradients.
    beta2: Decay of the mean of their squares.
    epsilon: Added to the root of the latter.
    clip_norm: Gradients are scaled down to this norm; 0 leaves them.
    state_bits: 32, or 8 for blockwise quantized moments.
    state_memory: 'device', or 'host' for a state that waits there (`offload`).
    shares: Of the learning rate, by the first name of a parameter's path; 1 for
      those that are not named.
  """

  learning_rate: float
  steps: int
  warmup_steps: int = 0
  schedule: str = 'cosine'
  end_share: float = 0.0
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  clip_norm: float = 1.0
  state_bits: int = 32
  state_memory: str = 'device'
  shares: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not self.learning_rate > 0:
      raise ValueError(f'learning_rate must be > 0, got {self.learning_rate}.')
    if not 0 <= self.warmup_steps < max(self.steps, 1):
      raise ValueError(
        f'warmup_steps must be in 0..steps - 1 = {self.steps - 1}, got'
        f' {self.warmup_steps}.'
      )
    if self.schedule not in SCHEDULES:
      raise ValueError(
        f'schedule must be one of {", ".join(SCHEDULES)}, got'
        f' {self.schedule!r}.'
      )
    if self.state_bits not in (8, 32):
      raise ValueError(f'state_bits must be 8 or 32, got {self.state_bits}.')
    if self.state_memory not in ('device', 'host'):
      raise ValueError(
        f"state_memory must be 'device' or 'host', got {self.state_memory!r}."
      )
    for name in ('beta1', 'beta2'):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(
          f'{name} must be in [0, 1), got {getattr(self, name)}.'
        )


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
  """The rate of each update, counted from 0."""
  peak, rest = config.learning_rate, config.steps - config.warmup_steps
  after = {
    'constant': optax.constant_schedule(peak),
    'cosine': optax.cosine_decay_schedule(peak, rest, config.end_share),
    'linear': optax.linear_schedule(peak, peak * config.end_share, rest),
  }[config.schedule]
  if not config.warmup_steps:
    return after
  # The first update has a rate above zero.
  up = optax.linear_schedule(
    peak / config.warmup_steps, peak, config.warmup_steps - 1 or 1
  )
  return optax.join_schedules([up, after], [config.warmup_steps])


def make(config: OptimizerConfig) -> optax.GradientTransformation:
  """The optimizer: clip, Adam, weight decay, rate."""
  betas = {'b1': config.beta1, 'b2': config.beta2, 'eps': config.epsilon}
  adam = scale_by_adam8bit if config.state_bits == 8 else optax.scale_by_adam
  matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
  parts = [
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity(),
    adam(**betas),
    optax.add_decayed_weights(config.weight_decay, mask=matrices)
    if config.weight_decay
    else optax.identity(),
    optax.scale_by_learning_rate(learning_rate(config)),
  ]
  if config.shares:
    parts.append(scale_by_group(config.shares))
  optimizer = optax.chain(*parts)
  if config.state_memory == 'host':
    return offload.offloaded(optimizer)
  return optimizer


def scale_by_group(shares: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies updates by a number for the first name of their path.

  Raises:
    ValueError: From `init`, if no parameter has such a name.
  """

  def init(params):
    missing = set(shares) - set(params)
    if missing:
      raise ValueError(
        f'shares names {sorted(missing)}, but there are {sorted(params)}.'
      )
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    scale = lambda share, group: jax.tree.map(lambda u: share * u, group)
    scaled = {
      name: scale(shares.get(name, 1.0), group)
      for name, group in updates.items()
    }
    return scaled, state

  return optax.GradientTransformation(init, update)


class Quantized(NamedTuple):
  """An array in blocks of eight-bit codes, each block with its own scale."""

  codes: jax.Array  # [blocks, block] uint8
  scales: jax.Array  # [blocks, 1] float32, the largest magnitude


class Adam8bitState(NamedTuple):
  """Moments of the gradients; an array is `Quantized` or float32."""

  count: jax.Array  # [] int32
  mean: optax.Updates
  square: optax.Updates


def scale_by_adam8bit(
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  block: int = 256,
  smallest: int = 4096,
) -> optax.GradientTransformation:
  """Adam whose moments take a byte each (arXiv 2110.02861).

  Each block of `block` numbers is divided by its largest magnitude and rounded
  to the nearest of 256 values of the dynamic tree code: signed for the mean,
  and a finer unsigned one for the mean of squares. Arrays of fewer than
  `smallest` numbers stay float32, as in the paper. Bytes a parameter:
  2 (1 + 4 / block) instead of 8.
  """
  signed, unsigned = dynamic_code(signed=True), dynamic_code(signed=False)

  def pack(code, x):
    return x if x.size < smallest else quantize(x, code, block)

  def init(params):
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    return Adam8bitState(
      jnp.int32(0),
      jax.tree.map(lambda z: pack(signed, z), zeros),
      jax.tree.map(lambda z: pack(unsigned, z), zeros),
    )

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    gradients, structure = jax.tree.flatten(updates)
    is_leaf = lambda x: isinstance(x, Quantized)
    means = jax.tree.leaves(state.mean, is_leaf=is_leaf)
    squares = jax.tree.leaves(state.square, is_leaf=is_leaf)
    steps, new_means, new_squares = [], [], []
    for gradient, mean, square in zip(gradients, means, squares, strict=True):
      g = gradient.astype(jnp.float32)
      mean = _unpack(mean, signed, g.shape) * b1 + (1 - b1) * g
      square = _unpack(square, unsigned, g.shape) * b2 + (1 - b2) * g * g
      step = mean / (1 - b1**count)
      step /= jnp.sqrt(square / (1 - b2**count)) + eps
      steps.append(step.astype(gradient.dtype))
      new_means.append(pack(signed, mean))
      new_squares.append(pack(unsigned, square))
    state = Adam8bitState(
      count, structure.unflatten(new_means), structure.unflatten(new_squares)
    )
    return structure.unflatten(steps), state

  return optax.GradientTransformation(init, update)


def dynamic_code(*, signed: bool) -> np.ndarray:
  """The 256 values of the dynamic tree code, rising: [256] float32.

  A number is 10^-e times a fraction; the exponent e is written in unary, so
  small exponents leave more bits for the fraction: for e = 0, 1, ..., the
  fractions are the midpoints of 2^(6 - e) (unsigned: 2^(7 - e)) equal parts of
  [0.1, 1]. With them come 0 and 1, and the negatives if `signed`.
  """
  values = [0.0, 1.0]
  for exponent in range(7):
    count = 2 ** (6 - exponent) * (1 if signed else 2)
    edges = np.linspace(0.1, 1, count + 1)
    middles = (edges[:-1] + edges[1:]) / 2 * 10.0**-exponent
    values += [*middles, *(-middles if signed else ())]
  return np.sort(np.array(values, np.float32))  # 254 midpoints, 0 and 1


def quantize(x: jax.Array, code: np.ndarray, block: int) -> Quantized:
  """Rounds each number to the nearest value of a code, blockwise."""
  padding = -x.size % block
  blocks = jnp.pad(x.reshape(-1).astype(jnp.float32), (0, padding))
  blocks = blocks.reshape(-1, block)
  scales = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
  shares = blocks / jnp.where(scales > 0, scales, 1)
  middles = jnp.asarray((code[:-1] + code[1:]) / 2)
  codes = jnp.searchsorted(middles, shares.reshape(-1)).reshape(blocks.shape)
  return Quantized(codes.astype(jnp.uint8), scales)


def dequantize(q: Quantized, code: np.ndarray, shape: tuple) -> jax.Array:
  """The numbers that `quantize` rounded to: `shape`, float32."""
  values = jnp.asarray(code)[q.codes] * q.scales
  return values.reshape(-1)[: int(np.prod(shape))].reshape(shape)


def _unpack(x, code, shape) -> jax.Array:
  return dequantize(x, code, shape) if isinstance(x, Quantized) else x
