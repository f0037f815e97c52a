"""What `benchmark_decode` measures, a row each."""

import dataclasses
import functools
import os
import pathlib
import tempfile

import jax
import ml_collections
import numpy as np

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax import trees
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import prefill
from efficiency_jax.decoding import sampling
from efficiency_jax.evaluation import speed
from efficiency_jax.io import assets
from efficiency_jax.io import export
from efficiency_jax.io import pretrained
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.quantization import rules
from experiments import candidates
from experiments import methods
from experiments import peers
from experiments import workdir as workdirs

PLAIN = 'plain'

# Of the comparison with a tool's own plain decoding.
_OWN = ('speedup', 'speedup_spread', 'texts_equal')


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


def round_rows(config, workdir, engines, batch: int) -> list[workdirs.Row]:
  """The cost table: seconds a round of each method and draft length."""

  @functools.cache
  def seconds(name: str) -> np.ndarray:
    engine = engines[name]
    return engine_lib.measured_costs(
      engine, sampling.GREEDY, batch, slots(config, engine)
    )

  def make(name: str, place: int, length: int) -> workdirs.Row:
    return {
      'method': f'round of {length} drafts, {name}',
      'baseline': f'round of 0 drafts, {PLAIN}',
      'batch': batch,
      'drafter': name,
      'draft_length': length,
      'milliseconds_per_round': 1e3 * float(seconds(name)[place]),
      'relative_cost': float(seconds(name)[place] / seconds(PLAIN)[0]),
    }

  return [
    workdir.row(
      f'round/{batch}/{name}/{length}',
      functools.partial(make, name, place, length),
    )
    for name, engine in engines.items()
    for place, length in enumerate(engine.decoder.schedule.lengths)
  ]


def speed_rows(
  config, workdir, lm, engines, groups, rounds
) -> list[workdirs.Row]:
  """Decodes all groups with every method, and compares with plain decoding.

  A row's `speedup` is over our plain decoding, its `own_speedup` over that of
  the same tool.
  """
  batch = len(groups[0])
  others = config.peers if batch == 1 else ()
  notes = {name: peers.missing(name) for name in others}
  costs = {
    name: [
      r['milliseconds_per_round'] / 1e3 for r in rounds if r['drafter'] == name
    ]
    for name in engines
  }

  @functools.cache
  def samples() -> dict[str, list[candidates.Sample]]:
    ways = {
      name: functools.partial(write, config, engine, groups, costs[name])
      for name, engine in engines.items()
    }
    present = [name for name in others if not notes[name]]
    ways |= load_peers(config, lm, present, [p for g in groups for p in g])
    return candidates.take_turns(
      ways,
      repeats=config.repeats,
      workdir=workdir,
      label=f'batch {batch}',
      read=speed.bandwidth_reader(),
    )

  def make(name: str) -> workdirs.Row:
    row = {'method': name, 'baseline': PLAIN, 'batch': batch}
    if notes.get(name):
      return row | {'note': notes[name]}
    mine, own_plain = samples()[name], samples()[peers.PLAIN.get(name, PLAIN)]
    own = candidates.summary(mine, own_plain)
    row |= candidates.summary(mine, samples()[PLAIN])
    row |= {f'own_{field}': own[field] for field in _OWN}
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
      costs=np.array(costs),
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
    lambda: kv_cache.init(
      lm.config, batch, prefill.slots_for(size), engine.cache_dtype
    )
  )
  keys = jax.tree.leaves(cache.keys)[0]
  # A product may turn its weight, so axes count in any order.
  weights = {
    tuple(sorted(leaf.shape))
    for leaf in jax.tree.leaves(lm.params)
    if leaf.ndim > 1
  }
  return {
    'weight_bytes': trees.count_bytes(engine.weights),
    'cache_copies_in_loop': found['copy', keys.shape],
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
  lm = dataclasses.replace(lm, params=rules.dequantize(lm.params))
  with tempfile.TemporaryDirectory() as folder:
    saved = functools.cache(
      lambda: export.save(lm, pathlib.Path(folder) / 'model')
    )
    for name in names:
      if name == peers.LLAMA_CPP:
        room = config.max_prompt_tokens + config.new_tokens
        decoders[name] = peers.llama_cpp(file_of(config), room)
      elif name == peers.ASSISTED:
        small = export.save(
          assistant(lm, config), pathlib.Path(folder) / 'assistant'
        )
        decoders[name] = peers.transformers(
          saved(), config.assistant_tokens, small
        )
      else:
        lookup = config.prompt_lookup if name == peers.LOOKUP else None
        decoders[name] = peers.transformers(saved(), lookup)
  return {
    name: functools.partial(decoder, prompts, config.new_tokens)
    for name, decoder in decoders.items()
  }


def assistant(
  lm: pretrained.LanguageModel, config: ml_collections.ConfigDict
) -> pretrained.LanguageModel:
  """The draft model of our own rows, as a whole model for other tools.

  It is the one that `config.trained.draft_model` names, with the output head of
  the target, or else every `config.draft_every`-th layer of the target.
  """
  draft = methods.trained(lm, config, 'draft model')
  if draft is None:
    return methods.cut(lm, config.draft_every)
  form = dataclasses.replace(draft.form, vocabulary=None)
  return dataclasses.replace(
    lm,
    name=f'draft of {lm.name}',
    config=form.config,
    params=rules.dequantize(draft_model.weights(form, draft.params, lm.params)),
  )


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
