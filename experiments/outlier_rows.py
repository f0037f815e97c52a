"""What `outliers` measures of a kind of product and of a threshold."""

import dataclasses

import numpy as np

from efficiency_jax.leaves import Activation
from efficiency_jax.models import transformer
from efficiency_jax.quantization import outlier_features
from efficiency_jax.quantization import recipes
from efficiency_jax.quantization import rules
from efficiency_jax.quantization.absmax import Integers
from experiments import quantize_rows
from experiments import workdir as workdirs


def features(lm, windows, config) -> dict[str, outlier_features.Features]:
  """Activations of the very windows that perplexity is measured on."""
  batches = zip(
    *(
      np.array_split(windows[name], -(-len(windows[name]) // config.batch))
      for name in ('tokens', 'segments')
    ),
    strict=True,
  )
  apply = transformer.apply_fn(lm.config)
  return outlier_features.observe(apply, lm.params, batches, config.threshold)


def kind_row(
  kind: str, found: outlier_features.Features, config
) -> workdirs.Row:
  """What a kind of product multiplies."""
  outliers = found.outliers(config.layers_share, config.tokens_share)
  return {
    'method': kind,
    'columns': found.share.shape[1],
    'reached_in_a_layer': found.columns,
    'outlier_features': len(outliers),
    'which': ' '.join(map(str, outliers[:8])) or '-',
    'share_of_numbers': float(found.share.mean()),
    'largest': float(found.largest.max()),
    'largest_in_layer': int(found.largest.max(1).argmax()),
  }


def threshold_row(lm, known, found, threshold: float, config) -> workdirs.Row:
  """Perplexity of LLM.int8() with one threshold; inf is vector-wise int8."""
  how = Activation(threshold=threshold, max_outliers=config.most)
  method = Integers(bits=8, activation=how)
  params, _ = rules.quantize(lm.params, recipes.every(method))
  row = quantize_rows.measure_quality(
    dataclasses.replace(lm, params=params), known, config
  )
  columns = np.concatenate([one.largest.reshape(-1) for one in found.values()])
  share = float((columns >= threshold).mean())
  return {'baseline': 'float32', 'share_of_columns': share, **row}
