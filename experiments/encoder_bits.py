"""Bits of each part of an encoder by the Hessian of its loss (Q-BERT)."""

import functools
import math
import re
from typing import Any

import jax

from efficiency_jax import leaves
from efficiency_jax import trees
from efficiency_jax.data import rows as data_rows
from efficiency_jax.evaluation.encoders import SentimentHead
from efficiency_jax.io.pretrained_encoder import TextEncoder
from efficiency_jax.models import encoder as encoder_lib
from efficiency_jax.quantization import absmax
from efficiency_jax.quantization import hessian
from efficiency_jax.quantization import rules
from efficiency_jax.training import objectives

_GROUP = 64  # weights that share a scale


def sensitivities(
  encoder: TextEncoder, head: SentimentHead, rows: dict[str, Any], settings
) -> dict[str, float]:
  """Q-BERT's measure of each half of each layer (`hessian`)."""
  encode = encoder_lib.apply_fn(encoder.config, 'reference')
  of = objectives.classification(encode)
  batches = data_rows.batches(rows, batch_size=settings.batch, seed=0, epochs=1)
  found = hessian.top_eigenvalues(
    lambda params, batch: of({'encoder': params, 'head': head}, None, batch)[0],
    encoder.params,
    groups(encoder),
    [batch for batch, _ in zip(batches, range(settings.batches))],
    iterations=settings.iterations,
  )
  return {name: hessian.sensitivity(values) for name, values in found.items()}


def groups(encoder: TextEncoder) -> dict[str, str]:
  """A name and a pattern for each half of each layer."""
  return {
    f'layer {layer} {part}': f'layers_{layer}/{part}/.*kernel$'
    for layer in range(encoder.config.num_layers)
    for part in ('attention', 'ffn')
  }


def by_bits(encoder: TextEncoder, bits: dict[str, int]) -> list[rules.Rule]:
  """Rules that store the kernels of each group in its own number of bits.

  With a zero point, as the paper has it: absmax leaves three values of 2 bits.
  """
  method = functools.partial(absmax.Integers, per=_GROUP, symmetric=False)
  patterns = groups(encoder)
  return [(patterns[name], method(bits=few)) for name, few in bits.items()]


def bits_per_weight(params) -> float:
  """Stored bits of quantized kernels over their weights; of none it is 32."""
  is_leaf = lambda node: isinstance(node, leaves.QTensor)
  found = filter(is_leaf, jax.tree.leaves(params, is_leaf=is_leaf))
  sizes = [(8 * q.num_bytes, math.prod(q.shape)) for q in found]
  if not sizes:
    return 32.0
  stored, weights = map(sum, zip(*sizes, strict=True))
  return stored / weights


def allocations(
  encoder: TextEncoder, found: dict[str, float], settings
) -> dict[str, dict[str, int]]:
  """Bits of each group: by the Hessian, against it, and alike for all."""
  sizes = {
    name: sum(
      leaf.size
      for path, leaf in trees.leaves(encoder.params)
      if re.search(pattern, path)
    )
    for name, pattern in groups(encoder).items()
  }
  allowed = {
    'few': settings.few,
    'many': settings.many,
    'mean_bits': settings.mean,
  }
  turned = {name: -value for name, value in found.items()}
  return {
    'uniform': dict.fromkeys(found, round(settings.mean)),
    'by Hessian': hessian.allocate(found, sizes, **allowed),
    'against Hessian': hessian.allocate(turned, sizes, **allowed),
  }
