"""Stores a text encoder in fewer bits, and measures what that costs.

    python -m experiments.quantize_encoder \\
      --config=configs/quantize_encoder.py --workdir=runs/quantize_encoder

A row a way to store it as released; GOBO's clustering beside k-means; a row a
fine-tuned model and seed, rounded after training and trained as rounded; and
the same for ways to share bits out among layers.
"""

from collections.abc import Sequence
import sys

import ml_collections

from efficiency_jax.evaluation import encoders
from efficiency_jax.io import pretrained_encoder
from efficiency_jax.io import untrained
from efficiency_jax.quantization import recipes
from experiments import claims
from experiments import display
from experiments import encoder_figures
from experiments import encoder_rows as rows_of
from experiments import encoder_tuning
from experiments import launch
from experiments import seeds
from experiments import workdir as workdirs


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Measures the encoder as released, fine-tuned, and by layers."""
  check(config)
  if config.model == 'untrained':
    encoder = untrained.text_encoder()
  else:
    encoder = pretrained_encoder.load(config.model)
  data = rows_of.sentences(config)
  fitted = data.train[: config.fit or None]
  head = encoders.fit_head(
    rows_of.embed(encoder, fitted), rows_of.labels(fitted)
  )
  known = rows_of.embed(encoder, data.test)
  parts = {'released': []}
  for method in display.track((rows_of.BASELINE, *config.methods), 'storing'):

    def make(method=method):
      stored, size = rows_of.store(encoder, method)
      row = rows_of.measure(stored, head, data.test, known)
      return {'method': method, 'baseline': rows_of.BASELINE} | size | row

    parts['released'].append(workdir.row(method, make))
  parts['clusterings'] = []
  for bits in config.kmeans:
    make = lambda b=bits: {'rows': rows_of.clusterings(encoder.params, b)}
    parts['clusterings'] += workdir.row(f'clustering {bits}', make)['rows']
  parts['tuned'], parts['shared'], sensitivities, shares = encoder_tuning.run(
    encoder, head, data, config, workdir
  )
  workdir.write_results([row for rows in parts.values() for row in rows])
  for part in ('tuned', 'shared'):
    parts[part] = seeds.summary(
      parts[part], ('bits', 'accuracy', 'loss'), 'accuracy'
    )
  parts['claims'] = claims.encoder(**parts)
  report(parts, sensitivities, shares, workdir)


def report(parts, sensitivities, shares, workdir: workdirs.Workdir) -> None:
  """Tables and figures, on the screen and in the folder."""
  texts = []
  for rows in parts.values():
    if rows:
      table = display.table(rows)
      table.show()
      texts.append(table.markdown())
  figures = {'accuracy': encoder_figures.accuracy(parts['released'])}
  if parts['tuned']:
    trained = (*parts['tuned'], *parts['shared'])
    figures['training'] = encoder_figures.training(trained)
    figures['hessian'] = encoder_figures.sensitivities(
      sensitivities, shares['by Hessian']
    )
  for name, figure in figures.items():
    image = workdir.save_figure(figure, name)
    texts.append(f'![{name}]({image.name})')
  workdir.write_report('\n\n'.join(texts))


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with a config before anything is loaded."""
  for method in (*config.methods, *config.trained_methods):
    if recipes.needs_text(method):
      raise ValueError(
        f'{method!r} is calibrated on text, which is for decoders: take a'
        ' recipe that is not.'
      )
  few, many, mean = (config.hessian[k] for k in ('few', 'many', 'mean'))
  if mean != round(mean) or not few <= mean <= many:
    raise ValueError(
      '--config.hessian.mean must be a whole number of bits from'
      f' {few} to {many}, got {mean}.'
    )
  least = {'sentences': 1, 'length': 1, 'batch': 1, 'seeds': 0, 'fit': 0}
  for field, low in least.items():
    if config[field] < low:
      raise ValueError(
        f'--config.{field} must be >= {low}, got {config[field]}.'
      )


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('quantize_encoder', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
