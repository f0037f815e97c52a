"""What `quantize_encoder` measures of one way to store an encoder."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from efficiency_jax import trees
from efficiency_jax.data import sentiment
from efficiency_jax.data.sentiment import Sentence
from efficiency_jax.evaluation import encoders
from efficiency_jax.evaluation.encoders import SentimentHead
from efficiency_jax.io.pretrained_encoder import TextEncoder
from efficiency_jax.quantization import gobo
from efficiency_jax.quantization import recipes
from efficiency_jax.quantization import rules
from efficiency_jax.types import Params

BASELINE = 'float32'

Row = dict[str, Any]


def sentences(config) -> sentiment.Splits:
  """What to train on and to test on."""
  if config.model != 'untrained':
    return sentiment.load_splits()
  inline = [Sentence(text, positive) for text, positive in config.inline]
  return sentiment.Splits(train=inline, validation=[], test=inline)


def labels(of: Sequence[Sentence]) -> np.ndarray:
  """Whether each is positive: [N] bool."""
  return np.array([sentence.positive for sentence in of])


def embed(encoder: TextEncoder, of: Sequence[Sentence]) -> np.ndarray:
  """Their embeddings [N, D]."""
  return encoders.embed(encoder, [sentence.text for sentence in of])


def rules_for(encoder: TextEncoder, name: str) -> tuple[rules.Rule, ...]:
  """A recipe; a table of biases, which multiplies nothing, stays as it is."""
  kept = (('relative_bias', None),) if encoder.config.relative_bias else ()
  return (*kept, *recipes.named(name))


def store(encoder: TextEncoder, name: str) -> tuple[TextEncoder, Row]:
  """An encoder stored by a recipe, and its size."""
  if name == BASELINE:
    size = trees.count_bytes(encoder.params)
    weights = trees.count_parameters(encoder.params)
    return encoder, {'bits_per_weight': 8 * size / weights, 'bytes': size}
  params, report = rules.quantize(encoder.params, rules_for(encoder, name))
  return dataclasses.replace(encoder, params=params), {
    'bits_per_weight': report.bits_per_weight,
    'bytes': report.num_bytes,
  }


def measure(
  encoder: TextEncoder,
  head: SentimentHead,
  test: Sequence[Sentence],
  reference: np.ndarray | None = None,  # [N, D]
) -> Row:
  """Right answers and the loss of a head, and how far embeddings moved."""
  embeddings = embed(encoder, test)
  positive = labels(test)
  share = encoders.accuracy(head, embeddings, positive)
  margins = np.where(positive, 1, -1) * np.asarray(head.scores(embeddings))
  row = {
    'accuracy': share.accuracy,
    'standard_error': share.standard_error,
    'loss': float(np.logaddexp(0, -margins).mean()),
  }
  if reference is not None:
    row |= dataclasses.asdict(encoders.fidelity(reference, embeddings))
  return row


def clusterings(params: Params, bits: int) -> list[Row]:
  """GOBO's clustering of every matrix, and k-means from where it begins."""
  matrices = [
    np.asarray(leaf, np.float32)
    for path, leaf in trees.leaves(params)
    if path.endswith(('kernel', 'embedding/table'))
  ]
  outside = [gobo.outliers(matrix) for matrix in matrices]
  share = sum(map(np.sum, outside)) / sum(map(np.size, outside))
  found = []
  for until, name in (('l1', 'GOBO'), ('converged', 'k-means')):
    fits = [
      gobo.cluster(matrix[~out], bits, until)
      for matrix, out in zip(matrices, outside, strict=True)
    ]
    iterations = [fit.iterations for fit in fits]
    found.append(
      {
        'method': f'{name}, {bits} bits',
        'iterations': float(np.mean(iterations)),
        'least': min(iterations),
        'most': max(iterations),
        'mean_error': float(np.mean([fit.mean_error for fit in fits])),
        'outlier_share': float(share),
      }
    )
  return found
