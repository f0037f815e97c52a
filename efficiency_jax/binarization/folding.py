"""A trained binarized network as bits and whole numbers.

Batch normalization and a sign together are one comparison: z grows or falls
with the whole number y, so its sign is decided by a threshold,

    z(y) >= 0   <=>   (y >= t) xor flip            flip: z >= 0 at the least y

which is found by trying: t is the first y at which z, computed as the network
computes it, has its other sign; one that never turns has a t beyond all y. So
the folded network predicts what the network predicts, ties and rounding
included. A weight takes one bit.

Pixels are whole numbers, and a product with them is one of signs for each of
their bits: 2 p - 255 = sum_b 2^b s_b, where s_b is +1 or -1 (arXiv 1602.02830,
section 3.3).
"""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.binarization import binarizers
from efficiency_jax.binarization import networks
from efficiency_jax.binarization.networks import Config
from efficiency_jax.binarization.networks import Moments
from efficiency_jax.types import Params
from pallas_kernels.binary_matmul.api import binary_matmul
from pallas_kernels.binary_matmul.api import pack_signs

_PIXEL_BITS = 8
_TAPS = 3  # of a convolution, each way


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """One layer in bits.

  Attributes:
    words: [N, ceil(K / 32)] uint32, the signs of the weights.
    border: [H, W, N] int32, what is added to a convolution, in which a sign of
      -1 stands for what surrounds the image; None for a dense layer.
    threshold: [N] int32, t ...
    flip: ... and [N] bool; None for the last layer.
  """

  words: jax.Array
  border: jax.Array | None = None
  threshold: jax.Array | None = None
  flip: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Folded:
  """A network in bits.

  Attributes:
    layers: Of it.
    norm: `scale` and `bias` [classes] of the last layer, whose scores are real.
    moments: What it normalizes by.
  """

  layers: tuple[Layer, ...]
  norm: Params
  moments: Moments


def fold(
  config: Config, params: Params, statistics: dict[str, Moments]
) -> Folded:
  """Folds a trained network.

  Args:
    config: Of the network, whose weights and activations are signs in
      inference.
    params: Trained.
    statistics: Of `networks.statistics`.

  Raises:
    ValueError: Some weights or activations are no signs.
  """
  if not foldable(config):
    raise ValueError(
      'only a network of signs can be folded, got weights'
      f' {config.weights!r}, activations {config.activations!r} and'
      f' real_ends {config.real_ends}.'
    )
  layers = []
  height, width, _ = config.image
  last = len(config.kernels) - 1
  for number, shape in enumerate(config.kernels):
    name = f'layer_{number}'
    signs = binarizers.sign(params[name]['kernel'])
    largest = 255 if number == 0 else 1
    border, threshold, flip = None, None, None
    if len(shape) == 4:
      border = largest * _border(signs, height, width)
      if config.pooled(number):
        height, width = height // 2, width // 2
    signs = signs.reshape(-1, shape[-1])
    if number < last:
      z = functools.partial(_z, config, number, params[name], statistics[name])
      threshold, flip = _threshold(z, largest * len(signs), shape[-1])
    layers.append(
      Layer(
        words=pack_signs(signs.T),
        border=border,
        threshold=threshold,
        flip=flip,
      )
    )
  norm = {key: params[f'layer_{last}'][key] for key in ('scale', 'bias')}
  return Folded(
    layers=tuple(layers), norm=norm, moments=statistics[f'layer_{last}']
  )


def foldable(config: Config) -> bool:
  """Whether all weights and activations are signs in inference."""
  return (
    config.weights == 'sign'
    and config.activations != 'relu'
    and not config.real_ends
  )


@functools.partial(jax.jit, static_argnames=('config', 'implementation'))
def apply(
  config: Config, folded: Folded, pixels: jax.Array, implementation=None
) -> jax.Array:
  """Scores [B, classes] of pixels [B, H, W, C] uint8.

  They are those of `networks.apply` with the same statistics, to the last bit
  of every sign between the layers. `implementation` is that of
  `binary_matmul`.

  Raises:
    ValueError: The images are of another size or type.
  """
  networks.check(config, pixels)
  multiply = functools.partial(binary_matmul, implementation=implementation)
  last = len(folded.layers) - 1
  x = None
  for number, layer in enumerate(folded.layers):
    if number == 0:
      # Bit b of all pixels as signs, and their products in turn.
      planes = [(pixels >> b) & 1 for b in range(_PIXEL_BITS)]
      y = sum(
        _product(config, number, layer, plane > 0, multiply) << b
        for b, plane in enumerate(planes)
      )
    else:
      y = _product(config, number, layer, x, multiply)
    if layer.border is not None:
      y = y + layer.border
      y = networks.pool(y) if config.pooled(number) else y
    if number < last:
      x = (y >= layer.threshold) ^ layer.flip
  return _z(config, last, folded.norm, folded.moments, y)


def _product(config, number, layer, bits, multiply) -> jax.Array:
  """Whole numbers [..., N] of signs [B, ...], True for +1."""
  shape = config.kernels[number]
  if len(shape) == 2:
    bits = bits.reshape(len(bits), -1)
    return multiply(_packed(bits), layer.words, shape[0])
  bits = _patches(bits)
  return multiply(_packed(bits), layer.words, bits.shape[-1])


def _packed(bits: jax.Array) -> jax.Array:
  return pack_signs(jnp.where(bits, 1, -1).astype(jnp.int8))


def _patches(bits: jax.Array) -> jax.Array:
  """[B, H, W, C] to [B, H, W, 9 C]: what each place of a convolution reads.

  In the order of the kernel [3, 3, C, N]; False surrounds the image.
  """
  _, height, width, _ = bits.shape
  around = jnp.pad(bits, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate(
    [
      around[:, row : row + height, column : column + width]
      for row in range(_TAPS)
      for column in range(_TAPS)
    ],
    axis=-1,
  )


def _border(signs: jax.Array, height: int, width: int) -> jax.Array:
  """What -1 around the image took away: the sum of weights outside, [H, W, N].

  The network has zeros there.
  """
  inside = jnp.ones((1, height, width, signs.shape[2]))
  counted = lax.conv_general_dilated(
    inside, signs, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  return (signs.sum((0, 1, 2)) - counted[0]).astype(jnp.int32)


def _z(config, number, params, moments, y) -> jax.Array:
  """What the network makes of the whole numbers y."""
  y = networks.scaled(number, y.astype(jnp.float32))
  return networks.normalized(config, number, params, y, moments)


def _threshold(z, bound: int, channels: int) -> tuple[jax.Array, jax.Array]:
  """The least y in [-bound, bound + 1] where z has another sign than before.

  z is monotone, so that halving the range finds it; where its sign is the same
  everywhere, t is bound + 1 and never reached.
  """
  at = lambda y: z(y) >= 0
  first = at(jnp.full(channels, -bound))

  def halved(_, ends):
    low, high = ends  # the sign is still `first`; it is taken for another one
    middle = low + (high - low) // 2
    same = at(middle) == first
    # Where nothing lies between, the middle is `low`.
    return jnp.where(same, middle, low), jnp.where(same, high, middle)

  ends = jnp.full(channels, -bound), jnp.full(channels, bound + 1)
  steps = (2 * bound + 1).bit_length()
  _, high = lax.fori_loop(0, steps, halved, ends)
  # Before t the answer is `first`: y >= t is False there.
  return high, first
