"""The figures of `quantize`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures

_BLUE, _RED = '#1f6fb4', '#d1602f'
_INTEGERS = ('SmoothQuant', 'LLM.int8')  # and those that say A8


def perplexity_by_bytes(
  rows: Sequence[Mapping[str, Any]],
) -> 'figures.Figure':
  """Perplexity lost to floats against bytes, with intervals, both in logs.

  What lies lower left of another point is smaller and better. A method that
  loses less than can be told lies on the lower edge, and so do the floats.
  """
  figure, axes = display.figure(width=8.5, height=5.5)
  least = 0.03
  lost = lambda ratio: max(100 * (ratio - 1), least)
  ordered = sorted(rows, key=lambda row: row['perplexity_ratio'])
  for number, row in enumerate(ordered):
    height = lost(row['perplexity_ratio'])
    low = height - lost(row['perplexity_ratio_low'])
    high = lost(row['perplexity_ratio_high']) - height
    # Nothing is written across the axis.
    rise = 5 if height == least else -3
    integers = 'A8' in row['method'] or row['method'] in _INTEGERS
    axes.errorbar(
      row['megabytes'],
      height,
      yerr=[[max(low, 0.0)], [max(high, 0.0)]],
      fmt='o',
      color=_RED if integers else _BLUE,
      markersize=5,
      capsize=2,
    )
    axes.annotate(
      row['method'],
      (row['megabytes'], height),
      textcoords='offset points',
      # Neighbours are labelled on either side.
      xytext=(-7 if number % 2 else 7, rise),
      ha='right' if number % 2 else 'left',
      fontsize=7,
    )
  axes.plot([], [], 'o', color=_BLUE, label='floats times dequantized weights')
  axes.plot([], [], 'o', color=_RED, label='integers times integers')
  axes.legend(fontsize=7, frameon=False)
  axes.set_xscale('log')
  axes.set_yscale('log')
  axes.set_ylim(bottom=least)
  axes.set_xlabel('megabytes of all weights')
  axes.set_ylabel('perplexity lost to float32, %')
  axes.set_xticks([50, 75, 100, 150, 250, 500])
  axes.set_xticklabels(['50', '75', '100', '150', '250', '500'])
  axes.minorticks_off()
  axes.spines[['top', 'right']].set_visible(False)
  return figure
