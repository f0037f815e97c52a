"""The figures of `quantize_encoder`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures

_BLUE, _RED = '#1f6fb4', '#d1602f'


def accuracy(rows: Sequence[Mapping[str, Any]]) -> 'figures.Figure':
  """Right answers and the similarity of embeddings, by method."""
  figure, (left, right) = display.figure(
    9.0, 0.3 * len(rows) + 1.2, ncols=2, sharey=True
  )
  names = [
    f'{row["method"]} ({row["bits_per_weight"]:.3g} bits)' for row in rows
  ]
  places = range(len(rows))
  left.errorbar(
    [100 * row['accuracy'] for row in rows],
    places,
    xerr=[100 * row['standard_error'] for row in rows],
    fmt='o',
    color=_BLUE,
    capsize=2,
  )
  left.axvline(100 * rows[0]['accuracy'], color='black', linewidth=0.8)
  left.set_yticks(places, names)
  left.invert_yaxis()
  left.set_xlabel('SST-2, % right (one standard error)')
  right.plot([1 - row['cosine'] for row in rows[1:]], places[1:], 'o', c=_RED)
  right.set_xscale('log')
  right.set_xlabel('1 - cosine to the float embedding')
  for axis in (left, right):
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(axis='y', alpha=0.2)
  return figure


def training(rows: Sequence[Mapping[str, Any]]) -> 'figures.Figure':
  """Right answers after fine-tuning, means and deviations over seeds."""
  figure, axes = display.figure(7.0, 0.4 * len(rows) + 1.2)
  colours = [_RED if 'rounded' in row['method'] else _BLUE for row in rows]
  axes.barh(
    range(len(rows)),
    [100 * row['accuracy'] for row in rows],
    xerr=[100 * (row['deviation'] or 0.0) for row in rows],
    color=colours,
    capsize=3,
  )
  axes.set_yticks(range(len(rows)), [row['method'] for row in rows])
  axes.invert_yaxis()
  axes.set_xlim(left=45)
  axes.set_xlabel('SST-2, % right (means and deviations over seeds)')
  axes.spines[['top', 'right']].set_visible(False)
  return figure


def sensitivities(
  found: Mapping[str, float], bits: Mapping[str, int]
) -> 'figures.Figure':
  """How sharply the loss bends along each part, and the bits it got."""
  figure, axes = display.figure(8.0, 3.6)
  places = range(len(found))
  most = max(bits.values())
  axes.bar(
    places,
    list(found.values()),
    color=[_BLUE if bits[name] == most else _RED for name in found],
  )
  for place, (name, value) in enumerate(found.items()):
    axes.annotate(
      f'{bits[name]} bits', (place, value), ha='center', va='bottom', fontsize=7
    )
  axes.set_yscale('log')
  axes.set_xticks(places, list(found), rotation=45, ha='right', fontsize=8)
  axes.set_ylabel('|mean| + deviation of\ntop eigenvalues')
  axes.spines[['top', 'right']].set_visible(False)
  return figure
