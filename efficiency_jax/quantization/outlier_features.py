"""Outlier features: dimensions whose activations are large everywhere.

LLM.int8() (arXiv 2208.07339, section 4) calls dimension i of hidden states an
outlier feature if |x_i| >= 6 in at least 25 % of the layers and in at least 6 %
of the tokens of all layers. They coarsen the scale of every row they are in,
and are few, so that they can be kept apart. Here each kind of product is looked
at by itself; the paper leaves the second product of the feed-forward out.
"""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.quantization import calibration
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Params


class Reached(NamedTuple):
  """How often the columns of some rows x [N, K] reach a threshold.

  Attributes:
    rows: [] int32, N.
    counts: [K] int32, rows with |x| >= threshold.
    largest: [K] float32, the largest |x|.
  """

  rows: jax.Array
  counts: jax.Array
  largest: jax.Array


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Features:
  """What one kind of product multiplies, in every layer.

  Attributes:
    share: [L, K] float64, the part of the tokens that reach the threshold.
    largest: [L, K] float32, the largest |x|.
  """

  share: np.ndarray
  largest: np.ndarray

  def outliers(
    self, layers_share: float = 0.25, tokens_share: float = 0.06
  ) -> np.ndarray:
    """The dimensions that are outlier features, in increasing order."""
    layers = (self.share > 0).mean(0)
    tokens = self.share.mean(0)
    return np.flatnonzero((layers >= layers_share) & (tokens >= tokens_share))

  @property
  def columns(self) -> float:
    """How many columns a layer has on average that reach it in any token."""
    return float((self.share > 0).sum(1).mean())


def observe(
  apply: ApplyFn,
  params: Params,
  batches: Iterable[tuple[np.ndarray, np.ndarray]],
  threshold: float = 6.0,
) -> dict[str, Features]:
  """Looks at what every kernel of a decoder multiplies.

  Args:
    apply: The model.
    params: Its parameters.
    batches: Tokens and segments, [B, T] each; segment 0 is padding and does not
      count.
    threshold: From where on |x| is an outlier.

  Returns:
    By kind, which is the path within a layer ('attention/qkv'); 'head' is what
    the output head multiplies, one layer of it.

  Raises:
    ValueError: There are no batches.
  """
  see = jax.jit(functools.partial(_reached, apply, threshold))
  total: dict[str, Reached] = {}
  for tokens, segments in batches:
    for path, found in see(params, tokens, segments).items():
      total[path] = _merge(total[path], found) if path in total else found
  if not total or not any(int(one.rows) for one in total.values()):
    raise ValueError('batches must hold at least one batch with a token in it.')
  for path, one in total.items():
    if not np.isfinite(one.largest).all():
      raise ValueError(
        f'what {path} multiplies is not finite: check the model or its dtype.'
      )
  return by_kind(total)


def by_kind(found: Mapping[str, Reached]) -> dict[str, Features]:
  """Statistics by the path of a weight, as layers of each kind of product."""
  kinds: dict[str, dict[int, Reached]] = {}
  for path, one in found.items():
    layer = re.match(r'layers_(\d+)/(.*)/kernel$', path)
    kind, number = (layer[2], int(layer[1])) if layer else ('head', 0)
    kinds.setdefault(kind, {})[number] = jax.tree.map(np.asarray, one)
  # Compiled functions return dictionaries in the order of their keys, which for
  # layers_10 and layers_2 is not that of the layers.
  ordered = {kind: [of[n] for n in sorted(of)] for kind, of in kinds.items()}
  return {
    kind: Features(
      share=np.stack([one.counts / one.rows for one in layers]),
      largest=np.stack([one.largest for one in layers]),
    )
    for kind, layers in ordered.items()
  }


def reached(x: jax.Array, threshold: float, mask: jax.Array) -> Reached:
  """Of x [..., K] where the mask [...] is set."""
  size = jnp.where(mask[..., None], jnp.abs(x.astype(jnp.float32)), -1.0)
  size = size.reshape(-1, x.shape[-1])
  return Reached(
    rows=mask.sum(dtype=jnp.int32),
    counts=(size >= threshold).sum(0, dtype=jnp.int32),
    largest=jnp.maximum(size.max(0), 0.0),
  )


def _reached(apply, threshold, params, tokens, segments) -> dict[str, Reached]:
  statistic: Callable[[jax.Array], Reached] = lambda x: reached(
    x, threshold, segments > 0
  )
  run = calibration.captured(apply, statistic)
  return run(params, tokens, segments=segments)


def _merge(a: Reached, b: Reached) -> Reached:
  return Reached(
    a.rows + b.rows, a.counts + b.counts, jnp.maximum(a.largest, b.largest)
  )
