"""Trains decoders of one bit or three values beside one of real numbers.

    python -m experiments.train_bitnet --config=configs/train_bitnet.py \\
      --workdir=runs/train_bitnet

A row a method: bits a byte of held-out text with its interval, and what the
weights take as they are stored. Text is read byte by byte.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
import sys

import ml_collections

from efficiency_jax import trees
from efficiency_jax.binarization import bitnet
from efficiency_jax.evaluation import quality
from efficiency_jax.quantization import qat
from efficiency_jax.quantization import rules
from experiments import bitnet_training
from experiments import display
from experiments import launch
from experiments import workdir as workdirs

_BINARY = (('kernel$', bitnet.Binary()),)
_TERNARY = (('kernel$', bitnet.Ternary()),)
_REAL_ROWS = (('kernel$', bitnet.Ternary(activation=None)),)


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Trains and measures every method."""
  lm = bitnet_training.model(config)
  train, test = bitnet_training.texts(config)
  learnt = quality.windows(
    lm.tokenizer, train, tokens=config.tokens, length=config.length
  )
  fit = functools.cache(
    lambda r: bitnet_training.trained(lm, r, learnt, config)
  )
  made = {
    'float32': lambda: fit(()),
    'ternary': lambda: qat.freeze(fit(_TERNARY)),
    'binary': lambda: qat.freeze(fit(_BINARY)),
    'ternary, float rows': lambda: qat.freeze(fit(_REAL_ROWS)),
    'rounded to ternary': lambda: rules.quantize(fit(()), _REAL_ROWS)[0],
  }
  rows = []
  for method, params in made.items():

    def make(method=method, params=params):
      stored = dataclasses.replace(lm, params=params())
      found = quality.perplexity(
        stored, test, tokens=config.measured, length=config.length
      )
      return {
        'method': method,
        'baseline': 'float32',
        'bits_per_byte': math.log2(found.value),
        'bits_per_byte_ci': math.log2(found.high / found.low) / 2,
        'bytes': trees.count_bytes(stored.params),
        'weights': trees.count_parameters(lm.params),
      }

    rows.append(workdir.row(method, make))
  workdir.write_results(rows)
  table = display.table(rows)
  table.show()
  workdir.write_report(table.markdown())


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('train_bitnet', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
