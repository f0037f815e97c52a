"""What training carries from step to step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efficiency_jax.types import Params


class TrainState(NamedTuple):
  """The trained parameters and what their optimizer remembers."""

  step: jax.Array  # [] int32, updates so far
  params: Params  # what is trained; what is not is an argument of the step
  opt_state: Any
  average: Params | None  # an exponential moving average of `params`


def create(
  params: Params,
  optimizer: optax.GradientTransformation,
  *,
  averaged: bool = False,
) -> TrainState:
  """The state before the first step; arrays are as sharded as `params` are."""
  average = jax.tree.map(jnp.array, params) if averaged else None
  return TrainState(jnp.int32(0), params, optimizer.init(params), average)
