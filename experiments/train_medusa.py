"""Trains Medusa's heads on the answers of their target, which stays as it is.

    python -m experiments.train_medusa --config=configs/train_medusa.py \\
      --workdir=runs/train_medusa

The answers are those of `answer_chats`, with the states that it kept, or else
with those that the target computes at every step. The run leaves
`draft.safetensors`, which `decode` reads, with trees of the best shapes; its
table says how often each head guesses right.
"""

import sys

import jax
import jax.numpy as jnp
import ml_collections

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import medusa
from efficiency_jax.models import transformer
from efficiency_jax.training import objectives
from experiments import answer_files
from experiments import draft_report
from experiments import head_trees
from experiments import inputs
from experiments import launch
from experiments import training_run
from experiments import workdir as workdirs


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Trains, calibrates, saves and reports."""
  losses = inputs.weights(config, 'objectives')
  lm = inputs.load_model(config)
  form = medusa.Heads(vocabulary=config.vocabulary or None, **config.heads)
  apply = transformer.apply_fn(lm.config, layers=form.layers)
  splits, vocabulary = answer_files.for_drafts(lm, config, form.layers)
  if form.confidence and vocabulary is not None:
    # What is outside the vocabulary is lost, which confidence has to learn.
    train = splits['train']
    if 'hidden' not in train:
      train['hidden'] = answer_files.states(lm, train['tokens'], form.layers)
    train['coverage'] = answer_files.coverage(lm, train['hidden'], vocabulary)
  frozen = objectives.frozen(lm.params, vocabulary)
  key, table = jax.random.key(config.seed), frozen['target']
  table = draft_vocabulary.head(table, vocabulary)
  if config.random_outputs:
    if not form.own:
      raise ValueError(
        '--config.random_outputs is for output heads of their own: set'
        ' --config.heads.own=True.'
      )
    table = jax.tree.map(lambda x: _random(key, x), table)
  output_head = transformer.head_fn(lm.config)
  result = training_run.train(
    config.training,
    workdir,
    params=medusa.init(form, key, lm.config.width, lm.config.vocab_size, table),
    frozen=frozen,
    loss=objectives.computed(
      objectives.heads(
        form,
        output_head,
        objectives=losses,
        decay=config.decay,
      ),
      apply,
    ),
    rows=splits['train'],
    held_out=splits['validation'],
    seed=config.seed,
  )
  heads, found, shown = head_trees.calibrated(
    lm, form, result.params, splits['validation'], vocabulary, config
  )
  draft_report.write(
    workdir, result, found, shown, 'head', splits['train'], heads, lm
  )


def _random(key: jax.Array, table: jax.Array) -> jax.Array:
  """Rows in random directions, as long as those of a table in the mean."""
  scale = jnp.sqrt(jnp.mean(jnp.square(table.astype(jnp.float32))))
  return scale * jax.random.normal(key, table.shape)


def main(argv) -> None:
  """Runs the experiment from a command line."""
  launch.run('train_medusa', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
