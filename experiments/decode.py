"""Decodes a real model plainly and with speculation, and compares the two.

    python -m experiments.decode --config=configs/decode_smollm2.py \\
      --workdir=runs/decode [--show_tokens]

Every method decodes the same prompts in turn. The table gives tokens a second,
the speed-up over plain decoding in the same run, tokens a run of the target,
acceptance, and whether the text is that of plain decoding, token for token; the
figure gives speed-up against draft length, measured and predicted.
"""

import sys

import ml_collections
import rich.console

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.data import prompts as prompt_sets
from efficiency_jax.decoding import sampling
from efficiency_jax.evaluation import decoding
from efficiency_jax.io import pretrained
from efficiency_jax.io import untrained
from efficiency_jax.models import layers
from experiments import display
from experiments import figures
from experiments import launch
from experiments import trace
from experiments import workdir as workdirs

COLUMNS = {
  'method': 'method',
  'prompts': 'prompts',
  'batch': 'batch',
  'tokens_per_second': 'tokens/s',
  'speedup': 'speed-up',
  'predicted_speedup': 'predicted',
  'tokens_per_run': 'tokens/run',
  'acceptance_rate': 'acceptance',
  'exact': 'exact',
  'guarantee': 'guarantee',
  'peak_megabytes': 'peak MB',
}


def experiment(
  config: ml_collections.ConfigDict,
  workdir: workdirs.Workdir,
  show_tokens: bool = False,
) -> None:
  """Measures all cases of `config`, then writes table, figure and traces."""
  settings = dict(config.sampling)
  sampling.make(1, **settings)  # a mistake here should not wait for the model
  lm = load_model(config)
  methods = build_methods(lm, config)
  texts = {name: load_prompts(lm, config, name) for name in config.prompts}
  longest = max(len(ids) for group in texts.values() for _, ids in group)
  slots = max(128, 1 << (longest + config.max_new_tokens + 32).bit_length())
  cases = [
    (name, batch, place, group)
    for name, group_of in texts.items()
    for batch in config.batches
    for place, group in enumerate(decoding.batches(group_of, batch))
  ]
  facts, records = {}, []
  for name, batch, place, group in display.track(cases, 'decoding'):

    def make(batch=batch, group=group):
      if batch not in facts:
        facts[batch] = decoding.warm_up(methods, batch, slots, settings)
      measured = decoding.measure(
        methods,
        [ids for _, ids in group],
        max_new_tokens=config.max_new_tokens,
        slots=slots,
        settings=settings,
        seed=config.seed,
        repeats=config.repeats,
      )
      plain = measured[decoding.BASELINE]
      return {
        'facts': facts[batch],
        'methods': {m: decoding.record(measured[m], plain) for m in measured},
      }

    record = workdir.row(f'{name}/{batch}/{place}', make)
    categories = {prompt.category for prompt, _ in group}
    records.append((name, batch, categories, record))
    workdir.log({'case': f'{name}/{batch}/{place}', **record['methods']})

  rows = summarize(methods, records, config)
  workdir.write_results(rows)
  shown = [row for row in rows if '/' not in row['prompts']]
  table = display.table(shown, COLUMNS)
  table.show()
  image = workdir.save_figure(figures.speedup_by_length(rows), 'speedup')
  workdir.write_report(f'{table.markdown()}\n\n![speed-up]({image.name})\n')
  if show_tokens:
    show(methods, texts, config, slots, settings)


def load_model(config) -> pretrained.LanguageModel:
  """The target; 'untrained' is a random tiny model."""
  if config.model == 'untrained':
    return untrained.language_model()
  return pretrained.load(config.model, dtype=config.dtype)


def load_prompts(lm, config, name):
  """Pairs of a prompt and its tokens, those that fit the context."""
  loaded = prompt_sets.load(name) if name != 'inline' else inline(config)
  pairs = []
  for prompt in loaded:
    chat = [{'role': 'user', 'content': prompt.message}]
    ids = lm.tokenizer.encode(lm.tokenizer.apply_chat_template(chat))
    if len(ids) <= config.max_prompt_tokens:
      pairs.append((prompt, ids))
  return pairs[: config.num_prompts] if config.num_prompts else pairs


