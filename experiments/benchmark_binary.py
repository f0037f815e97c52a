"""Times whole networks of bits against floats and int8.

    python -m experiments.benchmark_binary \\
      --config=configs/benchmark_binary.py --workdir=runs/benchmark_binary

A row a network, batch and kind of numbers: milliseconds, bytes of the weights,
speed-up over float32, and the time that reading the weights once would take.
Weights are random: time does not depend on them.
"""

from collections.abc import Sequence
import functools
import sys

import jax.numpy as jnp
import ml_collections
import numpy as np

from efficiency_jax.evaluation import speed
from experiments import binary_programs
from experiments import display
from experiments import launch
from experiments import workdir as workdirs


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Times every width and batch."""
  for field in ('image', 'width', 'layers', 'batch', 'repeats'):
    for value in np.ravel(config[field]):
      if value < 1:
        raise ValueError(f'--config.{field} must be >= 1, got {value}.')
  rows = []
  for width in config.width:
    programs = binary_programs.made(tuple(config.image), width, config.layers)
    for batch in config.batch:
      key = f'{width}, {batch}'
      make = lambda p=programs, w=width, b=batch: {
        'rows': measured(p, w, b, config)
      }
      rows += workdir.row(key, make)['rows']
  workdir.write_results(rows)
  table = display.table(rows)
  table.show()
  workdir.write_report(table.markdown())


def measured(programs, width: int, batch: int, config) -> list[workdirs.Row]:
  """A row a kind of numbers, in turns."""
  rng = np.random.default_rng(1)
  pixels = rng.integers(0, 256, (batch, *config.image), np.uint8)
  pixels = jnp.asarray(pixels)
  timings = speed.compare(
    {
      name: functools.partial(run, pixels)
      for name, (run, _) in programs.items()
    },
    repeats=config.repeats,
  )
  bandwidth = speed.read_bandwidth()
  base = timings['float32'].median_seconds
  return [
    {
      'width': width,
      'batch': batch,
      'method': name,
      'milliseconds': 1e3 * timings[name].median_seconds,
      'speed_up': base / timings[name].median_seconds,
      'bytes': size,
      'reading_milliseconds': 1e3 * size / bandwidth,
    }
    for name, (_, size) in programs.items()
  ]


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('benchmark_binary', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
