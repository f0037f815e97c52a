"""The plan of the house, kept by reading the imports of every file.

Imports point one way, so that a room can be read without the rooms above it:
pallas_kernels <- types, trees, leaves, linear, panels <- models <-
techniques <- training, evaluation, footprint <- experiments.
"""

import ast
import pathlib

import pytest

pytestmark = pytest.mark.short

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = ('pallas_kernels', 'efficiency_jax', 'experiments', 'configs')

GROUND = {'pallas_kernels', 'types', 'trees', 'leaves', 'linear', 'panels'}
TECHNIQUES = {
  'adaptation',
  'binarization',
  'decoding',
  'distillation',
  'efficient_attention',
  'pruning',
  'quantization',
}
BELOW_TRAINING = GROUND | TECHNIQUES | {'models', 'io', 'data', 'distributed'}
LIBRARY = BELOW_TRAINING | {
  'answers',
  'binary_files',
  'conversation',
  'drafts',
  'engine',
  'evaluation',
  'footprint',
  'generation',
  'quantized_drafts',
  'training',
}

# What a room may import besides itself. A room that is not listed is an error.
MAY_IMPORT = {
  'pallas_kernels': set(),
  'types': set(),
  'trees': {'types'},
  'leaves': {'pallas_kernels'},
  'linear': {'pallas_kernels', 'leaves'},
  'panels': {'pallas_kernels', 'types', 'leaves'},
  'models': GROUND,
  'distributed': GROUND | {'models'},
  'io': GROUND | {'models'},
  'data': GROUND | {'models', 'io'},
  **{technique: GROUND | {'models'} for technique in TECHNIQUES},
  # A draft is trained to agree with its target.
  'decoding': GROUND | {'models', 'distillation'},
  # QLoRA is LoRA over a 4-bit model: the method itself needs both.
  'adaptation': GROUND | {'models', 'quantization'},
  # Trained drafts as files, and in few bits.
  'drafts': GROUND | {'models', 'io', 'decoding'},
  'quantized_drafts': GROUND | {'io', 'decoding', 'quantization', 'drafts'},
  'binary_files': GROUND | {'io', 'binarization'},
  # A model made ready to decode; and text in, text out around it.
  'engine': GROUND | {'models', 'io', 'decoding'},
  'generation': GROUND | {'models', 'io', 'decoding', 'engine'},
  'answers': GROUND | {'io', 'decoding', 'engine'},
  'conversation': GROUND | {'io', 'decoding', 'engine', 'generation'},
  'training': BELOW_TRAINING,
  'evaluation': BELOW_TRAINING | {'engine', 'generation'},
  'footprint': BELOW_TRAINING,
  # The package's own __init__: the names a reader meets first.
  'efficiency_jax': LIBRARY,
  'experiments': LIBRARY,
  'configs': set(),
}

# Packages that only some files may import; everything else of them is a peer
# that results are compared with, or an interface kept behind one door.
ONLY_IN = {
  'gguf': ('efficiency_jax/io/', 'experiments/'),
  'grain': ('efficiency_jax/data/',),
  'llama_cpp': ('experiments/',),
  'llvmlite': ('pallas_kernels/llvm_ir.py',),
  'matplotlib': ('experiments/',),
  'ml_collections': ('experiments/', 'configs/'),
  'orbax': ('efficiency_jax/io/checkpoint.py',),
  'rich': ('experiments/',),
  'safetensors': ('efficiency_jax/io/', 'experiments/'),
  'tensorflow': (),
  'tokenizers': ('efficiency_jax/io/', 'experiments/'),
  'torch': ('experiments/',),
  'transformers': ('experiments/',),
}

# Tests of several rooms at once; every other test names the module it tests.
CROSS_CUTTING = {
  'tests/layering_test.py',
  # Quantized targets and drafts in speculation.
  'tests/efficiency_jax/composition_test.py',
  # Rows of every drafter that give their places to others.
  'tests/efficiency_jax/continuous_batching_test.py',
  # All kernels through the compiler of a device.
  'tests/pallas_kernels/compile_test.py',
  'tests/pallas_kernels/compile_cuda_test.py',
  # One module, three kinds of proof.
  'tests/efficiency_jax/decoding/speculative_law_test.py',
  'tests/efficiency_jax/decoding/speculative_program_test.py',
}

VAGUE_NAMES = {'base', 'common', 'helpers', 'misc', 'util', 'utils'}
MAX_LINES = 500
MAX_SCRIPT_LINES = 120  # flags, config, library, results: nothing else

# Modules of experiments/ that a person starts.
SCRIPTS = {
  path.stem
  for path in (ROOT / 'experiments').glob('*.py')
  if path.read_text(encoding='utf-8').endswith('  main(sys.argv)\n')
}


def _python_files(*folders: str) -> list[pathlib.Path]:
  return [
    path.relative_to(ROOT)
    for folder in folders
    for path in sorted((ROOT / folder).rglob('*.py'))
  ]


def _parse(path: pathlib.Path) -> ast.Module:
  return ast.parse((ROOT / path).read_text(encoding='utf-8'), str(path))


def room(module: tuple[str, ...]) -> str:
  """The room that a dotted module name lies in."""
  if module[0] == 'efficiency_jax' and len(module) > 1:
    return module[1]
  return module[0]


