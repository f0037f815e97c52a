"""The figures that experiments draw."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures

_COLOURS = ('#1f6fb4', '#d1602f', '#3a8f5b', '#8a5bb0')


def speedup_by_length(
  rows: Sequence[Mapping[str, Any]],
) -> 'figures.Figure':
  """Speed-up over plain decoding against draft length, a panel a prompt set.

  Points are measured at fixed draft lengths, dashed lines predicted from the
  measured cost of a round, and horizontal lines measured with the adaptive one.
  """
  panels = list(
    dict.fromkeys(row['prompts'] for row in rows if '/' not in row['prompts'])
  )
  figure, axes = display.figure(
    width=4.6 * len(panels) + 0.6,
    height=4.2,
    ncols=len(panels),
    sharey=True,
    squeeze=False,
  )
  batches = list(dict.fromkeys(row['batch'] for row in rows))
  for axis, panel in zip(axes[0], panels, strict=True):
    for batch, colour in zip(batches, _COLOURS * len(batches)):
      mine = [r for r in rows if (r['prompts'], r['batch']) == (panel, batch)]
      fixed = sorted(
        (r for r in mine if r['draft_length']), key=lambda r: r['draft_length']
      )
      lengths = [r['draft_length'] for r in fixed]
      axis.plot(
        lengths,
        [r['speedup'] for r in fixed],
        'o',
        color=colour,
        label=f'batch {batch}, measured',
      )
      axis.plot(
        lengths,
        [r.get('predicted_speedup') for r in fixed],
        '--',
        color=colour,
        label=f'batch {batch}, predicted',
      )
      name = fixed[0]['method'].rpartition(',')[0] if fixed else None
      for r in mine:
        if r['method'] == name:
          axis.axhline(
            r['speedup'],
            color=colour,
            linewidth=1.2,
            label=f'batch {batch}, adaptive',
          )
    axis.axhline(1.0, color='black', linewidth=0.8)
    axis.set_title(panel)
    axis.set_xlabel('tokens drafted a round')
    axis.spines[['top', 'right']].set_visible(False)
  axes[0][0].set_ylabel('speed-up over plain decoding')
  axes[0][0].set_ylim(bottom=0)
  axes[0][-1].legend(fontsize=8, frameon=False)
  return figure
