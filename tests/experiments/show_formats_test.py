"""A row a format, and a figure."""

import json
import pathlib

from experiments import show_formats

CONFIG = pathlib.Path(__file__).parents[2] / 'configs/show_formats.py'


def test_every_format_has_a_row(tmp_path):
  show_formats.main(
    ['show_formats', f'--config={CONFIG}:tiny', f'--workdir={tmp_path / "x"}']
  )
  rows = json.loads((tmp_path / 'x/results.json').read_text())['rows']
  by_name = {row['method']: row for row in rows}
  assert by_name['fp32']['relative_error'] == 0
  assert by_name['fp16']['bits_of_3.14159'] == '0 10000 1001001000'
  assert (
    7
    < (by_name['bf16']['relative_error'] / by_name['fp16']['relative_error'])
    < 9
  )
  assert (tmp_path / 'x/bits.png').exists()
