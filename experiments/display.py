"""What a person sees of a run: tables, a progress bar, an empty figure."""

import collections.abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import rich.console
import rich.progress
import rich.table
import rich.text

if TYPE_CHECKING:  # slow to import, and many runs draw nothing
  from matplotlib import axes as plots
  from matplotlib import figure as figures

_Item = TypeVar('_Item')


@dataclasses.dataclass(frozen=True)
class Table:
  """Rows of results, ready for a terminal or a report.

  Attributes:
    columns: The heading of each field to show, in order.
    rows: The rows; a field that a row lacks is shown as a dash.
  """

  columns: Mapping[str, str]
  rows: Sequence[Mapping[str, Any]]

  def markdown(self) -> str:
    """The table in GitHub's Markdown, numbers to the right."""
    lines = [
      [_escape(heading) for heading in self.columns.values()],
      ['---:' if self._numeric(c) else '---' for c in self.columns],
      *[[_escape(cell) for cell in row] for row in self._cells()],
    ]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)

  def show(self, console: rich.console.Console | None = None) -> None:
    """Prints the table, from process 0 alone."""
    if jax.process_index() != 0:
      return
    table = rich.table.Table()
    for column, heading in self.columns.items():
      side = 'right' if self._numeric(column) else 'left'
      table.add_column(rich.text.Text(heading), justify=side, overflow='fold')
    for row in self._cells():
      table.add_row(*[rich.text.Text(cell) for cell in row])
    if console is None:
      # Into a file or a pipe, the table is as wide as it needs to be.
      console = rich.console.Console()
      if not console.is_terminal:
        console = rich.console.Console(width=200)
    console.print(table)

  def _cells(self) -> list[list[str]]:
    return [[_cell(row.get(c)) for c in self.columns] for row in self.rows]

  def _numeric(self, column: str) -> bool:
    values = [row.get(column) for row in self.rows]
    values = [value for value in values if value is not None]
    return bool(values) and all(
      isinstance(value, int | float) and not isinstance(value, bool)
      for value in values
    )


def table(
  rows: Sequence[Mapping[str, Any]],
  columns: Mapping[str, str] | Sequence[str] | None = None,
) -> Table:
  """Lays out rows of results.

  Args:
    rows: Flat result rows.
    columns: Fields to show, or a mapping of fields to headings. None shows
      every field, in the order in which rows first have them. A field's own
      name makes a heading by turning its underscores into spaces.
  """
  if columns is None:
    columns = list(dict.fromkeys(field for row in rows for field in row))
  if not isinstance(columns, Mapping):
    columns = {field: field.replace('_', ' ') for field in columns}
  return Table(columns, rows)


def track(
  items: Iterable[_Item],
  description: str,
  *,
  total: int | None = None,
  completed: int = 0,
) -> Iterator[_Item]:
  """Goes through `items` with a progress bar: count, rate and time left.

  The bar is drawn on the error stream of process 0.

  Args:
    items: What to go through.
    description: What is being done.
    total: How many steps the whole work has; None means `len(items)` and
      `completed`.
    completed: Steps that an earlier, interrupted run had done already.
  """
  if total is None:
    if not isinstance(items, collections.abc.Sized):
      raise ValueError('total must be given for items without a length.')
    total = completed + len(items)
  with _progress() as progress:
    task = progress.add_task(description, total=total, completed=completed)
    for item in items:
      yield item
      progress.advance(task)


@contextlib.contextmanager
def steps(total: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
  """A progress bar of training: what `training.loop.fit` reports to.

  It shows the step, the loss, tokens a second, the share of the peak
  arithmetic where that is known, and the time left.
  """
  with _progress(rich.progress.TextColumn('{task.fields[numbers]}')) as bar:
    task = bar.add_task('training', total=total, numbers='', start=False)

    def report(step: int, numbers: Mapping[str, float]) -> None:
      if not bar.tasks[task].started:
        # Rate and time left count from where this process began.
        bar.update(task, completed=step - 1)
        bar.start_task(task)
      shown = [f'loss {numbers["loss"]:.3f}']
      if 'tokens_per_second' in numbers:
        shown.append(f'{_cell(numbers["tokens_per_second"])} tokens/s')
      if 'model_flops_utilization' in numbers:
        shown.append(f'MFU {numbers["model_flops_utilization"]:.0%}')
      bar.update(task, completed=step, numbers=', '.join(shown))

    yield report


def _progress(*columns) -> rich.progress.Progress:
  return rich.progress.Progress(
    rich.progress.TextColumn('{task.description}', markup=False),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    _Rate(),
    rich.progress.TimeRemainingColumn(),
    *columns,
    console=rich.console.Console(stderr=True),
    speed_estimate_period=600.0,  # a slow step takes minutes
    disable=jax.process_index() != 0,
  )


def figure(
  width: float = 7.0, height: float = 4.0, **subplots: Any
) -> tuple['figures.Figure', 'plots.Axes']:
  """An empty figure in inches and its axes; it needs no screen.

  Args:
    width: Inches across.
    height: Inches down.
    **subplots: Passed to `matplotlib.figure.Figure.subplots`.
  """
  from matplotlib import figure as figures

  empty = figures.Figure(figsize=(width, height), layout='constrained')
  return empty, empty.subplots(**subplots)


class _Rate(rich.progress.ProgressColumn):
  """Steps a second, or seconds a step for slow ones."""

  def render(self, task: rich.progress.Task) -> rich.text.Text:
    """The rate over the last steps, or over the whole when it is finished."""
    speed = task.finished_speed or task.speed
    if not speed:
      return rich.text.Text('-/s')
    if speed < 1:
      return rich.text.Text(f'{_cell(1 / speed)} s each')
    return rich.text.Text(f'{_cell(speed)}/s')


def _cell(value: Any) -> str:
  """A value as a person wants to read it: four digits, thousands apart."""
  if value is None or value != value:  # nothing, or not a number
    return '-'
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, int):
    return f'{value:,}' if abs(value) >= 10_000 else str(value)
  if isinstance(value, float):
    if 1000 <= abs(value) < 1e15:
      return f'{value:,.0f}'
    return f'{value:.4g}'
  return str(value)


def _escape(cell: str) -> str:
  """The cell as text that cannot break out of a Markdown table."""
  return ' '.join(cell.split()).replace('\\', '\\\\').replace('|', '\\|')
