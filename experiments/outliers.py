"""Shows outlying activations of a model, and what they cost and save.

    python -m experiments.outliers --config=configs/outliers_smollm2.py \\
      --workdir=runs/outliers

A row a kind of product: how many of its columns reach the threshold and which
dimensions do everywhere. A row a threshold: perplexity when the columns that
reach it are kept in floats. Two figures: a map of the outliers, and the errors
of one matrix by method.
"""

from collections.abc import Sequence
import sys

import ml_collections

from efficiency_jax.quantization import recipes
from experiments import display
from experiments import inputs
from experiments import launch
from experiments import outlier_figures
from experiments import outlier_rows as rows_of
from experiments import quantize_rows
from experiments import workdir as workdirs

_SHOWN = ('method', 'share_of_columns', 'perplexity', 'perplexity_ratio', 'kl')


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Looks at activations, sweeps the threshold, and draws errors."""
  check(config)
  lm = inputs.load_model(config)
  kernel = f'layers_{config.layer}/ffn/gate_up/kernel'
  weights = outlier_figures.matrix(lm.params, kernel)
  known = quantize_rows.reference(lm, config)
  found = rows_of.features(lm, known.windows, config)
  kinds = [rows_of.kind_row(kind, one, config) for kind, one in found.items()]
  sweep = []
  for threshold in display.track(config.thresholds, 'thresholds'):
    name = f'threshold {threshold:g}'
    make = lambda t=threshold: rows_of.threshold_row(
      lm, known, found, t, config
    )
    sweep.append(workdir.row(name, lambda n=name, m=make: {'method': n} | m()))
    workdir.log(sweep[-1])
  workdir.write_results(kinds + sweep)
  tables = [display.table(kinds), display.table(sweep, _SHOWN)]
  for table in tables:
    table.show()
  shown = outlier_figures.outlier_map(found, config)
  drawn = outlier_figures.errors(weights, config.methods, kernel)
  images = [
    workdir.save_figure(shown, 'outlier_map'),
    workdir.save_figure(drawn, 'errors'),
  ]
  parts = [table.markdown() for table in tables]
  parts += [f'![{image.stem}]({image.name})' for image in images]
  workdir.write_report('\n\n'.join(parts))


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with a config before anything is loaded."""
  if not config.methods:
    raise ValueError('--config.methods must name at least one recipe.')
  for method in config.methods:
    if recipes.needs_text(method):
      raise ValueError(
        f'{method!r} needs calibration text, and errors are drawn without: take'
        ' a recipe that does not.'
      )
  if config.threshold <= 0:
    raise ValueError(
      f'--config.threshold must be above 0, got {config.threshold}.'
    )


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('outliers', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
