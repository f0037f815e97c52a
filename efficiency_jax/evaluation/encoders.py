"""What an encoder is worth after its weights were changed.

Two measures: how far its sentence embeddings moved, and how well a linear head
on them tells the sentiment of a sentence.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from efficiency_jax.io.pretrained_encoder import TextEncoder
from efficiency_jax.models import encoder as encoder_lib

# Texts are filled up to a multiple of so many tokens: every length compiles.
_MULTIPLE = 16


class SentimentHead(NamedTuple):
  """Logistic regression: P(positive) = sigmoid(embedding . weights + bias)."""

  weights: jax.Array  # [D] float32
  bias: jax.Array  # [] float32

  def scores(self, embeddings: jax.Array) -> jax.Array:
    """Log-odds of a positive sentiment: [N, D] to [N]."""
    return embeddings @ self.weights + self.bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fidelity:
  """How like the embeddings of two models are, over the same texts.

  Attributes:
    cosine: Mean cosine between the two embeddings of a text.
    minimum_cosine: That of the text that moved most.
    spearman: Rank correlation of the similarities of all pairs of texts: 1 if
      a search would order them alike.
  """

  cosine: float
  minimum_cosine: float
  spearman: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accuracy:
  """A share of right answers.

  Attributes:
    accuracy: From 0 to 1.
    standard_error: sqrt(a (1 - a) / n), from the choice of the n test sentences
      alone.
    count: n.
  """

  accuracy: float
  standard_error: float
  count: int


def embed(
  encoder: TextEncoder, texts: Sequence[str], *, batch_size: int = 32
) -> np.ndarray:
  """Sentence embeddings of length 1, in the order of the texts: [N, D] float32.

  Raises:
    ValueError: There are no texts, or `batch_size` is not positive.
  """
  if batch_size < 1:
    raise ValueError(f'batch_size must be >= 1, got {batch_size}.')
  if not texts:
    raise ValueError('texts must hold at least one text.')
  apply = encoder_lib.apply_fn(encoder.config)
  # Texts of like lengths share a batch, so that little of it is padding.
  order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
  found = np.zeros((len(texts), encoder.config.width), np.float32)
  for first in range(0, len(order), batch_size):
    places = order[first : first + batch_size]
    # The last batch has the shape of the others.
    filled = places + places[-1:] * (batch_size - len(places))
    batch = encoder.batch([texts[i] for i in filled], multiple=_MULTIPLE)
    rows = _embed(apply, encoder.params, *batch)
    found[places] = np.asarray(rows)[: len(places)]
  return found


@functools.partial(jax.jit, static_argnums=0)
def _embed(apply, params, tokens, mask):
  return encoder_lib.sentence_embedding(apply(params, tokens, mask), mask)


def fidelity(
  reference: np.ndarray,  # [N, D]
  other: np.ndarray,  # [N, D]
) -> Fidelity:
  """Compares the embeddings of the same texts by two models.

  The similarities of a model are the cosines of its N (N - 1) / 2 pairs.

  Raises:
    ValueError: The shapes differ, or there are fewer than three texts.
  """
  if reference.shape != other.shape or len(reference) < 3:
    raise ValueError(
      'embeddings must be of the same three texts or more and equally wide, got'
      f' {reference.shape} and {other.shape}.'
    )
  reference, other = (
    x / np.linalg.norm(x, axis=1, keepdims=True)
    for x in (np.asarray(e, np.float64) for e in (reference, other))
  )
  cosines = (reference * other).sum(1)
  pairs = np.triu_indices(len(reference), 1)
  return Fidelity(
    cosine=float(cosines.mean()),
    minimum_cosine=float(cosines.min()),
    spearman=spearman(*((x @ x.T)[pairs] for x in (reference, other))),
  )


def spearman(x: np.ndarray, y: np.ndarray) -> float:
  """Spearman's rank correlation of two [N]; equal values share a mean rank."""
  return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
  _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[place]


def fit_head(
  embeddings: np.ndarray,  # [N, D]
  labels: np.ndarray,  # [N] bool, True is positive
  *,
  l2: float = 1e-4,
  max_steps: int = 300,
) -> SentimentHead:
  """Logistic regression on frozen embeddings.

  Minimizes mean_i log(1 + exp(-s_i (w x_i + b))) + l2 / 2 |w|^2, where s_i is 1
  or -1: it is convex, so that L-BFGS ends at the one minimum and nothing is
  random.

  Raises:
    ValueError: Shapes do not fit, or only one sentiment occurs.
  """
  embeddings = jnp.asarray(embeddings, jnp.float32)
  labels = np.asarray(labels, bool)
  if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
    raise ValueError(
      'embeddings must be [N, D] and labels [N], got'
      f' {embeddings.shape} and {labels.shape}.'
    )
  if labels.all() or not labels.any():
    raise ValueError('labels must hold both sentiments.')
  return _fit(embeddings, jnp.asarray(labels), l2, max_steps)


@functools.partial(jax.jit, static_argnums=3)
def _fit(embeddings, labels, l2, max_steps):
  signs = jnp.where(labels, 1.0, -1.0)

  def loss(head):
    margins = signs * head.scores(embeddings)
    return jax.nn.softplus(-margins).mean() + l2 / 2 * (head.weights**2).sum()

  solver = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(loss)

  def step(carry):
    head, state, number, _ = carry
    value, grad = value_and_grad(head, state=state)
    updates, state = solver.update(
      grad, state, head, value=value, grad=grad, value_fn=loss
    )
    return (
      optax.apply_updates(head, updates),
      state,
      number + 1,
      optax.tree.norm(grad),
    )

  def unfinished(carry):
    *_, number, slope = carry
    return (number < max_steps) & (slope > 1e-6)

  head = SentimentHead(
    jnp.zeros(embeddings.shape[1], jnp.float32), jnp.zeros((), jnp.float32)
  )
  first = (head, solver.init(head), jnp.int32(0), jnp.float32(jnp.inf))
  return lax.while_loop(unfinished, step, first)[0]


def accuracy(
  head: SentimentHead,
  embeddings: np.ndarray,  # [N, D]
  labels: np.ndarray,  # [N] bool
) -> Accuracy:
  """The share of sentences whose sentiment the head tells."""
  right = (np.asarray(head.scores(embeddings)) > 0) == np.asarray(labels, bool)
  share = float(right.mean())
  error = math.sqrt(share * (1 - share) / len(right))
  return Accuracy(accuracy=share, standard_error=error, count=len(right))
