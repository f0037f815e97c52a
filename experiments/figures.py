"""The figures that experiments draw."""

from collections.abc import Mapping, Sequence
import itertools
from typing import TYPE_CHECKING, Any

from experiments import display

if TYPE_CHECKING:
  from matplotlib import figure as figures

_COLOURS = (
  '#1f6fb4',
  '#d1602f',
  '#3a8f5b',
  '#8a5bb0',
  '#222222',
  '#c2a02c',
  '#2aa7a7',
  '#c24e8a',
)


def speedup_by_length(
  rows: Sequence[Mapping[str, Any]],
) -> 'figures.Figure':
  """Speed-up over plain decoding against draft length, a colour a drafter.

  Points are measured at fixed draft lengths, dashed lines predicted from the
  measured cost of a round, and horizontal lines measured with the adaptive one.
  There is a panel for each set of prompts at each batch size.
  """
  rows = [r for r in rows if '/' not in r['prompts'] and r['method'] != 'plain']
  panels = list(dict.fromkeys((r['prompts'], r['batch']) for r in rows))
  figure, axes = display.figure(
    width=4.6 * len(panels) + 0.6,
    height=4.2,
    ncols=len(panels),
    sharey=True,
    squeeze=False,
  )
  drafted = lambda row: row['nodes'] - 1  # the root of a draft is no guess
  # 'eagle chain, 3' is the drafter 'eagle chain' with three tokens a round.
  drafter = lambda row: (
    row['method'].rpartition(', ')[0] if row['nodes'] else row['method']
  )
  names = list(dict.fromkeys(map(drafter, rows)))
  for axis, panel in zip(axes[0], panels, strict=True):
    mine = [r for r in rows if (r['prompts'], r['batch']) == panel]
    for name, colour in zip(names, _COLOURS * len(names)):
      found = [r for r in mine if drafter(r) == name]
      fixed = sorted((r for r in found if r['nodes']), key=drafted)
      lengths = list(map(drafted, fixed))
      if fixed:
        measured = [r['speedup'] for r in fixed]
        axis.plot(lengths, measured, 'o', color=colour, label=name)
        predicted = [r.get('predicted_speedup') for r in fixed]
        axis.plot(lengths, predicted, '_--', color=colour, markersize=9)
      for row in found:
        if not row['nodes']:
          axis.axhline(
            row['speedup'],
            color=colour,
            linewidth=1.2,
            label=f'{name}, adaptive',
          )
    axis.axhline(1.0, color='black', linewidth=0.8)
    axis.set_xticks(sorted({drafted(r) for r in mine if r['nodes']}))
    axis.set_title(f'{panel[0]}, batch {panel[1]}')
    axis.set_xlabel('tokens drafted a round')
    axis.spines[['top', 'right']].set_visible(False)
  axes[0][0].set_ylabel('speed-up over plain decoding; dashes predicted')
  axes[0][0].set_ylim(bottom=0)
  axes[0][-1].legend(fontsize=8, frameon=False)
  return figure


def speeds(rows: Sequence[Mapping[str, Any]]) -> 'figures.Figure':
  """Bars of tokens per second, with what reading the weights allows."""
  batches = list(dict.fromkeys(row['batch'] for row in rows))
  groups = [[r for r in rows if r['batch'] == batch] for batch in batches]
  figure, axes = display.figure(
    width=8.5,
    height=1.6 + 0.45 * len(rows),
    nrows=len(groups),
    squeeze=False,
    height_ratios=[len(group) for group in groups],
  )
  for axis, group in zip(axes[:, 0], groups, strict=True):
    places = range(len(group))
    rates = [row.get('tokens_per_second', 0) for row in group]
    named = False
    axis.barh(
      places,
      rates,
      xerr=[row.get('tokens_per_second_spread', 0) / 2 for row in group],
      color=[
        '#1f6fb4' if 'temporary_bytes' in row else '#b8bcc2' for row in group
      ],
      height=0.62,
      error_kw={'ecolor': '#444444', 'elinewidth': 1, 'capsize': 2},
    )
    for place, row in zip(places, group, strict=True):
      label = row.get('note')
      if not label:
        label = (
          f'{row["tokens_per_second"]:,.1f} ({row["speedup"]:.2f}x),'
          f' {row["weight_bytes"] / 1e6:,.0f} MB'
        )
        axis.plot(
          [row['roofline_tokens_per_second']] * 2,
          [place - 0.4, place + 0.4],
          color='#222222',
          linewidth=2,
          label=None if named else 'what one read of the weights a step allows',
        )
        named = True
      axis.text(
        1.02 if 'texts' in row else 0.01,
        place,
        label,
        transform=axis.get_yaxis_transform(),
        va='center',
        fontsize=9,
      )
    axis.set_yticks(places, [row['method'] for row in group])
    axis.invert_yaxis()
    axis.set_title(f'batch {group[0]["batch"]}', loc='left', fontsize=10)
    axis.set_xlim(left=0)
    axis.spines[['top', 'right']].set_visible(False)
  axes[0, 0].text(
    1.02,
    1.0,
    'tokens/s (over plain), weights',
    transform=axes[0, 0].transAxes,
    va='bottom',
    fontsize=9,
  )
  axes[-1, 0].set_xlabel('tokens a second')
  figure.legend(
    *axes[0, 0].get_legend_handles_labels(),
    frameon=False,
    fontsize=9,
    loc='outside upper center',
  )
  return figure


