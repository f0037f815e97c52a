"""Measures decoding speed on this machine, beside its limits and other tools.

    python -m experiments.benchmark_decode \\
      --config=configs/benchmark_decode.py --workdir=runs/benchmark_decode

Every method writes the same number of tokens after the same prompts, and its
rate is that of writing: reading the prompts has a column of its own.
"""

from collections.abc import Sequence
import functools
import os
import pathlib
import sys
import tempfile
from typing import TYPE_CHECKING

import jax
import ml_collections
import numpy as np

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax import trees
from efficiency_jax.decoding import prefill
from efficiency_jax.decoding import sampling
from efficiency_jax.evaluation import speed
from efficiency_jax.io import assets
from efficiency_jax.io import export
from efficiency_jax.io import pretrained
from efficiency_jax.models import cache as kv_cache
from experiments import candidates
from experiments import decode
from experiments import display
from experiments import figures
from experiments import launch
from experiments import peers
from experiments import workdir as workdirs

if TYPE_CHECKING:  # slow to import
  from matplotlib import figure as figures

PLAIN, NGRAM = 'plain', 'n-gram, adaptive'
SPEEDS = {
  'method': 'method',
  'batch': 'batch',
  'tokens_per_second': 'tokens/s',
  'tokens_per_second_spread': 'spread',
  'speedup': 'speed-up',
  'speedup_spread': 'spread',
  'milliseconds_per_step': 'ms/step',
  'tokens_per_step': 'tokens/step',
  'roofline_fraction': 'of roofline',
  'weight_bytes': 'weight bytes',
  'prefill_seconds': 'prefill s',
  'texts_equal': 'equal texts',
  'texts': 'of',
  'note': 'note',
}
SHOWN = (
  'method',
  'batch',
  'tokens_per_second',
  'speedup',
  'milliseconds_per_step',
  'roofline_fraction',
  'note',
)
PROGRAMS = {
  'method': 'method',
  'batch': 'batch',
  'cache_copies_in_loop': 'cache copies in loop',
  'weight_converts_in_loop': 'weight converts in loop',
  'temporary_bytes': 'temporary bytes',
}
ROUNDS = {
  'batch': 'batch',
  'draft_length': 'draft length',
  'milliseconds_per_round': 'ms/round',
  'relative_cost': 'cost over length 0',
}


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Measures memory, rounds, our decoders and peers, in this order."""
  check(config)
  lm = decode.load_model(config)
  prompts = load_prompts(lm, config)
  prepare = functools.partial(engine_lib.prepare, lm, stop=False)
  engines = {PLAIN: prepare(drafter='plain'), NGRAM: prepare(drafter='n-gram')}
  memory = workdir.row('memory', measure_memory)
  rows = [memory]
  for batch, groups in (
    (1, [[prompt] for prompt in prompts[: config.single]]),
    (config.batch, [prompts[: config.batch]]),
  ):
    rounds = round_rows(config, workdir, engines[NGRAM], batch)
    speeds = speed_rows(config, workdir, lm, engines, groups, rounds)
    for row in speeds:
      if 'tokens_per_second' in row:
        bound = batch * memory['bytes_per_second'] / row['weight_bytes']
        row['roofline_tokens_per_second'] = bound
        row['roofline_fraction'] = row['tokens_per_second'] / bound
    rows += rounds + speeds
  workdir.write_results(rows)
  figure = figures.speeds(of_methods(rows))
  image = workdir.save_figure(figure, 'tokens_per_second')
  workdir.write_report(report(config, rows, image.name))
  shown = {field: SPEEDS[field] for field in SHOWN}
  display.table(of_methods(rows), shown).show()


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with a config before anything is loaded."""
  for field, least in (
    ('max_prompt_tokens', 1),
    ('new_tokens', 2),  # a rate needs what follows the first
    ('single', 1),
    ('batch', 2),
    ('repeats', 1),
    ('prompt_lookup', 1),
  ):
    if config[field] < least:
      raise ValueError(
        f'--config.{field} must be >= {least}, got {config[field]}.'
      )
  for name in config.peers:
    peers.missing(name)


