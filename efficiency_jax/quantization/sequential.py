"""Calibrated methods block by block, each on what the model will really see.

What block 7 multiplies depends on how blocks 0 to 6 were rounded. Here a block
is observed on the output of the quantized blocks before it, then quantized, and
the text runs on through its new weights: as GPTQ does it (arXiv 2210.17323).
`calibration.observe` of the whole model is the simpler way, with the inputs of
the model as it was.
"""

from collections.abc import Sequence
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax import trees
from efficiency_jax.models import transformer
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.quantization import calibration
from efficiency_jax.quantization import rules
from efficiency_jax.types import Params


def quantize(
  config: DecoderConfig,
  params: Params,
  rules_: Sequence[rules.Rule],
  batches: Sequence[jax.Array],
  tokens: int = 2**10,
) -> tuple[Params, rules.Report]:
  """`rules.quantize` of a decoder, one block after another.

  Args:
    config: Of the model.
    params: Its parameters, plain arrays where a rule applies.
    rules_: As those of `rules.quantize`. Calibrated methods apply to kernels of
      blocks.
    batches: Token arrays [B, T] of one shape, whole sequences without padding.
    tokens: How many they must be at least.

  Raises:
    ValueError: As `rules.quantize` and `calibration.observe`.
  """
  found = sum(np.size(batch) for batch in batches)
  if found < tokens:
    raise ValueError(
      f'calibration text has {found} tokens and needs {tokens}: give more of'
      ' it.'
    )
  methods = {}
  rules.replace(
    params, rules_, lambda path, weight, method: methods.update({path: method})
  )
  blocks = [f'layers_{layer}' for layer in range(config.num_layers)]
  rest = {k: v for k, v in params.items() if k not in blocks}
  new, reports = _quantized(rest, methods, None)
  embed = jax.jit(transformer.embed_fn(config))
  xs = [embed(new, jnp.asarray(batch, jnp.int32)) for batch in batches]
  calibrated = [m for m in methods.values() if getattr(m, 'calibrated', False)]
  costly = frozenset().union(
    *(getattr(m, 'statistics', calibration.COSTLY) for m in calibrated)
  )
  # Blocks with the same window are one program, compiled once.
  first = {}
  for layer, name in enumerate(blocks):
    like = first.setdefault(config.window(layer), layer)
    see, run = _programs(config, like, costly)
    inputs = {}
    if calibrated:
      total = calibration.total(see(params[name], x) for x in xs)
      inputs = {f'{name}/{path}': of for path, of in total.items()}
    block, more = _quantized({name: params[name]}, methods, inputs)
    reports += more
    new |= block
    xs = [run(block[name], x) for x in xs]
  return new, rules.Report(
    leaves=tuple(reports),
    num_bytes=trees.count_bytes(new),
    weights=trees.count_parameters(params),
  )


@functools.cache
def _programs(config: DecoderConfig, layer: int, costly: frozenset[str]):
  """What a block multiplies, and what it makes of x; both compiled."""
  run = transformer.block_fn(config, layer)
  statistic = functools.partial(calibration.inputs, costly=costly)
  return jax.jit(calibration.captured(run, statistic)), jax.jit(run)


def _quantized(tree: Params, methods, inputs):
  """A part of the parameters, by the methods of its paths."""
  chosen = [
    (f'^{re.escape(path)}$', method)
    for path, method in methods.items()
    if path.split('/')[0] in tree
  ]
  if not chosen:
    return dict(tree), []
  quantized, report = rules.quantize(tree, chosen, inputs)
  return dict(quantized), list(report.leaves)
