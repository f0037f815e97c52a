"""Dense networks of one shape in float32, int8 and bits: what is timed."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import trees
from efficiency_jax.binarization import folding
from efficiency_jax.binarization import networks
from efficiency_jax.leaves import Activation
from efficiency_jax.linear import linear
from efficiency_jax.quantization.absmax import Integers


def made(
  image: tuple[int, int, int], width: int, layers: int
) -> dict[str, tuple[Callable[[jax.Array], jax.Array], int]]:
  """Dense networks of one shape as functions of pixels, and their bytes."""
  config = networks.Config(image=image, hidden=(width,) * layers)
  params = networks.init(config, jax.random.key(0))
  pixels = np.random.default_rng(0).integers(0, 256, (64, *image), np.uint8)
  seen = networks.statistics(config, params, [pixels])
  real = networks.Config(
    image=image,
    hidden=config.hidden,
    weights='float',
    activations='relu',
  )
  folded = folding.fold(config, params, seen)
  method = Integers(bits=8, activation=Activation())
  kernels = [method(layer['kernel']) for layer in params.values()]
  norms = {
    name: {key: layer[key] for key in ('scale', 'bias')}
    for name, layer in params.items()
  }

  @jax.jit
  def in_int8(kernels, norms, seen, pixels):
    x = (2 * pixels.reshape(len(pixels), -1).astype(jnp.float32) - 255) / 255
    for number, kernel in enumerate(kernels):
      name = f'layer_{number}'
      y = linear(x, kernel)
      x = networks.normalized(real, number, norms[name], y, seen[name])
      x = jax.nn.relu(x) if number < len(kernels) - 1 else x
    return x

  return {
    'float32': (
      lambda pixels: networks.apply(real, params, pixels, seen).scores,
      trees.count_bytes(params),
    ),
    'int8': (
      functools.partial(in_int8, kernels, norms, seen),
      trees.count_bytes([kernels, norms]),
    ),
    'bits': (
      functools.partial(folding.apply, config, folded),
      trees.count_bytes(folded),
    ),
  }
