"""The figures of `quantize`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures


def perplexity_by_bytes(
  rows: Sequence[Mapping[str, Any]],
) -> 'figures.Figure':
  """Perplexity over that of floats against bytes, with intervals, both in logs.

  What lies lower left of another point is smaller and better.
  """
  figure, axes = display.figure(width=8.5, height=5.5)
  most = 2.0  # beyond, a model is broken and a number says no more
  ordered = sorted(rows, key=lambda r: (r['megabytes'], r['perplexity_ratio']))
  for number, row in enumerate(ordered):
    ratio = row['perplexity_ratio']
    beyond = ratio > most
    height = min(ratio, most)
    low = max(0.0, height - row.get('perplexity_ratio_low', height))
    high = max(0.0, row.get('perplexity_ratio_high', height) - height)
    colour = '#1f6fb4' if 'A8' not in row['method'] else '#d1602f'
    axes.errorbar(
      row['megabytes'],
      height,
      yerr=None if beyond else [[low], [high]],
      fmt='^' if beyond else 'o',
      color=colour,
      markersize=5,
      capsize=2,
    )
    label = f'{row["method"]} ({ratio:.3g}x)' if beyond else row['method']
    axes.annotate(
      label,
      (row['megabytes'], height),
      textcoords='offset points',
      # Neighbours are labelled on either side.
      xytext=(-6, -8) if number % 2 else (5, 3),
      ha='right' if number % 2 else 'left',
      fontsize=7,
    )
  axes.axhline(1.0, color='black', linewidth=0.8)
  axes.set_xscale('log')
  axes.set_yscale('log')
  axes.set_xlabel('megabytes of all weights')
  axes.set_ylabel('perplexity over that of float32')
  axes.minorticks_off()
  axes.set_yticks([1, 1.02, 1.05, 1.1, 1.2, 1.5, 2])
  axes.set_yticklabels(['1', '1.02', '1.05', '1.1', '1.2', '1.5', '2+'])
  axes.set_xticks([50, 75, 100, 150, 250, 500])
  axes.set_xticklabels(['50', '75', '100', '150', '250', '500'])
  axes.spines[['top', 'right']].set_visible(False)
  return figure
