"""What weights multiply: statistics of activations, for methods that need them.

    inputs = calibration.observe(transformer.apply_fn(config), params, batches)
    gptq = Gptq(integers=Integers(bits=4, per=64))
    params, report = rules.quantize(params, [('kernel$', gptq)], inputs)

The model runs on some text, and for the left operand of every product, by the
path of its weight, a few sums are kept. No model knows of it: Flax lets a
function see the calls of modules.
"""

from collections.abc import Callable, Collection, Iterable
import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.types import Params

# |x| is counted in steps of 2^(1 / 64), from 2^-20 to 2^20.
_STEPS, _OCTAVES = 64, 40
_BINS = _STEPS * _OCTAVES

# Statistics that take as long as a product, or longer.
COSTLY = ('gram', 'histogram')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """Statistics of the rows x [K] that one weight multiplied.

  Attributes:
    rows: [] float32, how many there were.
    gram: [K, K] float32, the sum of x x'; None where it is not wanted.
    sizes: [K] float32, the sum of |x|.
    largest: [K] float32, the largest |x|.
    histogram: [2560] float32, how many |x| there were of each size, or None.
    batch_largest: [batches] float32, the largest |x| of each batch.
  """

  rows: jax.Array
  gram: jax.Array | None
  sizes: jax.Array
  largest: jax.Array
  histogram: jax.Array | None
  batch_largest: jax.Array


def inputs(x: jax.Array, costly: Collection[str] = COSTLY) -> Inputs:
  """Statistics of one batch [..., K]; of the `costly` ones those named."""
  x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  size = jnp.abs(x)
  gram = histogram = None
  if 'gram' in costly:
    gram = jnp.matmul(x.T, x, precision='highest')
  if 'histogram' in costly:
    place = _STEPS * (jnp.log2(jnp.maximum(size, 1e-30)) + _OCTAVES // 2)
    place = jnp.clip(jnp.ceil(place), 0, _BINS - 1).astype(jnp.int32)
    counts = jnp.bincount(place.reshape(-1), length=_BINS)
    histogram = counts.astype(jnp.float32)
  return Inputs(
    rows=jnp.float32(len(x)),
    gram=gram,
    sizes=size.sum(0),
    largest=size.max(0),
    histogram=histogram,
    batch_largest=size.max()[None],
  )


@jax.jit
def merge(a: Inputs, b: Inputs) -> Inputs:
  """Statistics of two batches together."""
  add = lambda x, y: None if x is None else x + y
  return Inputs(
    rows=a.rows + b.rows,
    gram=add(a.gram, b.gram),
    sizes=a.sizes + b.sizes,
    largest=jnp.maximum(a.largest, b.largest),
    histogram=add(a.histogram, b.histogram),
    batch_largest=jnp.concatenate([a.batch_largest, b.batch_largest]),
  )


def captured(
  apply: Callable[..., Any], statistic: Callable[[jax.Array], Any]
) -> Callable[..., dict[str, Any]]:
  """`apply` as a function that returns `statistic(x)` for every product.

  Keys are the paths of weights, `layers_3/attention/qkv/kernel`. What the
  function is called with, `apply` is called with: whole sequences, no cache,
  which hides the layers (`transformer.apply_fn`).
  """

  def run(*args, **options):
    found = {}

    def watch(call, args, options, context):
      module, method = context.module, context.method_name
      kind = type(module).__name__
      path = '/'.join(module.path)
      if (kind, method) == ('Linear', '__call__'):
        found[f'{path}/kernel'] = statistic(args[0])
      if (kind, method) == ('Embedding', 'logits'):
        found[f'{path}/table'] = statistic(args[0])
      return call(*args, **options)

    with nn.intercept_methods(watch):
      apply(*args, **options)
    return found

  return run


def observe(
  apply: Callable[..., Any],
  params: Params,
  batches: Iterable[jax.Array],
  rows: int = 2**10,
) -> dict[str, Inputs]:
  """Runs a model over text and returns what each of its weights multiplied.

  Args:
    apply: An `ApplyFn`.
    params: Its parameters.
    batches: Token arrays [B, T], whole sequences without padding.
    rows: Tokens that are needed at least: fewer say little about a weight.

  Raises:
    ValueError: There are fewer tokens, or an activation is not finite.
  """
  batches = list(batches)
  tokens = sum(np.size(batch) for batch in batches)
  if tokens < rows:
    raise ValueError(
      f'calibration text has {tokens} tokens and needs {rows}: give more of it.'
    )
  run = jax.jit(captured(apply, inputs))
  return total(run(params, jnp.asarray(b, jnp.int32)) for b in batches)


def total(found: Iterable[dict[str, Inputs]]) -> dict[str, Inputs]:
  """What weights multiplied in several batches together.

  Raises:
    ValueError: An activation is not finite.
  """
  merged = {}
  for batch in found:
    for path, statistics in batch.items():
      known = path in merged
      merged[path] = merge(merged[path], statistics) if known else statistics
  for path, statistics in merged.items():
    if not np.isfinite(statistics.largest).all():
      raise ValueError(
        f'what {path} multiplies is not finite: check the model or its dtype.'
      )
  return merged


Mode = Literal['absmax', 'percentile', 'moving average', 'mse']


def activation_scale(
  statistics: Inputs, mode: Mode = 'absmax', bits: int = 8
) -> jax.Array:
  """One scale for all that a weight will multiply: static quantization.

  Args:
    statistics: Of calibration text.
    mode: The largest |x|; the size that 99.99 % do not reach; the mean over the
      batches of the largest |x| in each; or the clipping with the smallest mean
      squared error. Sizes come from a histogram whose steps are 1.1 %.
    bits: Of the integers.

  Returns:
    [] float32, s of q = round(x / s).

  Raises:
    ValueError: The mode is unknown.
  """
  largest = 2 ** (bits - 1) - 1
  counts = np.asarray(statistics.histogram, np.float64)
  edges = 2.0 ** (np.arange(_BINS) / _STEPS - _OCTAVES // 2)
  top = float(statistics.largest.max())
  if mode == 'absmax':
    bound = top
  elif mode == 'percentile':
    share = np.cumsum(counts) / counts.sum()
    bound = min(top, edges[np.searchsorted(share, 0.9999)])
  elif mode == 'moving average':
    bound = float(statistics.batch_largest.mean())
  elif mode == 'mse':
    bound = min(top, _least_squares(counts, edges, largest))
  else:
    raise ValueError(
      "mode must be 'absmax', 'percentile', 'moving average' or 'mse', got"
      f' {mode!r}.'
    )
  return jnp.float32(bound / largest if bound else 1.0)


def _least_squares(counts, edges, largest: int) -> float:
  """The bound with the smallest expected squared error over a histogram."""
  seen = np.flatnonzero(counts)
  sizes, counts = edges[seen], counts[seen]
  candidates = edges[max(seen[-1] - 10 * _STEPS, 0) : seen[-1] + 1]
  steps = candidates[:, None] / largest
  # What rounding loses is known where the histogram is finer than a step, and a
  # twelfth of the squared step on average elsewhere; clipping loses the rest.
  lost = (sizes - np.round(sizes / steps) * steps) ** 2
  inside = np.where(steps * _STEPS > 4 * sizes, lost, steps**2 / 12)
  clipped = (sizes - candidates[:, None]) ** 2
  errors = np.where(sizes <= candidates[:, None], inside, clipped) @ counts
  return float(candidates[errors.argmin()])
