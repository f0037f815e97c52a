"""What `train_bnn` trains and measures of one method and seed."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficiency_jax import binary_files
from efficiency_jax.binarization import folding
from efficiency_jax.binarization import latent
from efficiency_jax.binarization import networks
from efficiency_jax.data import images
from efficiency_jax.data.images import Images
from efficiency_jax.evaluation import speed
from efficiency_jax.training import objectives
from efficiency_jax.types import Params
from experiments import bnn_methods
from experiments import short_training

_BATCH = 500  # images at a time where nothing is trained
_SAMPLE = 2000  # weights of a layer that are looked at after every epoch

Row = dict[str, Any]


def load(config) -> images.Splits:
  """The images of a config, with its border around them."""
  if config.data == 'generated':
    splits = _generated(config.seed)
  elif config.folder:
    splits = images.load_folder(config.data, config.folder, config.seed)
  else:
    splits = images.load(config.data, config.seed)
  width = (config.border, config.border)
  return images.Splits(
    **{
      part: Images(np.pad(of.pixels, ((0, 0), width, width, (0, 0))), of.labels)
      for part, of in vars(splits).items()
    }
  )


@dataclasses.dataclass
class Best:
  """What was best by validation so far, and what was after every epoch.

  `curve` are errors, and `weights` some latent weights of every layer, the same
  ones each time; the first are those before any training.
  """

  error: float = math.inf
  epoch: int = 0
  params: Params | None = None
  curve: list[float] = dataclasses.field(default_factory=list)
  weights: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)


def train(
  network: networks.Config,
  data: images.Splits,
  config,
  seed: int,
  method: bnn_methods.Method,
) -> Best:
  """Trains a network, and keeps the parameters of the best epoch."""
  size = config.batch
  each = len(data.train.labels) // size
  if not each:
    raise ValueError(
      f'--config.batch={size} is more than the {len(data.train.labels)} images.'
    )
  rows = {
    'pixels': data.train.pixels[: each * size],
    'labels': data.train.labels[: each * size],
  }
  optimizer = _optimizer(network, method, config, each * config.epochs)
  loss = objectives.binarized(network, seed)
  params = networks.init(network, jax.random.key(seed))
  best = Best(weights=[_some_weights(params)])

  def evaluate(params, frozen):
    del frozen
    error = wrong(network, params, data.train, data.validation)
    best.curve.append(error)
    best.weights.append(_some_weights(params))
    if error < best.error:
      # The step will write over these.
      best.params = jax.tree.map(jnp.array, params)
      best.error, best.epoch = error, len(best.curve)
    return {'loss': error}

  short_training.fit(
    *(loss, optimizer, params, rows),
    batch=size,
    seed=seed,
    epochs=config.epochs,
    evaluate=evaluate,
  )
  return best


def _some_weights(params: Params) -> dict[str, np.ndarray]:
  """Weights of every layer, evenly spread over its kernel."""
  kernels = {name: np.ravel(leaf['kernel']) for name, leaf in params.items()}
  return {
    # A copy: a view would keep the whole kernel.
    name: np.array(kernel[:: -(-kernel.size // _SAMPLE)])
    for name, kernel in kernels.items()
  }


def _optimizer(network, method: bnn_methods.Method, config, total: int):
  """The optimizer of a method.

  Binary weights move by their fans and stay within [-1, 1]. Bop and shift
  AdaMax have rates of their own; beside Bop, which turns binary weights alone,
  everything else has Adam.
  """
  binary = {
    f'layer_{layer}': not networks.is_real(network, layer)
    for layer in range(len(network.kernels))
  }
  rate = optax.exponential_decay(
    config.learning_rate,
    total,
    config.last_learning_rate / config.learning_rate,
  )
  adam = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate))
  if method.optimizer == 'bop':
    kind = lambda path, p: (
      'bop' if p.ndim > 1 and binary[path[0].key] else 'adam'
    )
    return optax.partition(
      {'bop': latent.bop(), 'adam': adam},
      functools.partial(jax.tree_util.tree_map_with_path, kind),
    )
  shifts = method.optimizer == 'shift adamax'
  of_latent = optax.chain(
    latent.scale_by_fans(rounded=shifts),
    latent.clip() if method.clipped else optax.identity(),
  )
  return optax.chain(
    latent.shift_adamax() if shifts else adam, optax.masked(of_latent, binary)
  )


def statistics(network: networks.Config, params: Params, train_set: Images):
  """Of the training images, a share of them where there are many."""
  pixels = train_set.pixels[: 20 * _BATCH]
  size = min(_BATCH, len(pixels))
  return networks.statistics(
    network,
    params,
    [pixels[n : n + size] for n in range(0, len(pixels) - size + 1, size)],
  )


def predictions(run, of: Images) -> np.ndarray:
  """The class with the highest score of every image."""
  size = min(_BATCH, len(of.labels))
  found = []
  for start in range(0, len(of.labels), size):
    batch = of.pixels[start : start + size]
    missing = size - len(batch)
    filled = np.pad(batch, [(0, missing)] + [(0, 0)] * 3)
    found.append(np.asarray(run(filled).argmax(-1))[: len(batch)])
  return np.concatenate(found)


def wrong(network, params, train_set: Images, of: Images) -> float:
  """The share of images whose class is not the right one."""
  seen = statistics(network, params, train_set)
  run = lambda pixels: networks.apply(network, params, pixels, seen).scores
  return float((predictions(run, of) != of.labels).mean())


def measure(
  method: str, seed: int, data: images.Splits, config, path: pathlib.Path
) -> tuple[Row, Best]:
  """Trains by a method, measures what it would be used as, and saves that.

  Networks of signs are used folded; what is measured is the saved file.
  """
  network = bnn_methods.network(method, data.train.pixels.shape[1:], config)
  best = train(network, data, config, seed, bnn_methods.named(method))
  seen = statistics(network, best.params, data.train)
  trained = network
  plain = lambda pixels: (
    networks.apply(trained, best.params, pixels, seen).scores
  )
  run = plain
  found = predictions(run, data.test)
  row = {
    'method': method,
    'seed': seed,
    'test_error': 100 * float((found != data.test.labels).mean()),
    'validation_error': 100 * best.error,
    'best_epoch': best.epoch,
    'curve': [100 * error for error in best.curve],
    'bytes': _bytes(network, best.params),
  }
  if folding.foldable(network):
    binary_files.save(path, network, folding.fold(network, best.params, seen))
    network, folded = binary_files.load(path)
    run = functools.partial(folding.apply, network, folded)
    everything = (
      (predictions(run, of), predictions(plain, of))
      for of in (data.train, data.validation, data.test)
    )
    row['folded_matches'] = all((a == b).all() for a, b in everything)
    row['bytes'] = path.stat().st_size
  for size in (1, 100):
    pixels = jnp.asarray(np.resize(data.test.pixels, (size, *network.image)))
    timing = speed.measure(run, pixels, repeats=config.repeats)
    row[f'milliseconds_batch_{size}'] = 1000 * timing.median_seconds
  return row, best


def _bytes(network: networks.Config, params: Params) -> int:
  """A bit a binary weight, two a ternary one, and four bytes a real number."""
  bits = {'sign': 1, 'ternary': 2}.get(network.weights, 32)
  total = 0
  for layer, leaf in enumerate(params.values()):
    each = 32 if networks.is_real(network, layer) else bits
    total += leaf['kernel'].size * each // 8
    total += leaf['scale'].nbytes + leaf['bias'].nbytes
  return total


def _generated(seed: int) -> images.Splits:
  """Ten patterns under noise, 8 x 8."""
  rng = np.random.default_rng(seed)
  patterns = rng.uniform(0, 255, (10, 8, 8, 1))

  def some(count):
    labels = rng.integers(0, 10, count).astype(np.int32)
    noise = rng.normal(0, 60, (count, 8, 8, 1))
    pixels = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
    return Images(pixels, labels)

  return images.Splits(train=some(400), validation=some(100), test=some(200))
