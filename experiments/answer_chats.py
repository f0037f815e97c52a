"""Lets a model answer real questions, and keeps what it thought meanwhile.

    python -m experiments.answer_chats --config=configs/answer_chats.py \\
      --workdir=runs/answers

The answers are what drafts are trained on (`train_medusa`, `train_draft`): one
file of tokens and hidden states a batch, and a split by the question's text. A
run that was stopped goes on with the next batch.
"""

import sys
import time

import ml_collections
import numpy as np

from efficiency_jax import answers
from efficiency_jax.io import arrays
from experiments import answer_files
from experiments import display
from experiments import figures
from experiments import inputs
from experiments import launch
from experiments import questions
from experiments import workdir as workdirs

COLUMNS = {
  'method': 'text',
  'split': 'split',
  'answers': 'answers',
  'tokens': 'answer tokens',
  'tokens_per_second': 'tokens/s',
  'ended': 'ended by themselves',
}


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Answers batch by batch, then counts."""
  lm = inputs.for_decoding(inputs.load_model(config))
  cases = questions.batches(lm, config)
  records = []
  for name, split, temperature, prompts in display.track(cases, 'answering'):

    def make(name=name, split=split, temperature=temperature, prompts=prompts):
      start = time.perf_counter()
      made = answers.answer(
        lm,
        prompts,
        slots=config.slots,
        temperature=temperature,
        seed=config.seed,
        first_row=int(name) * config.batch,
        keep_hidden=config.keep_hidden,
      )
      seconds = time.perf_counter() - start
      path = workdir.path / answer_files.FOLDER / f'{name}.safetensors'
      kept = {k: v for k, v in made._asdict().items() if v is not None}
      arrays.save(path, kept, {'split': split})
      last = made.tokens[np.arange(len(prompts)), made.length - 1]
      return {
        'split': split,
        'temperature': temperature,
        'seconds': seconds,
        'tokens': int((made.length - made.start).sum()),
        'answers': len(prompts),
        'ended': int(np.isin(last, lm.tokenizer.stop_ids).sum()),
      }

    records.append(workdir.row(name, make))
    workdir.log({'batch': name, **records[-1]})

  counts = answer_files.counts(workdir.path, 'train', lm.config.vocab_size)
  rows = [
    _row([r for r in records if (r['split'], r['temperature']) == kind])
    for kind in sorted({(r['split'], r['temperature']) for r in records})
  ]
  workdir.write_results(rows)
  table = display.table(rows, COLUMNS)
  table.show()
  image = workdir.save_figure(figures.coverage(counts), 'coverage')
  workdir.write_report(f'{table.markdown()}\n\n![coverage]({image.name})\n')


def _row(records) -> dict:
  total = lambda name: sum(record[name] for record in records)
  heat = records[0]['temperature']
  return {
    'method': 'greedy' if heat == 0 else f'temperature {heat}',
    'baseline': None,
    'split': records[0]['split'],
    'answers': total('answers'),
    'tokens': total('tokens'),
    'seconds': total('seconds'),
    'tokens_per_second': total('tokens') / total('seconds'),
    'ended': total('ended'),
  }


def main(argv) -> None:
  """Runs the experiment from a command line."""
  launch.run('answer_chats', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
