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
  'binarized_networks': {
    'EPOCHS = 12': 'EPOCHS = 2',
    'WIDTH = 512': 'WIDTH = 64',
    "digits = images.load('mnist-10k')": """
rng = np.random.default_rng(0)
patterns = rng.uniform(0, 255, (10, 8, 8, 1))


def some(count):
  labels = rng.integers(0, 10, count)
  noise = rng.normal(0, 60, (count, 8, 8, 1))
  pixels = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
  return images.Images(pixels, labels)


digits = images.Splits(train=some(2000), validation=some(50), test=some(50))
""",
  },
  'flash_attention': {
    'LENGTHS = (1024, 2048, 4096, 8192)': 'LENGTHS = (512, 1024)'
  },
  'speculative_decoding': {
    # A byte is a token of the random model.
    'SLOTS = 192': 'SLOTS = 384',
    'NEW_TOKENS = 48': 'NEW_TOKENS = 16',
    'TURNS = 3': 'TURNS = 1',
    'arithmetic_rate()': 'arithmetic_rate(256)',
    'read_bandwidth()': 'read_bandwidth(2**22)',
    "lm = pretrained.load('smollm2-135m')": """
from efficiency_jax.decoding import eagle, medusa, token_tree
from efficiency_jax.io import untrained
lm = untrained.language_model()
""",
    "heads = drafts.load(drafts.shipped('smollm2-135m-medusa'), lm)": """
form = medusa.Heads(vocabulary=99, markov=8, token=True, layers=(0, 1))
heads = medusa.TrainedHeads(
  form=form,
  params=medusa.init(form, jax.random.key(1), 64, 257, {}),
  vocabulary=jnp.arange(30, 129),
  trees=(token_tree.TokenTree((-1, 0, 0, 0, 0, 2, 5, 6)),),
)
""",
    "layer = drafts.load(drafts.shipped('smollm2-135m-eagle'), lm)": """
form = eagle.Form(target=lm.config, vocabulary=99)
layer = eagle.TrainedDraft(
  form=form,
  params=eagle.init(form, jax.random.key(2), lm.params),
  vocabulary=jnp.arange(30, 129),
)
""",
  },
}
SLOW = {'speculative_decoding'}  # to compile
# What the text between the cells says of the results.
CLAIMS = {
  'binarized_networks': """
assert not slopes_of_step.any()
assert errors[-1] < 40  # by chance 90
assert all(equal)
assert kernels == 32 * bits
""",
  'flash_attention': """
for n in (512, 4096):  # no library hides the matrix from the compiler's plan
  assert scratch_bytes(naive, *random_arrays(n)) >= 4 * n * n
n = LENGTHS[-1]
of_naive, *others = [scratch for _, scratch in results[n].values()]
assert all(scratch < of_naive / 2 for scratch in others)
matrix, (of_naive, kept, again) = 4 * n * n, backward_scratch.values()
assert min(of_naive, kept) > matrix > 3 * again
""",
  'speculative_decoding': """
assert right == 0 < wrong
assert sum(len(happened.kept) + 1 for happened in rounds) == len(text)
assert tokens_a_round['plain'] == plain_passes['plain'] == 1
""",
}
# The same, where random weights do not show it.
OF_THE_MODEL = {
  'speculative_decoding': """
# How often n-grams draft at all, the schedule decides by what a round costs.
_, *trained, ngrams = tokens_a_round.values()
assert len(trained) == 2 and min(trained) > 1.3 and ngrams >= 1
assert max(len(happened.kept) for happened in rounds) >= 2  # a path to draw
assert all(1 <= ratio < 1.5 for ratio in bound.values())
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


def _run(source: str, script: pathlib.Path, timeout: int) -> None:
  """Runs a source from a folder of its own; warnings are errors."""
  script.write_text(source, encoding='utf-8')
  # The backend has no window, and says so at each plt.show().
  quiet = 'ignore:FigureCanvasAgg is non-interactive:UserWarning'
  run = subprocess.run(
    [sys.executable, '-W', 'error', '-W', quiet, str(script)],
    cwd=script.parent,
    env=os.environ | {'MPLBACKEND': 'Agg', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(p, id=p.stem, marks=[pytest.mark.slow] * (p.stem in SLOW))
    for p in SOURCES
  ],
)
def test_the_source_runs_in_a_fresh_process(path, tmp_path):
  source = path.read_text(encoding='utf-8')
  for large, small in SIZES[path.stem].items():
    assert source.count(large) == 1
    source = source.replace(large, small)
  _run(source + CLAIMS[path.stem], tmp_path / path.name, timeout=240)


@pytest.mark.model
@pytest.mark.parametrize('name', OF_THE_MODEL)
def test_the_source_runs_on_the_released_model(name, tmp_path):
  source = (SOURCES[0].parent / f'{name}.py').read_text(encoding='utf-8')
  source += CLAIMS[name] + OF_THE_MODEL[name]
  _run(source, tmp_path / f'{name}.py', timeout=600)


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
