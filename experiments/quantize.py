"""Stores a real model in fewer bits, and measures what that costs and gains.

    python -m experiments.quantize --config=configs/quantize_smollm2.py \\
      --workdir=runs/quantize

One row a way to store it: bits, bytes, perplexity on held-out texts with its
interval, KL divergence from the model in floats, right answers, and tokens a
second of reading and of writing.
"""

from collections.abc import Sequence
import functools
import sys

import ml_collections

from efficiency_jax.quantization import recipes
from experiments import claims
from experiments import display
from experiments import inputs
from experiments import launch
from experiments import quantize_figures
from experiments import quantize_rows as rows_of
from experiments import workdir as workdirs


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Measures the model in floats and by every recipe of `config.methods`."""
  check(config)
  lm = inputs.load_model(config)
  text = functools.cache(lambda: rows_of.calibration_text(lm, config))
  known = functools.cache(lambda: rows_of.reference(lm, config))
  chosen = config.methods or tuple(recipes.RECIPES)
  methods = (rows_of.BASELINE, *chosen)
  rows = []
  for method in display.track(methods, 'quantizing'):

    def make(method=method):
      calibrated = method != rows_of.BASELINE and recipes.needs_text(method)
      stored, size = rows_of.store(lm, method, text() if calibrated else ())
      row = {'method': method, 'baseline': rows_of.BASELINE, **size}
      row['megabytes'] = row['bytes'] / 1e6
      row |= rows_of.measure_quality(stored, known(), config)
      if config.model != 'untrained':
        row |= rows_of.measure_accuracy(stored, config)
      return row | rows_of.measure_speed(stored, config)

    rows.append(workdir.row(method, make))
    workdir.log(rows[-1])
  workdir.write_results(rows)
  table = display.table(rows, shown(rows))
  table.show()
  held = claims.table(claims.ladder(rows))
  held.show()
  figure = quantize_figures.perplexity_by_bytes(rows)
  image = workdir.save_figure(figure, 'perplexity_by_bytes')
  parts = (table.markdown(), f'![ladder]({image.name})', held.markdown())
  workdir.write_report('\n\n'.join(parts))


def shown(rows) -> dict[str, str]:
  """The columns that some row has."""
  return {
    field: heading
    for field, heading in rows_of.COLUMNS.items()
    if any(field in row for row in rows)
  }


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with a config before anything is loaded."""
  for method in config.methods:
    recipes.named(method)
  for field in ('tokens', 'length', 'batch', 'prompt', 'steps', 'repeats'):
    if config[field] < 1:
      raise ValueError(f'--config.{field} must be >= 1, got {config[field]}.')


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('quantize', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
