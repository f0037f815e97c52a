"""Tables and progress as a person reads them."""

import io

import pytest
import rich.console

from experiments import display

pytestmark = pytest.mark.short

ROWS = [
  {'method': 'plain', 'tokens_per_second': 10.12345, 'bytes': 1234567},
  {'method': 'fast', 'tokens_per_second': 4321.0, 'exact': True},
]


def test_markdown():
  assert display.table(ROWS).markdown().splitlines() == [
    '| method | tokens per second | bytes | exact |',
    '| --- | ---: | ---: | --- |',
    '| plain | 10.12 | 1,234,567 | - |',
    '| fast | 4,321 | - | yes |',
  ]


def test_chosen_columns_and_headings():
  table = display.table(ROWS, {'bytes': 'size', 'method': 'how'})
  assert table.markdown().splitlines()[0] == '| size | how |'
  table = display.table(ROWS, ['bytes'])
  assert table.markdown().splitlines()[0] == '| bytes |'


def test_a_cell_cannot_break_the_table():
  lines = display.table([{'text': 'a|b\nc\\'}]).markdown().splitlines()
  assert lines[2] == '| a\\|b c\\\\ |'


def test_the_terminal_shows_every_cell_as_it_is():
  out = io.StringIO()
  console = rich.console.Console(file=out, width=80)
  display.table([{'text': '[bold]x[/nothing]', 'n': 7}]).show(console)
  assert '[bold]x[/nothing]' in out.getvalue()
  assert '7' in out.getvalue()


def test_no_rows_are_a_table_of_headings():
  assert display.table([], ['a']).markdown() == '| a |\n| --- |'


def test_track_goes_through_everything_and_counts(capsys):
  assert list(display.track(range(3), 'steps [a]', completed=2)) == [0, 1, 2]
  printed = capsys.readouterr()
  assert printed.out == ''
  assert 'steps [a]' in printed.err
  assert '5/5' in printed.err


def test_track_of_a_stream_needs_its_length():
  assert list(display.track(iter('ab'), 'steps', total=2)) == ['a', 'b']
  with pytest.raises(ValueError, match='total'):
    list(display.track(iter('ab'), 'steps'))


def test_steps_of_training_go_on_from_where_they_were(capsys):
  with display.steps(10) as report:
    report(5, {'loss': 2.5})
    report(
      6,
      {
        'loss': 1.25,
        'tokens_per_second': 12_345.0,
        'model_flops_utilization': 0.5,
      },
    )
  shown = ' '.join(capsys.readouterr().err.split())
  assert '6/10' in shown
  assert 'loss 1.250' in shown
  assert '12,345' in shown
  assert 'MFU 50%' in shown
