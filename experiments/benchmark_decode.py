"""Measures decoding speed on this machine, beside its limits and other tools.

    python -m experiments.benchmark_decode \\
      --config=configs/benchmark_decode.py --workdir=runs/benchmark_decode

Every method writes the same number of tokens after the same prompts, and its
rate is that of writing: reading the prompts has a column of its own.
"""

from collections.abc import Sequence
import sys

import ml_collections

from efficiency_jax import engine as engine_lib
from efficiency_jax.io import pretrained
from experiments import benchmark_cases as cases
from experiments import benchmark_report as reports
from experiments import display
from experiments import figures
from experiments import inputs
from experiments import launch
from experiments import methods as ways
from experiments import peers
from experiments import workdir as workdirs


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Measures memory, rounds, our decoders and peers, in this order."""
  check(config)
  lm = inputs.for_decoding(inputs.load_model(config))
  prompts = load_prompts(lm, config)
  engines = load_engines(lm, config)
  rows = [workdir.row('memory', cases.measure_memory)]
  groups_of = {1: [[prompt] for prompt in prompts[: config.single]]}
  if config.batch > 1:
    groups_of[config.batch] = [prompts[: config.batch]]
  for batch, groups in groups_of.items():
    rounds = cases.round_rows(config, workdir, engines, batch)
    speeds = cases.speed_rows(config, workdir, lm, engines, groups, rounds)
    for row in speeds:
      if row.get('tokens_per_byte'):
        share = row['tokens_per_byte'] * row['weight_bytes'] / batch
        row['roofline_fraction'] = share
        row['roofline_tokens_per_second'] = row['tokens_per_second'] / share
    rows += rounds + speeds
  workdir.write_results(rows)
  figure = figures.speeds(reports.of_methods(rows))
  image = workdir.save_figure(figure, 'tokens_per_second')
  workdir.write_report(reports.report(config, rows, image.name))
  shown = {field: reports.SPEEDS[field] for field in reports.SHOWN}
  display.table(reports.of_methods(rows), shown).show()


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with a config before anything is loaded."""
  for field, least in (
    ('max_prompt_tokens', 1),
    ('new_tokens', 2),  # a rate needs what follows the first
    ('single', 1),
    ('batch', 1),
    ('repeats', 1),
    ('prompt_lookup', 1),
    ('assistant_tokens', 1),
  ):
    if config[field] < least:
      raise ValueError(
        f'--config.{field} must be >= {least}, got {config[field]}.'
      )
  for name in config.peers:
    peers.missing(name)
    if peers.PLAIN[name] not in config.peers:
      raise ValueError(
        f'--config.peers names {name!r}, which is compared with'
        f' {peers.PLAIN[name]!r}: name that too.'
      )


def load_engines(
  lm: pretrained.LanguageModel, config: ml_collections.ConfigDict
) -> dict[str, engine_lib.Engine]:
  """Our ways of decoding: plain, and those of `config.methods`.

  All are greedy, and no stop token ends a text.
  """
  settings = ml_collections.ConfigDict(
    config.to_dict()
    | {'sampling': {'temperature': 0.0}, 'stop': False, 'fixed_lengths': ()}
  )
  return {method.name: method.engine for method in ways.build(lm, settings)}


def load_prompts(
  lm: pretrained.LanguageModel, config: ml_collections.ConfigDict
) -> list[list[int]]:
  """Chats from all prompt sets in turns: the first ones of each."""
  sets = [inputs.load_prompts(lm, config, name) for name in config.prompts]
  mixed = [ids for turn in zip(*sets, strict=False) for _, ids in turn]
  needed = max(config.single, config.batch)
  if len(mixed) < needed:
    raise ValueError(
      f'--config.max_prompt_tokens={config.max_prompt_tokens} leaves'
      f' {len(mixed)} of the {needed} prompts that are needed: raise it.'
    )
  return mixed[:needed]


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('benchmark_decode', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