def load_prompts(
  lm: pretrained.LanguageModel, config: ml_collections.ConfigDict
) -> list[list[int]]:
  """Chats from all prompt sets in turns: the first ones of each."""
  sets = [decode.load_prompts(lm, config, name) for name in config.prompts]
  mixed = [ids for turn in zip(*sets, strict=False) for _, ids in turn]
  needed = max(config.single, config.batch)
  if len(mixed) < needed:
    raise ValueError(
      f'--config.max_prompt_tokens={config.max_prompt_tokens} leaves'
      f' {len(mixed)} of the {needed} prompts that are needed: raise it.'
    )
  return mixed[:needed]


def measure_memory() -> workdirs.Row:
  """How fast weights can be read, which bounds plain decoding.

  The load average of the minute before tells whether the machine was at rest:
  tools whose threads wait for each other lose most beside other work.
  """
  return {
    'method': 'memory read',
    'baseline': None,
    'load_average': os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
    'bytes_per_second': speed.read_bandwidth(repeats=16),
  }


def round_rows(config, workdir, engine, batch: int) -> list[workdirs.Row]:
  """The cost table: seconds a round of each draft length."""
  costs = functools.cache(
    lambda: engine_lib.measured_costs(
      engine, sampling.GREEDY, batch, slots(config, engine)
    )
  )
  return [
    workdir.row(
      f'round/{batch}/{length}',
      lambda place=place, length=length: {
        'method': f'round of {length} drafts',
        'baseline': 'round of 0 drafts',
        'batch': batch,
        'draft_length': length,
        'milliseconds_per_round': 1e3 * float(costs()[place]),
        'relative_cost': float(costs()[place] / costs()[0]),
      },
    )
    for place, length in enumerate(engine.decoder.schedule.lengths)
  ]


def speed_rows(
  config, workdir, lm, engines, groups, rounds
) -> list[workdirs.Row]:
  """Decodes all groups with every method, and compares with plain decoding."""
  batch = len(groups[0])
  others = config.peers if batch == 1 else ()
  notes = {name: peers.missing(name) for name in others}
  costs = np.array([r['milliseconds_per_round'] for r in rounds]) / 1e3

  @functools.cache
  def samples() -> dict[str, list[candidates.Sample]]:
    ways = {
      name: functools.partial(write, config, engine, groups, costs)
      for name, engine in engines.items()
    }
    present = [name for name in others if not notes[name]]
    ways |= load_peers(config, lm, present, [p for g in groups for p in g])
    return candidates.take_turns(
      ways, repeats=config.repeats, workdir=workdir, label=f'batch {batch}'
    )

  def make(name: str) -> workdirs.Row:
    row = {'method': name, 'baseline': PLAIN, 'batch': batch}
    if notes.get(name):
      return row | {'note': notes[name]}
    row |= candidates.summary(samples()[name], samples()[PLAIN])
    if name in engines:
      return row | read_program(config, lm, engines[name], batch)
    whole = name != peers.LLAMA_CPP
    size = (
      trees.count_bytes(lm.params) if whole else file_of(config).stat().st_size
    )
    return row | {'weight_bytes': size}

  # What a missing peer left is not kept: the next run may have it.
  return [
    make(name)
    if notes.get(name)
    else workdir.row(f'batch {batch}/{name}', lambda name=name: make(name))
    for name in (*engines, *others)
  ]


def write(config, engine, groups, costs) -> candidates.Sample:
  """Decodes one group of prompts after another with our compiled loop."""
  samples = []
  for prompts in groups:
    made = generation.generate(
      engine,
      prompts,
      max_new_tokens=config.new_tokens,
      slots=slots(config, engine),
      costs=costs if len(engine.decoder.schedule.lengths) > 1 else None,
    )
    samples.append(
      candidates.Sample(
        tokens=[row.tokens.tolist() for row in made.rows],
        prefill_seconds=made.prefill_seconds,
        decode_seconds=made.decode_seconds,
        decoded=sum(len(row.tokens) for row in made.rows),
        steps=sum(made.rounds.values()),
      )
    )
  return candidates.total(samples)


