"""The figures of `train_bnn`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from efficiency_jax.types import Params
from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures

_FILTERS = 12


def errors(rows: Sequence[Mapping[str, Any]]) -> 'figures.Figure':
  """Validation error after every epoch: means, and bands from least to most."""
  figure, axes = display.figure(8.0, 4.5)
  for method in dict.fromkeys(row['method'] for row in rows):
    curves = np.array([r['curve'] for r in rows if r['method'] == method])
    epochs = np.arange(1, curves.shape[1] + 1)
    (line,) = axes.plot(epochs, curves.mean(0), label=method, linewidth=1.2)
    if len(curves) > 1:
      band = curves.min(0), curves.max(0)
      axes.fill_between(epochs, *band, color=line.get_color(), alpha=0.2)
  axes.set_yscale('log')
  axes.set_xlabel('epoch')
  axes.set_ylabel('validation error, %')
  axes.legend(fontsize=8, frameon=False)
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def weights(
  method: str, params: Params, image: tuple[int, int, int]
) -> 'figures.Figure':
  """Latent weights of every layer, and filters of the first as images."""
  layers = list(params.items())
  figure, axes = display.figure(9.0, 4.0, nrows=2, ncols=max(len(layers), 2))
  for axis, (name, leaf) in zip(axes[0], layers, strict=False):
    axis.hist(np.ravel(leaf['kernel']), bins=80, color='#1f6fb4')
    axis.set_title(name, fontsize=8)
    axis.set_yticks([])
    axis.tick_params(labelsize=7)
  for axis in axes[0][len(layers) :]:
    axis.set_axis_off()
  for axis in axes[1]:
    axis.set_axis_off()
  kernel = np.asarray(layers[0][1]['kernel'])
  shape = kernel.shape[:3] if kernel.ndim == 4 else image
  tiles = kernel[..., :_FILTERS].reshape(*shape, -1).mean(2)
  line = np.concatenate(
    [
      np.pad(tiles[..., n], 1, constant_values=1) for n in range(tiles.shape[2])
    ],
    axis=1,
  )
  wide = figure.add_subplot(2, 1, 2)
  wide.imshow(line, cmap='gray', interpolation='none')
  wide.set_axis_off()
  wide.set_title('filters of the first layer, latent', fontsize=8)
  figure.suptitle(method, fontsize=10)
  return figure