def kernels(rows: Sequence[Mapping[str, Any]]) -> 'figures.Figure':
  """Time and memory against sequence length, two panels an operation.

  Operations of one length have no panel beside others that grow.
  """
  lengths = {row['operation']: set() for row in rows}
  for row in rows:
    lengths[row['operation']].add(row['sequence_length'])
  grown = [name for name, found in lengths.items() if len(found) > 1]
  operations = grown or list(lengths)
  all_names = dict.fromkeys(row['implementation'] for row in rows)
  colours = dict(zip(all_names, itertools.cycle(_COLOURS)))
  figure, axes = display.figure(
    width=4.2 * len(operations) + 0.6,
    height=6.4,
    nrows=2,
    ncols=len(operations),
    squeeze=False,
    sharex='col',
  )
  for column, operation in enumerate(operations):
    mine = [row for row in rows if row['operation'] == operation]
    names = list(dict.fromkeys(row['implementation'] for row in mine))
    for name in names:
      points = [row for row in mine if row['implementation'] == name]
      sizes = [row['sequence_length'] for row in points]
      for line, field in enumerate(('milliseconds', 'peak_megabytes')):
        axes[line, column].loglog(
          sizes,
          [row[field] for row in points],
          'o-',
          color=colours[name],
          label=name,
        )
    sizes = sorted(lengths[operation])
    axes[0, column].set_title(operation, fontsize=10)
    axes[0, column].legend(fontsize=8, frameon=False)
    axes[1, column].set_xlabel('sequence length')
    axes[1, column].set_xticks(sizes, [str(n) for n in sizes])
    for axis in axes[:, column]:
      axis.tick_params(axis='x', which='minor', bottom=False, labelbottom=False)
  axes[0, 0].set_ylabel('milliseconds')
  axes[1, 0].set_ylabel('MB of scratch and outputs')
  for axis in axes.flat:
    axis.yaxis.get_major_locator().set_params(subs=(1, 3))
    axis.yaxis.set_major_formatter('{x:g}')
    axis.yaxis.set_minor_formatter('')
    axis.spines[['top', 'right']].set_visible(False)
  return figure


def coverage(counts: Sequence[int]) -> 'figures.Figure':
  """Share of all tokens that the most frequent ones make up."""
  ordered = sorted((int(count) for count in counts), reverse=True)
  sums = list(itertools.accumulate(ordered))
  figure, axis = display.figure(width=5.4, height=3.8)
  axis.plot(
    range(1, len(sums) + 1),
    [100 * value / max(sums[-1], 1) for value in sums],
    color=_COLOURS[0],
  )
  axis.set_xscale('log')
  axis.set_xlabel('most frequent tokens')
  axis.set_ylabel('share of the answers, %')
  axis.set_title('How much of the text few tokens cover')
  axis.grid(alpha=0.3)
  return figure


def training(history: Sequence[Mapping[str, Any]]) -> 'figures.Figure':
  """The loss of every step and of evaluations, and alpha of each guess."""
  figure, (losses, alphas) = display.figure(width=8.6, height=3.8, ncols=2)
  steps = [entry for entry in history if 'loss' in entry]
  held_out = [entry for entry in history if 'validation_loss' in entry]
  losses.plot(
    [entry['step'] for entry in steps],
    [entry['loss'] for entry in steps],
    color=_COLOURS[0],
    linewidth=0.8,
    alpha=0.6,
    label='a step',
  )
  places = [entry['step'] for entry in held_out]
  losses.plot(
    places,
    [entry['validation_loss'] for entry in held_out],
    'o-',
    color=_COLOURS[1],
    label='held-out answers',
  )
  losses.set_title('loss')
  names = [
    name
    for name in (held_out[0] if held_out else {})
    if name.startswith('validation_alpha_')
  ]
  for name, colour in zip(names, itertools.cycle(_COLOURS)):
    alphas.plot(
      places,
      [entry[name] for entry in held_out],
      'o-',
      color=colour,
      label=f'guess {name.rpartition("_")[2]}',
    )
  alphas.set_title('chance that a guess is kept, alpha = 1 - TV')
  alphas.set_ylim(0, 1)
  for axis in (losses, alphas):
    axis.set_xlabel('step')
    axis.spines[['top', 'right']].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
      axis.legend(frameon=False, fontsize=8)
  return figure
