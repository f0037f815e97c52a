"""A training run inside a workdir: what the training scripts have in common.

`checkpoints/` holds the state, `training.jsonl` the numbers of every step. A
run that was stopped goes on from its last checkpoint.
"""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from efficiency_jax.data import rows as data_rows
from efficiency_jax.evaluation import speed
from efficiency_jax.io.checkpoint import Store
from efficiency_jax.training import loop
from efficiency_jax.training import optimizers
from efficiency_jax.training import state as states
from efficiency_jax.training import step as steps
from efficiency_jax.training.logbook import Logbook
from efficiency_jax.types import Params
from experiments import display
from experiments import workdir as workdirs

_LOG = 'training.jsonl'


@dataclasses.dataclass(frozen=True)
class Result:
  """What came out of a run.

  Attributes:
    params: Of the best evaluation; the moving average if there is one.
    history: The numbers of every step and evaluation, in order.
    validation: Those of the best evaluation.
  """

  params: Params
  history: list[dict[str, Any]]
  validation: dict[str, float]


def train(
  settings: ml_collections.ConfigDict,
  workdir: workdirs.Workdir,
  *,
  params: Params,
  frozen: Any,
  loss: steps.Loss,
  rows: Mapping[str, np.ndarray],
  held_out: Mapping[str, np.ndarray],
  seed: int,
) -> Result:
  """Trains `params` on rows of arrays, and keeps the best by validation.

  Args:
    settings: `batch`, `epochs`, `evaluate_every`, `save_every`,
      `accumulation`, `average_decay` (0 is no average), `tensorboard`, and
      `optimizer`, fields of `OptimizerConfig` other than its steps.
    workdir: Where it is kept.
    params: Where training begins.
    frozen: Handed to the loss.
    loss: What is minimized.
    rows: Arrays [R, ...] to train on.
    held_out: Arrays to evaluate on.
    seed: Of the order of the rows.
  """
  size = settings.batch
  total = settings.epochs * -(-len(rows['tokens']) // size)
  optimizer = optimizers.make(
    optimizers.OptimizerConfig(steps=total, **settings.optimizer)
  )
  decay = settings.average_decay
  state = states.create(params, optimizer, averaged=bool(decay))
  batches = iter(
    data_rows.batches(rows, batch_size=size, seed=seed, epochs=settings.epochs)
  )
  update = steps.make_step(
    loss,
    optimizer,
    accumulation=settings.accumulation,
    average_decay=decay or 0.999,
  )
  example = {
    k: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype)
    for k, v in rows.items()
  }
  update = jax.jit(update, donate_argnums=0)
  update = update.lower(state, frozen, example).compile()
  store = Store(folder=workdir.path / 'checkpoints', keep=1)
  book = Logbook(workdir.path / _LOG, tensorboard=settings.tensorboard)
  evaluate = _evaluation(loss, held_out, size)
  with display.steps(total) as report:
    state = loop.fit(
      update,
      state,
      frozen,
      batches,
      loop.Plan(
        steps=total,
        evaluate_every=settings.evaluate_every,
        save_every=settings.save_every,
        tokens_per_step=size * rows['tokens'].shape[1],
        flops_per_step=speed.compiled_flops(update),
        peak_flops=speed.arithmetic_rate(),
      ),
      store=store,
      evaluate=evaluate,
      logbook=book,
      report=report,
    )
  book.close()
  best, _ = store.load(store.best(), state)
  params = best.params if best.average is None else best.average
  lines = (workdir.path / _LOG).read_text(encoding='utf-8').splitlines()
  return Result(
    params, [json.loads(line) for line in lines], evaluate(params, frozen)
  )


def seconds(result: Result) -> float:
  """Of all steps, without compilation and evaluation."""
  return sum(entry.get('seconds', 0.0) for entry in result.history)


def _evaluation(loss, held_out, size):
  """Means over the held-out rows, weighted by what each batch counts."""
  compute = jax.jit(steps.make_evaluation(loss))

  def evaluate(params, frozen):
    sums, weight = {}, 0.0
    for batch in data_rows.batches(held_out, batch_size=size, seed=0, epochs=1):
      batch = jax.tree.map(jnp.asarray, batch)
      found = {k: float(v) for k, v in compute(params, frozen, batch).items()}
      counted = found.pop('weight')
      weight += counted
      for name, value in found.items():
        sums[name] = sums.get(name, 0.0) + counted * value
    return {name: value / max(weight, 1e-9) for name, value in sums.items()}

  return evaluate
