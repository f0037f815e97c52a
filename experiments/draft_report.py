"""What the training of a draft leaves for people: table, figure, card."""

from collections.abc import Mapping, Sequence
import json
import pathlib
from typing import Any

import numpy as np

from efficiency_jax import drafts
from efficiency_jax import trees as efficiency_trees
from efficiency_jax.io import pretrained
from experiments import calibration
from experiments import display
from experiments import figures
from experiments import training_run
from experiments import workdir as workdirs

COLUMNS = {
  'method': 'guess',
  'loss': 'loss',
  'alpha': 'alpha = 1 - TV',
  'top1': 'right, %',
  'top5': 'among 5, %',
  'joint': 'all so far right, %',
}


def write(
  workdir: workdirs.Workdir,
  result: training_run.Result,
  halves: tuple[np.ndarray, np.ndarray],
  trees: Sequence[Mapping[str, Any]],
  name: str,
  arrays: Mapping[str, np.ndarray],
  draft: drafts.Draft,
  lm: pretrained.LanguageModel,
  about: Mapping[str, str] | None = None,
) -> None:
  """Writes the draft's file, results, report and figure.

  Args:
    workdir: Where they go.
    result: Of the training.
    halves: Places of the right tokens among the guesses, from `calibration`.
    trees: The table of `calibration.trees`.
    name: What a guess is called.
    arrays: What was trained on.
    draft: What was trained.
    lm: Its target.
    about: What else card and report should say, by the name of the fact.
  """
  about = dict(about or {})
  rows = guesses(result.validation, np.concatenate(halves), name)
  path = workdir.path / 'draft.safetensors'
  facts = card(workdir, result, rows, arrays)
  bits = workdir.config['file_bits']
  drafts.save(path, draft, lm=lm, card={**facts, **about}, bits=bits)
  workdir.write_results([*rows, *trees])
  shown = display.table(rows, COLUMNS)
  shapes = display.table(trees, calibration.COLUMNS)
  shown.show()
  shapes.show()
  image = workdir.save_figure(figures.training(result.history), 'training')
  minutes = training_run.seconds(result) / 60
  said = ''.join(f'- {name}: {fact}\n' for name, fact in about.items())
  workdir.write_report(
    f'{shown.markdown()}\n\nOn {sum(map(len, halves)):,} positions of held-out'
    f' answers; {steps(result)} steps in {minutes:.1f} minutes;'
    f' {efficiency_trees.count_parameters(result.params):,} parameters,'
    f' {path.stat().st_size / 1e6:.1f} MB. A chain sampled at temperature 1'
    f' would give {result.validation["tokens_per_run"]:.3f} tokens a run.\n\n'
    f'{said}\n{shapes.markdown()}\n\n![training]({image.name})\n'
  )


def guesses(
  validation: Mapping[str, float], found: np.ndarray, name: str
) -> list[dict[str, Any]]:
  """A row for the guess at each token, from places [n, K] of the right one."""
  rows = []
  right = np.ones(len(found), bool)
  for k in range(found.shape[1]):
    right &= found[:, k] == 0
    rows.append(
      {
        'method': f'{name} {k + 1}',
        'baseline': None,
        'loss': validation.get(f'loss_{k + 1}'),
        'alpha': validation.get(f'alpha_{k + 1}'),
        'top1': 100 * float((found[:, k] == 0).mean()),
        'top5': 100 * float(((found[:, k] >= 0) & (found[:, k] < 5)).mean()),
        'joint': 100 * float(right.mean()),
      }
    )
  return rows


def steps(result: training_run.Result) -> int:
  """Updates of the whole run."""
  return max(entry['step'] for entry in result.history)


def card(
  workdir: workdirs.Workdir,
  result: training_run.Result,
  rows: Sequence[Mapping[str, Any]],
  arrays: Mapping[str, np.ndarray],
) -> dict[str, str]:
  """What a file of a trained draft says of itself."""
  learnt = int(arrays['loss_mask'].sum())
  folders = map(pathlib.Path, workdir.config['answers'].split(','))
  made = [folder / 'config.json' for folder in folders]
  numbers = [
    {k: round(v, 4) for k, v in row.items() if isinstance(v, float)}
    for row in rows
  ]
  return {
    'command': workdir.command,
    'config': json.dumps(workdir.config),
    'data': f'{len(arrays["tokens"])} answers of the target, {learnt} tokens',
    'answers': '\n'.join(
      path.read_text(encoding='utf-8') for path in made if path.exists()
    ),
    'steps': str(steps(result)),
    'validation': json.dumps(numbers),
    'licence': 'Apache-2.0',
  }
