"""A training run of minutes: in memory, without checkpoints."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficiency_jax.data import rows as data_rows
from efficiency_jax.training import loop
from efficiency_jax.training import state as states
from efficiency_jax.training import step as steps
from efficiency_jax.types import Params
from experiments import display


def num_steps(rows: Mapping[str, np.ndarray], batch: int, epochs: int) -> int:
  """Updates of a run: the last batch of an epoch is filled up."""
  return epochs * -(-len(next(iter(rows.values()))) // batch)


def fit(
  loss: steps.Loss,
  optimizer: optax.GradientTransformation,
  params: Params,
  rows: Mapping[str, np.ndarray],
  *,
  batch: int,
  seed: int,
  epochs: int = 1,
  evaluate: loop.Evaluate | None = None,
) -> Params:
  """Trains on rows of arrays [R, ...]; `evaluate` sees the end of every epoch.

  The parameters that are given stay as they are; what `evaluate` is given will
  be written over by the next step.
  """
  total = num_steps(rows, batch, epochs)
  plan = loop.Plan(
    steps=total,
    evaluate_every=total // epochs if evaluate else 0,
    tokens_per_step=batch * rows['tokens'].shape[1] if 'tokens' in rows else 0,
  )
  update = jax.jit(steps.make_step(loss, optimizer), donate_argnums=0)
  # The first state is given away to the step.
  state = states.create(jax.tree.map(jnp.array, params), optimizer)
  batches = data_rows.batches(rows, batch_size=batch, seed=seed, epochs=epochs)
  with display.steps(total) as report:
    state = loop.fit(
      *(update, state, None, iter(batches), plan),
      evaluate=evaluate,
      report=report,
    )
  return state.params
