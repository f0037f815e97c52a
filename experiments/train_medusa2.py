"""Trains Medusa's heads and, through an adapter, the model they stand on.

    python -m experiments.train_medusa2 --config=configs/train_medusa2.py \\
      --workdir=runs/train_medusa2 --config.draft=runs/train_medusa/draft...

The second stage of Medusa-2: it begins from the heads that `train_medusa` left,
and from the model itself, whose adapter is zero at first. What comes out is
another model with texts of its own, and heads for it:

* `model/`, the adapted model, that `decode` takes as `--config.model`,
* `draft.safetensors`, its heads, that it takes as `--config.trained.medusa`,
* `adapter.safetensors`, the difference between both models alone.

Decoding with the heads is exact: it writes what the adapted model writes. How
far that is from what the original would write stands in the report.
"""

import dataclasses
import json
import shutil
import sys

import jax
import ml_collections
import numpy as np

from efficiency_jax import drafts
from efficiency_jax import trees
from efficiency_jax.adaptation import lora
from efficiency_jax.io import arrays
from efficiency_jax.io import export
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
  """Trains, merges, calibrates, saves and reports."""
  lm = inputs.load_model(config)
  first = drafts.load(config.draft, lm)
  if drafts.kind(first) != 'medusa':
    raise ValueError(f'--config.draft={config.draft} holds no heads of Medusa.')
  layers = first.form.layers
  splits = answer_files.load_splits(lm, config.answers, layers)
  train = {k: v[: config.num_train] for k, v in splits['train'].items()}
  apply = transformer.apply_fn(lm.config, layers=layers)
  key = jax.random.key(config.seed)
  adapted, report = lora.adapt(lm.params, **config.adapter, key=key)
  factors = lora.factors(adapted)
  copy = lambda x: np.array(x, np.float32)  # training gives away what it gets
  result = training_run.train(
    config.training,
    workdir,
    params=jax.tree.map(copy, {'heads': first.params, 'adapter': factors}),
    frozen=objectives.frozen(adapted, first.vocabulary),
    loss=objectives.computed(  # by the adapter as it began, adding nothing
      objectives.joint(
        first.form,
        apply,
        transformer.head_fn(lm.config),
        backbone=inputs.weights(config, 'backbone'),
        heads_weight=config.heads_weight,
        objectives=inputs.weights(config, 'objectives'),
        decay=config.decay,
      ),
      apply,
    ),
    rows=train,
    held_out=splits['validation'],
    seed=config.seed,
  )
  adapter = result.params['adapter']
  params = lora.merge(lora.with_factors(adapted, adapter))
  tuned = dataclasses.replace(lm, name=f'{lm.name}, adapted', params=params)
  held_out = dict(splits['validation'])
  held_out['hidden'] = answer_files.states(tuned, held_out['tokens'], layers)
  heads, found, shown = head_trees.calibrated(
    tuned,
    first.form,
    result.params['heads'],
    held_out,
    first.vocabulary,
    config,
  )
  about = {
    'target': f'{tuned.name}: another model than {lm.name}, with other texts',
    'adapter': f'{report.trained:,} parameters in {len(report.paths)} kernels',
    'KL(original || adapted)': f'{result.validation["original_kl"]:.4f} nats',
    'same likeliest token as the original': (
      f'{100 * result.validation["original_agreement"]:.2f} %'
    ),
  }
  arrays.save(
    workdir.path / 'adapter.safetensors',
    {path: np.asarray(leaf) for path, leaf in trees.leaves(adapter)},
    {**about, 'base': lm.name, 'adapter': json.dumps(config.adapter.to_dict())},
  )
  folder = workdir.path / 'model'
  shutil.rmtree(folder, ignore_errors=True)
  export.save(tuned, folder)
  draft_report.write(
    workdir, result, found, shown, 'head', train, heads, tuned, about
  )


def main(argv) -> None:
  """Runs the experiment from a command line."""
  launch.run('train_medusa2', experiment, argv)


if __name__ == '__main__':
  main(sys.argv)