def imported(tree: ast.Module, path: pathlib.Path) -> set[tuple[str, ...]]:
  """Every module that a file imports, at its top or inside a function."""
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {tuple(alias.name.split('.')) for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      # A relative import counts from the folder of the file.
      start = path.parent.parts
      start = start[: len(start) - node.level + 1] if node.level else ()
      start += tuple(node.module.split('.')) if node.module else ()
      if start == ('efficiency_jax',):  # from efficiency_jax import models
        found |= {(*start, alias.name) for alias in node.names}
      else:
        found.add(start)
  return found


def wrong_imports(tree: ast.Module, path: pathlib.Path) -> list[str]:
  """Imports of a file that the plan does not allow."""
  own = room(path.with_suffix('').parts)
  own = 'efficiency_jax' if own == '__init__' else own
  if own not in MAY_IMPORT:
    return [f'{own} has no place in the plan of tests/layering_test.py']
  allowed = MAY_IMPORT[own] | {own}
  wrong = []
  for module in sorted(imported(tree, path)):
    name = '.'.join(module)
    if module[0] in SOURCES and room(module) not in allowed:
      wrong.append(f'{own} may not import {name}')
    only_in = ONLY_IN.get(module[0])
    if only_in is not None and not path.as_posix().startswith(only_in):
      wrong.append(f'{name} may be imported only in {only_in}')
  return wrong


@pytest.mark.parametrize('path', _python_files(*SOURCES), ids=str)
def test_imports_point_one_way(path):
  assert wrong_imports(_parse(path), path) == []


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('efficiency_jax/types.py', 'from efficiency_jax import models'),
    ('efficiency_jax/models/config.py', 'import efficiency_jax.decoding'),
    ('efficiency_jax/models/config.py', 'from ..decoding import sampling'),
    ('efficiency_jax/decoding/x.py', 'from efficiency_jax.io import y'),
    ('efficiency_jax/decoding/x.py', 'from efficiency_jax import pruning'),
    ('efficiency_jax/io/x.py', 'from efficiency_jax.decoding import y'),
    ('efficiency_jax/training/x.py', 'import efficiency_jax.generation'),
    ('efficiency_jax/generation.py', 'import experiments.launch'),
    ('efficiency_jax/decoding/x.py', 'def f():\n  import torch'),
    ('efficiency_jax/attic/x.py', ''),
    ('pallas_kernels/x/api.py', 'from efficiency_jax import types'),
    ('experiments/decode.py', 'from configs import decode_smollm2'),
    ('configs/x.py', 'from experiments import launch'),
  ],
)
def test_the_plan_notices_a_wrong_import(path, source):
  assert len(wrong_imports(ast.parse(source), pathlib.Path(path))) == 1


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('efficiency_jax/__init__.py', 'from efficiency_jax import decoding'),
    ('efficiency_jax/decoding/x.py', 'from efficiency_jax.decoding import y'),
    ('efficiency_jax/decoding/x.py', 'from . import y'),
    ('efficiency_jax/io/x.py', 'from efficiency_jax import models, types'),
    ('experiments/decode.py', 'from experiments import launch'),
    ('efficiency_jax/adaptation/x.py', 'import efficiency_jax.quantization'),
  ],
)
def test_the_plan_lets_a_right_import_pass(path, source):
  assert wrong_imports(ast.parse(source), pathlib.Path(path)) == []


def test_every_folder_of_the_library_is_installed():
  folders = {
    path.parent for path in _python_files('efficiency_jax', 'pallas_kernels')
  }
  missing = [f for f in folders if not (ROOT / f / '__init__.py').exists()]
  assert missing == [], 'find_packages skips a folder without __init__.py'


def test_every_test_names_the_module_it_tests():
  orphans = []
  for path in _python_files('tests'):
    if not path.name.endswith('_test.py') or str(path) in CROSS_CUTTING:
      continue
    tested = path.relative_to('tests').with_name(path.name[: -len('_test.py')])
    if not (
      (ROOT / tested).with_suffix('.py').exists() or (ROOT / tested).is_dir()
    ):
      orphans.append(f'{path} tests {tested}.py, which does not exist')
  assert orphans == []


def test_no_module_is_too_long_or_vaguely_named():
  wrong = []
  for path in _python_files(*SOURCES, 'tests'):
    text = (ROOT / path).read_text(encoding='utf-8').splitlines()
    # The text between the cells of a notebook is not code.
    in_notebook = path.parts[:2] == ('experiments', 'notebooks')
    lines = sum(not (in_notebook and line.startswith('#')) for line in text)
    if lines > MAX_LINES:
      wrong.append(f'{path} has {lines} lines, more than {MAX_LINES}')
    is_script = path.parts[0] == 'experiments' and path.stem in SCRIPTS
    if is_script and lines > MAX_SCRIPT_LINES:
      wrong.append(f'{path} has {lines} lines, more than {MAX_SCRIPT_LINES}')
    vague = VAGUE_NAMES & set(path.stem.split('_'))
    if vague:
      wrong.append(f'{path}: {vague.pop()!r} does not say what is in it')
  assert wrong == []


def test_every_public_function_and_class_has_a_docstring():
  bare = []
  for path in _python_files('efficiency_jax', 'pallas_kernels'):
    for node in _parse(path).body:
      if not isinstance(
        node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
      ):
        continue
      if not node.name.startswith('_') and not ast.get_docstring(node):
        bare.append(f'{path}:{node.lineno} {node.name}')
  assert bare == []
