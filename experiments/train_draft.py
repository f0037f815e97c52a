"""Trains a one-layer draft on the answers of its target.

    python -m experiments.train_draft --config=configs/train_draft.py \\
      --workdir=runs/train_draft

The answers are those of `answer_chats`. The run leaves `draft.safetensors`,
which `decode` reads, with trees of the best shapes; its table says how often
the i-th drafted token would be kept, its figure how that grew.
"""

import functools
import sys

import jax
import ml_collections

from efficiency_jax import drafts
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import eagle_training
from efficiency_jax.models import transformer
from efficiency_jax.training import objectives
from experiments import answer_files
from experiments import calibration
from experiments import draft_report
from experiments import inputs
from experiments import launch
from experiments import training_run
from experiments import workdir as workdirs


def experiment(
  config: ml_collections.ConfigDict, workdir: workdirs.Workdir
) -> None:
  """Trains, calibrates, saves and reports."""
  lm = inputs.load_model(config)
  form = eagle.Form(
    target=lm.config,
    vocabulary=config.vocabulary or None,
    ffn_width=config.ffn_width or None,
    layers=tuple(config.layers),
  )
  splits, vocabulary = answer_files.for_drafts(lm, config, form.layers)
  apply = transformer.apply_fn(lm.config, layers=form.layers)
  losses = inputs.weights(config, 'objectives')
  frozen = objectives.frozen(lm.params, vocabulary)
  params = eagle.init(form, jax.random.key(config.seed), lm.params)
  if config.start:
    params = _start(lm, form, config.start)
  elif config.ridge:
    params = eagle_training.least_squares(
      form,
      params,
      frozen['target'],
      answer_files.batches_with_states(
        splits['train'], config.ridge_rows, apply, lm.params
      ),
      config.ridge,
    )
  result = training_run.train(
    config.training,
    workdir,
    params=params,
    frozen=frozen,
    loss=objectives.computed(
      objectives.draft(form, steps=config.steps, objectives=losses),
      apply,
    ),
    rows=splits['train'],
    held_out=splits['validation'],
    seed=config.seed,
  )
  ranks = functools.partial(
    eagle_training.ranks,
    form,
    result.params,
    frozen['target'],
    steps=config.tree_height,
    vocabulary=frozen.get('vocabulary'),
  )
  shapes, found, table = calibration.calibrated(
    ranks, splits['validation'], config
  )
  draft = eagle.TrainedDraft(
    form=form, params=result.params, vocabulary=vocabulary, trees=shapes
  )
  draft_report.write(
    workdir, result, found, table, 'drafted token', splits['train'], draft, lm
  )


def _start(lm, form, path: str):
  """The parameters of a trained draft of `form`, in float32 to be trained.

  Which tokens its vocabulary held does not matter: its states are scored by the
  target's head, whatever rows of it are asked for.
  """
  draft = drafts.load(path, lm)
  if drafts.kind(draft) != 'eagle':
    raise ValueError(
      f'--config.start={path} is for {drafts.kind(draft)!r}: take a file that'
      ' train_draft made.'
    )
  if draft.form != form:
    raise ValueError(
      f'--config.start={path} is a draft of another form: set'
      f' --config.vocabulary={draft.form.vocabulary or 0},'
      f' --config.ffn_width={draft.form.ffn_width or 0} and'
      f' --config.layers={draft.form.layers}.'
    )
  return jax.tree.map(lambda x: x.astype('float32'), draft.params)


def main(argv) -> None:
  """Runs the experiment from a command line."""
  launch.run('train_draft', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
