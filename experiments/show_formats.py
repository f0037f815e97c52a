"""Shows number formats: their bits, their range, and what they lose of a model.

    python -m experiments.show_formats --config=configs/show_formats.py \\
      --workdir=runs/show_formats

A row a format, with what a cast of all weights of a model loses; and a figure
of one number's bits in each.
"""

from collections.abc import Sequence
import sys

import jax
import jax.numpy as jnp
import ml_collections

from efficiency_jax.quantization import number_formats
from efficiency_jax.quantization.number_formats import FORMATS
from experiments import display
from experiments import inputs
from experiments import launch
from experiments import workdir as workdirs

_COLOURS = ('#d1602f', '#3a8f5b', '#1f6fb4')  # sign, exponent, fraction


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Measures each format on the weights of `config.model`."""
  lm = inputs.load_model(config)
  weights = jnp.concatenate(
    [leaf.reshape(-1) for leaf in jax.tree.leaves(lm.params)]
  )
  rows = [row(name, weights, config.number) for name in FORMATS]
  workdir.write_results(rows)
  table = display.table(rows)
  table.show()
  image = workdir.save_figure(bits(config.number), 'bits')
  workdir.write_report(f'{table.markdown()}\n\n![bits]({image.name})\n')


def row(name: str, weights: jax.Array, number: float) -> workdirs.Row:
  """The layout of a format, and its cast report."""
  fmt = FORMATS[name]
  _, report = number_formats.cast(weights, name)
  return {
    'method': name,
    'baseline': 'fp32',
    'bits': fmt.bits,
    'exponent_bits': fmt.exponent_bits,
    'fraction_bits': fmt.fraction_bits,
    'bias': fmt.bias,
    'largest': fmt.largest,
    'smallest_normal': fmt.smallest_normal,
    'epsilon': fmt.epsilon,
    f'bits_of_{number:g}': number_formats.drawn(number, name),
    'relative_error': report.relative_error,
    'underflowed': report.underflowed,
    'overflowed': report.overflowed,
  }


def bits(number: float):
  """Every bit of a number in each format, a square each."""
  figure, axes = display.figure(width=9.0, height=2.6)
  for line, (name, fmt) in enumerate(FORMATS.items()):
    place = 0
    fields = number_formats.drawn(number, name).split()
    for text, colour in zip(fields, _COLOURS, strict=True):
      for digit in text:
        box = {'facecolor': colour, 'edgecolor': 'white'}
        axes.barh(-line, 1, left=place, height=0.85, **box)
        axes.text(place + 0.5, -line, digit, ha='center', va='center', size=8)
        place += 1
    axes.text(place + 0.4, -line, f'{fmt.bits} bits', va='center', size=8)
  axes.set_yticks([-line for line in range(len(FORMATS))], list(FORMATS))
  axes.set_xticks([])
  axes.set_xlim(0, 36)
  axes.set_title(f'{number:g}: sign, exponent, fraction', fontsize=10)
  axes.spines[:].set_visible(False)
  return figure


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('show_formats', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
