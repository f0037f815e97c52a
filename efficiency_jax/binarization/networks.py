"""Binarized networks for images, as functions of parameters.

    y  = x . b(W)                                        a product of signs
    z  = gamma (y - mean) / sqrt(variance + eps) + beta  real numbers
    x' = b(z)                                            signs again

b is a binarizer; W, gamma and beta are real and are what is trained (arXiv
1602.02830; with real x it is BinaryConnect, 1511.00363). The first layer reads
pixels, the last one's z are scores of classes. Nothing is remembered between
calls: training normalizes by the batch, and inference by `statistics` that are
taken of some batches when training has ended.
"""

from collections.abc import Iterable
import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.binarization import binarizers
from efficiency_jax.binarization.latent import power_of_two
from efficiency_jax.types import Params

WEIGHTS = ('float', 'sign', 'stochastic', 'ternary')
ACTIVATIONS = ('relu', 'sign', 'stochastic')
NORMS = ('batch', 'shift', 'none')
ESTIMATORS: dict[str, binarizers.Binarizer] = {
  'clipped': binarizers.sign,
  'unclipped': binarizers.sign_unclipped,
  'approx': binarizers.approx_sign,
  'swish': binarizers.swish_sign,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A network; hashable, so that it can be a static argument.

  Attributes:
    image: Height, width and channels of what is read.
    convolutions: Channels and whether a 2 x 2 maximum follows, of each 3 x 3
      convolution; zeros surround what it reads.
    hidden: Widths of the dense layers after them.
    classes: How many there are.
    weights: 'float', 'sign' (deterministic), 'ternary', or 'stochastic': signs
      that are drawn in training, where inference takes the real weights
      themselves, as the code of arXiv 1511.00363 does.
    activations: 'relu', 'sign', or 'stochastic': signs that are drawn in
      training.
    real_ends: Whether the first and the last layer keep real weights.
    norm: 'batch'; 'shift', which multiplies by powers of two alone; or 'none',
      where y / sqrt(fan in) stands for the normalized y.
    estimator: Pseudo-gradient of signs of activations, of `ESTIMATORS`; that of
      drawn ones is clipped.
    dropout: Shares of inputs and of hidden numbers left out in training.
    epsilon: Added to the variance.
  """

  image: tuple[int, int, int]
  convolutions: tuple[tuple[int, bool], ...] = ()
  hidden: tuple[int, ...] = (1024, 1024, 1024)
  classes: int = 10
  weights: str = 'sign'
  activations: str = 'sign'
  real_ends: bool = False
  norm: str = 'batch'
  estimator: str = 'clipped'
  dropout: tuple[float, float] = (0.0, 0.0)
  epsilon: float = 1e-4

  def __post_init__(self):
    sizes = (*self.image, *(c for c, _ in self.convolutions), *self.hidden)
    if len(self.image) != 3 or not all(
      isinstance(size, int) and size > 0 for size in (*sizes, self.classes)
    ):
      raise ValueError(
        'image must be height, width and channels, and sizes whole numbers > 0,'
        f' got image {self.image}, convolutions {self.convolutions}, hidden'
        f' {self.hidden} and classes {self.classes}.'
      )
    for name, options in (
      ('weights', WEIGHTS),
      ('activations', ACTIVATIONS),
      ('norm', NORMS),
      ('estimator', tuple(ESTIMATORS)),
    ):
      if getattr(self, name) not in options:
        raise ValueError(
          f'{name} must be one of {", ".join(options)}, got'
          f' {getattr(self, name)!r}.'
        )
    height, width, _ = self.image
    for _, pooled in self.convolutions:
      if pooled and (height % 2 or width % 2):
        raise ValueError(
          f'an image of {height} x {width} cannot be halved: pool fewer times.'
        )
      height, width = (height // 2, width // 2) if pooled else (height, width)
    if not all(0 <= share < 1 for share in self.dropout):
      raise ValueError(f'dropout must be in [0, 1), got {self.dropout}.')

  @property
  def kernels(self) -> tuple[tuple[int, ...], ...]:
    """The shape of the kernel of each layer."""
    height, width, channels = self.image
    shapes = []
    for out, pooled in self.convolutions:
      shapes.append((3, 3, channels, out))
      channels = out
      height, width = (height // 2, width // 2) if pooled else (height, width)
    size = height * width * channels
    for out in (*self.hidden, self.classes):
      shapes.append((size, out))
      size = out
    return tuple(shapes)

  def pooled(self, layer: int) -> bool:
    """Whether a layer ends with a maximum over 2 x 2."""
    return layer < len(self.convolutions) and self.convolutions[layer][1]


class Moments(NamedTuple):
  """Mean and variance of y, [channels] each."""

  mean: jax.Array
  variance: jax.Array


class Output(NamedTuple):
  """Scores [B, classes], and the `Moments` of every layer by its name.

  There are no moments where statistics were given.
  """

  scores: jax.Array
  moments: dict[str, Moments]


def init(config: Config, key: jax.Array) -> Params:
  """Latent weights uniform in [-1, 1], real ones as Glorot has them."""
  params = {}
  for layer, shape in enumerate(config.kernels):
    drawn = jax.random.uniform(
      jax.random.fold_in(key, layer), shape, minval=-1.0, maxval=1.0
    )
    fans = (shape[-2] + shape[-1]) * (9 if len(shape) == 4 else 1)
    bound = (6 / fans) ** 0.5 if is_real(config, layer) else 1.0
    params[f'layer_{layer}'] = {
      'kernel': bound * drawn,
      'scale': jnp.ones(shape[-1]),
      'bias': jnp.zeros(shape[-1]),
    }
  return params


@functools.partial(jax.jit, static_argnums=0)
def apply(
  config: Config,
  params: Params,
  pixels: jax.Array,
  statistics: dict[str, Moments] | None = None,
  key: jax.Array | None = None,
) -> Output:
  """Runs the network.

  Args:
    config: Its shape and choices.
    params: Of `init`.
    pixels: [B, H, W, C] uint8.
    statistics: What to normalize by; None takes the batch's own.
    key: Draws stochastic signs and dropout; None takes the deterministic sign
      and drops nothing, as inference does.

  Raises:
    ValueError: The images are of another size or type.
  """
  check(config, pixels)
  # Whole numbers, so that the first product with signs is exact: see `scaled`.
  x = 2 * pixels.astype(jnp.float32) - 255
  moments = {}
  last = len(config.kernels) - 1
  for layer in range(last + 1):
    name = f'layer_{layer}'
    keys = (None, None, None)
    if key is not None:
      keys = jax.random.split(jax.random.fold_in(key, layer), 3)
    x = _dropped(x, config.dropout[min(layer, 1)], keys[0])
    kernel = _binarized(config, layer, params[name]['kernel'], keys[1])
    y = scaled(layer, product(config, layer, x, kernel))
    if statistics is None:
      moments[name] = _moments(config, y)
    seen = (moments if statistics is None else statistics)[name]
    z = normalized(config, layer, params[name], y, seen)
    x = z if layer == last else _activated(config, z, keys[2])
  return Output(x, moments)


def check(config: Config, pixels: jax.Array) -> None:
  """Refuses images of another size or type with a ValueError."""
  if pixels.shape[1:] != config.image or pixels.dtype != jnp.uint8:
    raise ValueError(
      f'pixels must be uint8 [B, {", ".join(map(str, config.image))}], got'
      f' {pixels.dtype} {list(pixels.shape)}.'
    )


def statistics(
  config: Config, params: Params, batches: Iterable[jax.Array]
) -> dict[str, Moments]:
  """Moments of every layer over all batches [B, H, W, C] together.

  Each batch is normalized by its own, as in training, and signs are
  deterministic, as in inference. Batches count alike.
  """
  sums, count = None, 0
  for pixels in batches:
    found = apply(config, params, pixels).moments
    one = {
      name: Moments(m.mean, m.variance + m.mean**2) for name, m in found.items()
    }
    sums = one if sums is None else jax.tree.map(jnp.add, sums, one)
    count += 1
  if sums is None:
    raise ValueError('batches must hold at least one batch.')
  means = jax.tree.map(lambda x: x / count, sums)
  # The law of total variance; rounding must not make it negative.
  return {
    name: Moments(m.mean, jnp.maximum(m.variance - m.mean**2, 0.0))
    for name, m in means.items()
  }


def product(
  config: Config, layer: int, x: jax.Array, kernel: jax.Array
) -> jax.Array:
  """The product of one layer, and the maximum after it.

  A whole number where x and kernel are, and exact up to 2^24.
  """
  if kernel.ndim == 2:
    return jnp.matmul(
      x.reshape(len(x), -1), kernel, preferred_element_type=jnp.float32
    )
  y = lax.conv_general_dilated(
    x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return pool(y) if config.pooled(layer) else y


def pool(y: jax.Array) -> jax.Array:
  """The maximum of each 2 x 2: [B, H, W, C] to [B, H / 2, W / 2, C]."""
  batch, height, width, channels = y.shape
  return y.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


def scaled(layer: int, y: jax.Array) -> jax.Array:
  """The product as if pixels were in [-1, 1]."""
  return y / 255 if layer == 0 else y


def normalized(
  config: Config, layer: int, params: Params, y: jax.Array, moments: Moments
) -> jax.Array:
  """z of y, both [..., channels]: it grows or falls with y, or stays."""
  scale, bias = params['scale'], params['bias']
  if config.norm == 'none':
    shape = config.kernels[layer]
    fan_in = shape[0] if len(shape) == 2 else 9 * shape[2]
    return y * fan_in**-0.5 * scale + bias
  inverse = lax.rsqrt(moments.variance + config.epsilon)
  if config.norm == 'shift':
    # The slope of a power of two is that of the number itself.
    nearest = lambda v: v + lax.stop_gradient(power_of_two(v) - v)
    inverse, scale = nearest(inverse), nearest(scale)
  return (y - moments.mean) * inverse * scale + bias


def is_real(config: Config, layer: int) -> bool:
  """Whether a layer multiplies real weights, in training and inference."""
  ends = (0, len(config.kernels) - 1)
  return config.weights == 'float' or (config.real_ends and layer in ends)


def _binarized(
  config: Config, layer: int, kernel: jax.Array, key: jax.Array | None
) -> jax.Array:
  if is_real(config, layer):
    return kernel
  if config.weights == 'ternary':
    return binarizers.ternary(kernel)
  if config.weights == 'stochastic':
    return kernel if key is None else binarizers.stochastic_sign(kernel, key)
  return binarizers.sign(kernel)


def _activated(config: Config, z: jax.Array, key: jax.Array | None):
  if config.activations == 'relu':
    return jax.nn.relu(z)
  if config.activations == 'stochastic' and key is not None:
    return binarizers.stochastic_sign(z, key)
  return ESTIMATORS[config.estimator](z)


def _dropped(x: jax.Array, share: float, key: jax.Array | None) -> jax.Array:
  if key is None or not share:
    return x
  kept = jax.random.bernoulli(key, 1 - share, x.shape)
  return jnp.where(kept, x / (1 - share), 0.0)


def _moments(config: Config, y: jax.Array) -> Moments:
  others = tuple(range(y.ndim - 1))
  mean = y.mean(others)
  centred = y - mean
  if config.norm == 'shift':
    # c AP2(c) is c^2 by a shift, and its slope is taken for that of c^2.
    exact = centred**2
    near = centred * power_of_two(centred)
    squares = exact + lax.stop_gradient(near - exact)
  else:
    squares = centred**2
  return Moments(mean, squares.mean(others))
