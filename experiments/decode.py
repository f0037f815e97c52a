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

from efficiency_jax import generation
from efficiency_jax.decoding import sampling
from efficiency_jax.evaluation import decoding
from experiments import decode_rows
from experiments import display
from experiments import figures
from experiments import inputs
from experiments import launch
from experiments import methods as ways
from experiments import trace
from experiments import workdir as workdirs


def experiment(
  config: ml_collections.ConfigDict,
  workdir: workdirs.Workdir,
  show_tokens: bool = False,
) -> None:
  """Measures all cases of `config`, then writes table, figure and traces."""
  settings = dict(config.sampling)
  sampling.make(1, **settings)  # a mistake here should not wait for the model
  lm = inputs.for_decoding(inputs.load_model(config))
  methods = ways.build(lm, config)
  texts = {
    name: inputs.load_prompts(lm, config, name) for name in config.prompts
  }
  slots = inputs.slots(lm, config, texts.values())
  cases = [
    (name, batch, place, group)
    for name, group_of in texts.items()
    for batch in config.batches
    for place, group in enumerate(decode_rows.groups(group_of, batch, config))
  ]
  peaks, records = {}, []
  for name, batch, place, group in display.track(cases, 'decoding'):

    def make(name=name, batch=batch, place=place, group=group):
      where = batch, slots, settings
      if batch not in peaks:
        waiting = any(len(of) > b for _, b, _, of in cases if b == batch)
        peaks[batch] = decoding.warm_up(methods, *where, waiting=waiting)
      turns = decode_rows.turns_beside(len(texts[name]), len(group))
      turns = decoding.time_rounds(methods, *where, turns=turns)
      measured = decoding.measure(
        methods,
        [ids for _, ids in group],
        max_new_tokens=config.max_new_tokens,
        slots=slots,
        settings=settings,
        batch=batch,
        seed=config.seed,
        repeats=config.repeats,
        backwards=place % 2 == 1,
      )
      return {
        'peak_bytes': peaks[batch],
        'turns': turns,
        'methods': decoding.records(measured),
      }

    record = workdir.row(f'{name}/{batch}/{place}', make)
    records.append((name, batch, {p.category for p, _ in group}, record))
    workdir.log({'case': f'{name}/{batch}/{place}', **record['methods']})

  rows = decode_rows.summarize(methods, records, config)
  workdir.write_results(rows)
  shown = [row for row in rows if '/' not in row['prompts']]
  table = display.table(shown, decode_rows.COLUMNS)
  table.show()
  image = workdir.save_figure(figures.speedup_by_length(rows), 'speedup')
  workdir.write_report(f'{table.markdown()}\n\n![speed-up]({image.name})\n')
  if show_tokens:
    show(methods[1], texts, config, slots, settings)


def show(method, texts, config, slots, settings) -> None:
  """Prints the trace of one prompt a set for one method."""
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
    title = f'{prompt.name}, {method.name}'
    trace.show(title, result.rows[0], method.engine.lm.tokenizer)


def main(argv) -> None:
  """Runs the experiment from a command line."""
  switches = {'show_tokens': 'print which draft tokens were accepted'}
  launch.run('decode', experiment, argv, switches)


if __name__ == '__main__':
  main(sys.argv)
