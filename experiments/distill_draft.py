"""Distils a draft model from its target, out of which it is cut (DistillSpec).

    python -m experiments.distill_draft --config=configs/distill_draft.py \\
      --workdir=runs/distill_draft

The answers are those of `answer_chats`, whose hidden states stand for the
target. The run leaves `draft.safetensors`, which `decode` reads, with trees of
the best shapes; its tables say how often the next tokens would be drafted
right, and what chains and trees are worth.
"""

import functools
import sys

import ml_collections

from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_model_training
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
  """Cuts, trains, saves and reports."""
  lm = inputs.load_model(config)
  form = draft_model.Form(
    target=lm.config,
    layers=tuple(config.layers),
    vocabulary=config.vocabulary or None,
    ffn_width=config.ffn_width or None,
  )
  splits, vocabulary = answer_files.for_drafts(lm, config)
  frozen = objectives.frozen(lm.params, vocabulary)
  result = training_run.train(
    config.training,
    workdir,
    params=draft_model.init(form, lm.params),
    frozen=frozen,
    loss=objectives.computed(
      objectives.distillation(
        form,
        objectives=inputs.weights(config, 'objectives'),
        length=config.draft_length,
      ),
      transformer.apply_fn(lm.config),
    ),
    rows=splits['train'],
    held_out=splits['validation'],
    seed=config.seed,
  )
  ranks = functools.partial(
    draft_model_training.ranks,
    form,
    result.params,
    frozen['target'],
    steps=config.tree_height,
    vocabulary=frozen.get('vocabulary'),
  )
  shapes, found, table = calibration.calibrated(
    ranks, splits['validation'], config
  )
  draft = draft_model.TrainedDraft(
    form=form, params=result.params, vocabulary=vocabulary, trees=shapes
  )
  draft_report.write(
    workdir, result, found, table, 'drafted token', splits['train'], draft, lm
  )


def main(argv) -> None:
  """Runs the experiment from a command line."""
  launch.run('distill_draft', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