def inline(config):
  """Prompts that stand in the config itself."""
  return [
    prompt_sets.Prompt(name=str(i), category='inline', message=message)
    for i, message in enumerate(config.inline)
  ]


def build_methods(lm, config) -> list[decoding.Method]:
  """The methods that `config.methods` names; plain is always the first."""
  greedy = config.sampling.temperature == 0
  kept = range(0, lm.config.num_layers, config.draft_every)
  shallow, params = layers.select(lm.config, lm.params, kept)
  draft = pretrained.LanguageModel(
    name=f'{lm.name}, every {config.draft_every}th layer',
    config=shallow,
    params=params,
    tokenizer=lm.tokenizer,
  )
  chosen = [
    decoding.Method(
      name='plain',
      engine=engine_lib.prepare(
        lm,
        drafter='plain',
        greedy=greedy,
        verifier=None if greedy else 'coupled',
        stop=config.stop,
      ),
    )
  ]
  for name in config.methods:
    kind, _, length = name.partition(', ')
    drafter, _, verifier = kind.partition('/')
    if length and not length.isdigit():
      raise ValueError(
        f"methods are 'drafter', 'drafter/verifier' or either with ', LENGTH':"
        f' {name!r} is none of them.'
      )
    engine = engine_lib.prepare(
      lm,
      drafter=drafter,
      draft=draft if drafter == 'draft model' else None,
      exit_layers=config.exit_layers if drafter == 'early exit' else None,
      draft_length=int(length) if length else None,
      verifier=verifier or None,
      greedy=greedy,
      stop=config.stop,
    )
    chosen.append(decoding.Method(name=name, engine=engine))
    # Fixed lengths are those of the same compiled program.
    lengths = config.fixed_lengths if kind == 'n-gram' and not length else ()
    chosen += [
      decoding.Method(name=f'{name}, {g}', engine=engine, force_length=g)
      for g in lengths
    ]
  return chosen


def summarize(methods, records, config) -> list[dict]:
  """A row for each method, prompt set and batch, and for each category."""
  rows = []
  for name in config.prompts:
    for batch in config.batches:
      mine = [r for r in records if r[:2] == (name, batch)]
      every = set().union(*(categories for _, _, categories, _ in mine))
      parts = [(name, mine)]
      if batch == 1 and len(every) > 1:
        parts += [
          (f'{name}/{category}', [r for r in mine if category in r[2]])
          for category in sorted(every)
        ]
      rows += [
        row(method, part, batch, [r for *_, r in group], config)
        for part, group in parts
        for method in methods
      ]
  return rows


def row(method, part, batch, records, config) -> dict:
  """One method on one set of prompts."""
  facts = records[0]['facts']
  seconds = {
    m: {int(g): s for g, s in f['round_seconds'].items()}
    for m, f in facts.items()
  }
  peak = facts[method.name]['peak_bytes']
  return {
    'method': method.name,
    'baseline': decoding.BASELINE,
    'prompts': part,
    'batch': batch,
    'draft_length': method.force_length,
    **decoding.summarize(
      [r['methods'][method.name] for r in records],
      [r['methods'][decoding.BASELINE] for r in records],
      seconds[method.name],
      seconds[decoding.BASELINE][0],
    ),
    'round_milliseconds': {
      str(g): 1e3 * s for g, s in seconds[method.name].items()
    },
    'peak_bytes': peak,
    'peak_megabytes': None if peak is None else round(peak / 1e6),
    'temperature': config.sampling.temperature,
    'seed': config.seed,
  }


def show(methods, texts, config, slots, settings) -> None:
  """Prints the trace of one prompt a set for the first drafting method."""
  console = rich.console.Console()
  method = methods[1]
  for group in texts.values():
    prompt, ids = group[0]
    result = generation.generate(
      method.engine,
      [ids],
      max_new_tokens=config.max_new_tokens,
      slots=slots,
      seed=config.seed,
      **settings,
    )
    console.print(f'\n{prompt.name}, {method.name}', style='bold')
    console.print(trace.legend())
    lm = method.engine.lm
    console.print(trace.render(result.rows[0], lm.tokenizer))


def main(argv) -> None:
  """Runs the experiment from a command line."""
  switches = {'show_tokens': 'print which draft tokens were accepted'}
  launch.run('decode', experiment, argv, switches)


if __name__ == '__main__':
  main(sys.argv)
