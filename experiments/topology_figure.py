"""The figure of `compile_topology`: what each chip holds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from efficiency_jax.distributed import topology
from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures


def memory(rows: Sequence[Mapping[str, Any]]) -> 'figures.Figure':
  """Memory a chip against the number of chips, a line a model."""
  figure, axis = display.figure()
  lines = {}
  for row in rows:
    kind = row['topology'].partition(':')[0]
    lines.setdefault((row['model'], kind), []).append(row)
  for (model, kind), line in lines.items():
    line = sorted(line, key=lambda row: row['chips'])
    points = [(row['chips'], row['hbm_gigabytes']) for row in line]
    axis.plot(*zip(*points), 'o-', label=f'{model}, {kind}')
  for kind in sorted({kind for _, kind in lines}):
    size = topology.CHIPS[kind].hbm_bytes / 1e9
    axis.axhline(size, linestyle='--', color='black', linewidth=0.8)
    axis.annotate(f'memory of {kind}', (4, size), va='bottom')
  axis.set_xscale('log', base=2)
  axis.set_xlabel('chips')
  axis.set_ylabel('GB a chip')
  axis.set_ylim(bottom=0)
  axis.legend(frameon=False, fontsize=8)
  axis.spines[['top', 'right']].set_visible(False)
  return figure