def slots(config, engine: engine_lib.Engine) -> int:
  """One buffer size for all prompts: one compiled program."""
  return config.max_prompt_tokens + config.new_tokens + engine.decoder.slack


def read_program(config, lm, engine, batch: int) -> workdirs.Row:
  """What the compiled loop does besides decoding: it should be nothing."""
  size = slots(config, engine)
  program = engine_lib.compiled(engine, sampling.GREEDY, batch, size)
  found = speed.loop_operations(program.as_text())
  cache = jax.eval_shape(
    lambda: kv_cache.init(lm.config, batch, prefill.slots_for(size))
  )
  # A product may turn its weight, so axes count in any order.
  weights = {
    tuple(sorted(leaf.shape))
    for leaf in jax.tree.leaves(lm.params)
    if leaf.ndim > 1
  }
  return {
    'weight_bytes': trees.count_bytes(lm.params),
    'cache_copies_in_loop': found['copy', cache.keys[0].shape],
    'weight_converts_in_loop': sum(
      count
      for (operation, shape), count in found.items()
      if operation == 'convert' and tuple(sorted(shape)) in weights
    ),
    'temporary_bytes': program.memory_analysis().temp_size_in_bytes,
  }


def load_peers(config, lm, names, prompts) -> dict[str, candidates.Candidate]:
  """The other tools, each with the model and the prompts in its hands."""
  decoders = {}
  with tempfile.TemporaryDirectory() as folder:
    saved = functools.cache(
      lambda: export.save(lm, pathlib.Path(folder) / 'model')
    )
    for name in names:
      if name == peers.LLAMA_CPP:
        room = config.max_prompt_tokens + config.new_tokens
        decoders[name] = peers.llama_cpp(file_of(config), room)
      else:
        lookup = config.prompt_lookup if name == peers.LOOKUP else None
        decoders[name] = peers.transformers(saved(), lookup)
  return {
    name: functools.partial(decoder, prompts, config.new_tokens)
    for name, decoder in decoders.items()
  }


def file_of(config: ml_collections.ConfigDict) -> pathlib.Path:
  """The GGUF file behind the model, for llama.cpp."""
  if config.model in assets.ASSETS:
    return assets.fetch(config.model)
  path = pathlib.Path(config.model).expanduser()
  if path.suffix != '.gguf':
    raise ValueError(
      f'--config.peers names {peers.LLAMA_CPP}, which reads GGUF files only;'
      f' --config.model={config.model} is none.'
    )
  return path


def of_methods(rows: Sequence[workdirs.Row]) -> list[workdirs.Row]:
  """Rows of ways of decoding, measured or not."""
  return [row for row in rows if 'texts' in row or 'note' in row]


def report(config, rows: Sequence[workdirs.Row], image: str) -> str:
  """The tables that a person reads."""
  read = rows[0]['bytes_per_second'] / 1e9
  load = rows[0]['load_average'] or 0.0
  pick = lambda field: [row for row in rows if field in row]
  speeds = of_methods(rows)
  return f"""
![tokens per second]({image})

{display.table(speeds, SPEEDS).markdown()}

Medians of {config.repeats} turns and interquartile ranges; {config.new_tokens}
new tokens after each prompt, {config.single} prompts one by one at batch 1. A
speed-up is over our plain decoding of the same batch. Equal texts have the
tokens of plain decoding, all of them. The roofline is one read of the method's
own weights a step, with one token a prompt, at the {read:.1f} GB/s that a
compiled sum reads here: drafting may pass it. The load average before the run
was {load:.1f}; a machine at rest has one near 0.

{display.table(pick('temporary_bytes'), PROGRAMS).markdown()}

Counted in the text of the compiled program, in its while loops and in all that
they call: 0 copies of the shape of a layer's cache and 0 converts of the shape
of a weight mean that a step neither moves the cache nor widens the weights.

{display.table(pick('relative_cost'), ROUNDS).markdown()}
"""


def main(argv: Sequence[str]) -> None:
  """Runs the experiment from a command line."""
  launch.run('benchmark_decode', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
