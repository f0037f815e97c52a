"""Trains binarized networks beside float ones, and folds them to bits.

    python -m experiments.train_bnn --config=configs/train_bnn.py \\
      --workdir=runs/train_bnn

A row a method and seed: errors, bytes as used, whether the folded network
predicts the same for every image there is, and milliseconds. Figures: error by
epoch, latent weights by epoch, filters of the first layer.
"""

from collections.abc import Sequence
import sys

import ml_collections

from experiments import bnn_figures
from experiments import bnn_methods
from experiments import bnn_rows as rows_of
from experiments import display
from experiments import launch
from experiments import seeds
from experiments import workdir as workdirs

_COLUMNS = {
  'method': 'method',
  'seeds': 'seeds',
  'test_error': 'test error, %',
  'deviation': '+-',
  'validation_error': 'validation error, %',
  'bytes': 'bytes',
  'folded_matches': 'folded is equal',
  'milliseconds_batch_1': 'ms, 1 image',
  'milliseconds_batch_100': 'ms, 100 images',
}


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Trains every method with every seed."""
  check(config)
  data = rows_of.load(config)
  rows = []
  for method in config.methods:
    file = method.replace(' ', '_').replace(',', '')
    for seed in range(config.seed, config.seed + config.seeds):

      def make(method=method, seed=seed, file=file):
        path = workdir.path / f'{file}_{seed}.safetensors'
        row, best = rows_of.measure(method, seed, data, config, path)
        image = data.train.pixels.shape[1:]
        figure = bnn_figures.weights(method, best.weights, best.params, image)
        workdir.save_figure(figure, f'weights_of_{file}')
        return {**row, 'figure': f'weights_of_{file}'}

      rows.append(workdir.row(f'{method}, seed {seed}', make))
      workdir.log({k: v for k, v in rows[-1].items() if k != 'curve'})
  workdir.write_results(rows)
  fields = [f for f in _COLUMNS if f not in ('method', 'seeds', 'deviation')]
  shown = seeds.summary(rows, fields, 'test_error')
  table = display.table(shown, _COLUMNS)
  table.show()
  workdir.save_figure(bnn_figures.errors(rows), 'errors')
  names = ['errors', *dict.fromkeys(row['figure'] for row in rows)]
  images = [f'![{name}]({name}.png)' for name in names]
  workdir.write_report('\n\n'.join([table.markdown(), *images]))


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with a config before anything is loaded."""
  for method in config.methods:
    bnn_methods.named(method)
  for field in ('epochs', 'batch', 'seeds', 'repeats'):
    if config[field] < 1:
      raise ValueError(f'--config.{field} must be >= 1, got {config[field]}.')
  if config.border < 0:
    raise ValueError(f'--config.border must be >= 0, got {config.border}.')
  if not 0 < config.last_learning_rate <= config.learning_rate:
    raise ValueError(
      '--config.last_learning_rate must be above 0 and at most'
      f' {config.learning_rate}, got {config.last_learning_rate}.'
    )


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('train_bnn', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
