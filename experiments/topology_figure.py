"""The figure of `compile_topology`: what each chip holds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from efficiency_jax.distributed import topology
from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures


def memory(rows: Sequence[Mapping[str, Any]]) -> 'figures.Figure':
  """Memory a chip against the number of chips, a line a model and kind.

  Crosses are programs that do not fit, at the memory that they need.
  """
  figure, axis = display.figure()
  lines = {}
  for row in rows:
    lines.setdefault(_label(row), []).append(row)
  for label, line in lines.items():
    line = sorted(line, key=lambda row: row['chips'])
    points = [(row['chips'], row['hbm_gigabytes']) for row in line]
    (drawn,) = axis.plot(*zip(*points), 'o-', label=label)
    failed = [row for row in line if not row['fits']]
    axis.plot(
      [row['chips'] for row in failed],
      [row['hbm_gigabytes'] for row in failed],
      'x',
      color=drawn.get_color(),
      markersize=12,
      markeredgewidth=2,
    )
  for kind in sorted({_kind(row) for row in rows}):
    size = topology.CHIPS[kind].hbm_bytes / 1e9
    axis.axhline(size, linestyle='--', color='black', linewidth=0.8)
    axis.annotate(
      f'memory of a {kind} chip',
      (1, size),
      xycoords=('axes fraction', 'data'),
      ha='right',
      va='bottom',
    )
  if not all(row['fits'] for row in rows):
    axis.plot([], [], 'x', color='black', label='does not fit')
  axis.set_xscale('log', base=2)
  chips = sorted({row['chips'] for row in rows})
  axis.set_xticks(chips, [str(n) for n in chips])
  axis.minorticks_off()
  axis.set_xlabel('chips')
  axis.set_ylabel('GB a chip')
  axis.set_ylim(bottom=0)
  axis.legend(frameon=False, fontsize=8)
  axis.spines[['top', 'right']].set_visible(False)
  return figure


def _kind(row: Mapping[str, Any]) -> str:
  return row['topology'].partition(':')[0]


def _label(row: Mapping[str, Any]) -> str:
  split = f', tensor {row["tensor"]}' if row['tensor'] > 1 else ''
  return f'{row["model"]}, {_kind(row)}{split}'
