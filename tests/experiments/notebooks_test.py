"""The notebooks: each source runs, and the .ipynb is made from it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = sorted((ROOT / 'experiments/notebooks').glob('*.py'))
NAMES = [path.stem for path in SOURCES]

MAX_BYTES = 400_000
SIZES = {
  'flash_attention': {
    'LENGTHS = (1024, 2048, 4096, 8192)': 'LENGTHS = (512, 1024)'
  },
}
# What the text between the cells says of the results.
CLAIMS = {
  'flash_attention': """
for n in (512, 4096):  # no library hides the matrix from the compiler's plan
  assert scratch_bytes(naive, *random_arrays(n)) >= 4 * n * n
n = LENGTHS[-1]
of_naive, *others = [scratch for _, scratch in results[n].values()]
assert all(scratch < of_naive / 2 for scratch in others)
matrix, (of_naive, kept, again) = 4 * n * n, backward_scratch.values()
assert min(of_naive, kept) > matrix > 3 * again
""",
}


def _cells(source: str) -> list[tuple[str, str]]:
  """Kind and text of each cell of a source in the percent format."""
  cells = []
  for line in source.splitlines():
    if line.startswith('# %%'):
      cells.append(('markdown' if '[markdown]' in line else 'code', []))
    elif cells:  # before the first cell stands the header
      kind, lines = cells[-1]
      lines.append(line if kind == 'code' else line.removeprefix('#')[1:])
  return [(kind, '\n'.join(lines).strip('\n')) for kind, lines in cells]


def _notebook(path: pathlib.Path) -> dict:
  return json.loads(path.with_suffix('.ipynb').read_text(encoding='utf-8'))


def test_there_are_notebooks():
  assert set(NAMES) == set(SIZES) == set(CLAIMS)


@pytest.mark.parametrize('path', SOURCES, ids=NAMES)
def test_the_source_runs_in_a_fresh_process(path, tmp_path):
  source = path.read_text(encoding='utf-8')
  for large, small in SIZES[path.stem].items():
    assert source.count(large) == 1
    source = source.replace(large, small)
  script = tmp_path / path.name
  script.write_text(source + CLAIMS[path.stem], encoding='utf-8')
  # The backend has no window, and says so at each plt.show().
  quiet = 'ignore:FigureCanvasAgg is non-interactive:UserWarning'
  run = subprocess.run(
    [sys.executable, '-W', 'error', '-W', quiet, str(script)],
    cwd=tmp_path,
    env=os.environ | {'MPLBACKEND': 'Agg', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize('path', SOURCES, ids=NAMES)
def test_the_notebook_is_made_from_the_source(path):
  made = [
    (cell['cell_type'], ''.join(cell['source']))
    for cell in _notebook(path)['cells']
  ]
  assert made == _cells(path.read_text(encoding='utf-8')), 'make notebooks'


@pytest.mark.parametrize('path', SOURCES, ids=NAMES)
def test_the_notebook_was_run_and_is_small(path):
  code = [c for c in _notebook(path)['cells'] if c['cell_type'] == 'code']
  counts = [cell['execution_count'] for cell in code]
  assert counts == list(range(1, len(code) + 1))  # in order, in one process
  outputs = [output for cell in code for output in cell['outputs']]
  kinds = [output['output_type'] for output in outputs]
  assert 'error' not in kinds
  # Warnings go there; they hold the paths of whoever ran it.
  assert 'stderr' not in [output.get('name') for output in outputs]
  assert any('image/png' in output.get('data', {}) for output in outputs)
  assert path.with_suffix('.ipynb').stat().st_size < MAX_BYTES
