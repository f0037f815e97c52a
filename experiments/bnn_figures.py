"""The figures of `train_bnn`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from efficiency_jax.types import Params
from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures

_FILTERS = 12
_BINS = 60


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
  for set_formatter in (
    axes.yaxis.set_major_formatter,
    axes.yaxis.set_minor_formatter,
  ):
    set_formatter('{x:g}')
  axes.set_xlabel('epoch')
  axes.set_ylabel('validation error, %')
  axes.legend(fontsize=8, frameon=False)
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def weights(
  method: str,
  history: Sequence[Mapping[str, np.ndarray]],
  params: Params,
  image: tuple[int, int, int],
) -> 'figures.Figure':
  """Latent weights of every layer by epoch, and filters of the first layer.

  Args:
    method: The title.
    history: Some weights of every layer, before training and after each epoch.
    params: Of the epoch that was kept.
    image: Height, width and channels.
  """
  layers = list(params)
  wide = max(9.0, 1.5 * len(layers))  # no label reaches into the next one
  figure, axes = display.figure(wide, 5.5, nrows=3, ncols=max(len(layers), 2))
  for axis in axes.flat:
    axis.set_axis_off()
  for column, name in enumerate(layers):
    values = np.stack([epoch[name] for epoch in history])
    _by_epoch(axes[0][column], values)
    axes[0][column].set_title(name, fontsize=8)
    axis = axes[1][column]
    axis.set_axis_on()
    axis.hist(np.ravel(params[name]['kernel']), bins=80, color='#1f6fb4')
    axis.set_yticks([])
    axis.tick_params(labelsize=7)
    axis.set_xlabel('weight, epoch kept', fontsize=7)
  axes[0][0].set_ylabel('weight', fontsize=7)
  kernel = np.asarray(params[layers[0]]['kernel'])
  shape = kernel.shape[:3] if kernel.ndim == 4 else image
  tiles = kernel[..., :_FILTERS].reshape(*shape, -1).mean(2)
  line = np.concatenate(
    [
      np.pad(tiles[..., n], 1, constant_values=1) for n in range(tiles.shape[2])
    ],
    axis=1,
  )
  below = figure.add_subplot(3, 1, 3)
  below.imshow(line, cmap='gray', interpolation='none')
  below.set_axis_off()
  below.set_title('filters of the first layer, latent', fontsize=8)
  figure.suptitle(method, fontsize=10)
  return figure


def _by_epoch(axis, values: np.ndarray) -> None:
  """Histograms of values [epochs, n] side by side, logarithms of counts."""
  largest = float(np.abs(values).max()) or 1.0
  edges = np.linspace(-largest, largest, _BINS + 1)
  counts = [np.histogram(epoch, edges)[0] for epoch in values]
  axis.set_axis_on()
  axis.imshow(
    np.log1p(np.transpose(counts)),
    aspect='auto',
    origin='lower',
    cmap='Blues',
    extent=(-0.5, len(values) - 0.5, -largest, largest),
  )
  axis.set_xlabel('epoch', fontsize=7)
  axis.tick_params(labelsize=7)
