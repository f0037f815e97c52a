"""The figures of `outliers`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from efficiency_jax import leaves
from efficiency_jax import trees
from efficiency_jax.quantization import outlier_features
from efficiency_jax.quantization import recipes
from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures


def matrix(params, path: str) -> jax.Array:
  """One weight of a model.

  Raises:
    ValueError: There is none of that path.
  """
  found = dict(trees.leaves(params))
  if path not in found:
    raise ValueError(
      f'--config.layer: there is no {path}; the model has fewer layers.'
    )
  return found[path]


def outlier_map(
  found: Mapping[str, outlier_features.Features], config
) -> 'figures.Figure':
  """The largest |x| of every dimension (across) and layer (down), by kind.

  Colours are logarithmic and begin at the threshold: what is white never
  reaches it. Ticks on top are outlier features.
  """
  from matplotlib import colors

  kinds = [kind for kind in found if kind != 'head']
  figure, axes = display.figure(9.0, 1.7 * len(kinds) + 0.6, nrows=len(kinds))
  top = max(float(one.largest.max()) for one in found.values())
  norm = colors.LogNorm(config.threshold, max(top, 2 * config.threshold))
  for axis, kind in zip(np.atleast_1d(axes), kinds, strict=True):
    one = found[kind]
    shown = np.ma.masked_less(one.largest, config.threshold)
    image = axis.imshow(
      shown, aspect='auto', norm=norm, cmap='viridis_r', interpolation='none'
    )
    outliers = one.outliers(config.layers_share, config.tokens_share)
    axis.plot(outliers, np.full(len(outliers), -0.5), 'v', color='#d1602f')
    axis.set_ylabel('layer')
    axis.set_title(
      f'{kind}: {len(outliers)} outlier features of {one.share.shape[1]}',
      fontsize=9,
    )
  np.atleast_1d(axes)[-1].set_xlabel('dimension')
  figure.colorbar(image, ax=axes, label='largest |x|')
  return figure


def errors(
  weight: jax.Array, methods: Sequence[str], path: str
) -> 'figures.Figure':
  """How the errors of one matrix are distributed, by method."""
  columns = min(3, len(methods))
  lines = -(-len(methods) // columns)
  figure, axes = display.figure(
    9.0, 2.2 * lines + 0.4, nrows=lines, ncols=columns, sharex=True
  )
  scale = float(np.asarray(weight).std())
  for axis, name in zip(np.ravel(axes), methods, strict=False):
    (_, method), *_ = recipes.named(name)
    restored = leaves.dequantized_matrix(method(weight))
    error = np.ravel(np.asarray(restored - weight)) / scale
    axis.hist(error, bins=np.linspace(-1, 1, 161), color='#1f6fb4')
    axis.set_yscale('log')
    axis.set_title(f'{name}: {np.abs(error).mean():.3g} on average', fontsize=9)
    axis.spines[['top', 'right']].set_visible(False)
  for axis in np.ravel(axes)[len(methods) :]:
    axis.set_axis_off()
  figure.supxlabel('error, in standard deviations of the weights', fontsize=9)
  figure.suptitle(path, fontsize=10)
  return figure
