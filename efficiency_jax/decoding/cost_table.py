"""Seconds that a round of each draft length takes, measured on this machine."""

from collections.abc import Sequence
import time

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import speculative
from efficiency_jax.decoding.drafters import Weights
from efficiency_jax.decoding.speculative import Decoder
from efficiency_jax.decoding.speculative import State

# Seconds of a sample beside which starting the loop and reading the clock are
# nothing; a single round of a wide batch may take as long.
_ENOUGH = 0.2


def measure(
  decoder: Decoder,
  weights: Weights,
  state: State,
  *,
  rounds: int = 6,
  repeats: int = 4,
) -> np.ndarray:
  """Times the compiled loop itself, forced to one draft length after another.

  Nothing is compiled that decoding does not need anyway. The lengths take turns
  within a repeat, so that a machine that slows down slows all of them. The
  first turn is one round and is not counted: it tells how many are enough.

  Args:
    decoder: The loop to time.
    weights: Its parameters.
    state: A started state, used up by this call. Every row must have room for
      `rounds` fully accepted drafts between its `length` and its `limit`.
    rounds: Rounds a sample at most: as many as take 0.2 seconds are enough.
    repeats: Samples a length.

  Returns:
    Seconds a round of each draft length: [len(lengths)] float32, `combined`.
  """
  lengths = decoder.schedule.lengths
  room = np.asarray(state.limit - state.length).min()
  if room < rounds * (decoder.schedule.longest + 1):
    raise ValueError(
      f'rows need room for {rounds} rounds of {decoder.schedule.longest + 1}'
      f' tokens, got {room}: raise the limit or lower rounds.'
    )
  begin_length = np.asarray(state.length)
  # No token ends a row, so that every sample has all its rounds.
  state = state._replace(stop=jnp.full_like(state.stop, -1))
  no_costs = jnp.ones((len(lengths),), jnp.float32)
  none_waits = jnp.bool_(False)
  # No round at all, only to compile.
  state = speculative.run(
    decoder, weights, state, jnp.int32(0), no_costs, jnp.int32(0), none_waits
  )
  seconds = np.zeros((repeats + 1, len(lengths)))
  number = np.ones(len(lengths), int)
  for repeat in range(repeats + 1):
    for index in range(len(lengths)):
      length = jnp.asarray(begin_length)
      state = state._replace(
        length=length,
        done=jnp.zeros(length.shape, bool),
        cache=state.cache._replace(length=length - 1),
      )
      some, forced = jnp.int32(number[index]), jnp.int32(index)
      begin = time.perf_counter()
      state = speculative.run(
        decoder, weights, state, some, no_costs, forced, none_waits
      )
      jax.block_until_ready(state.length)
      seconds[repeat, index] = (time.perf_counter() - begin) / number[index]
    if repeat == 0:
      number = np.ceil(_ENOUGH / seconds[0]).clip(1, rounds).astype(int)
  return combined(seconds[1:])


def combined(turns: Sequence[np.ndarray]) -> np.ndarray:
  """One table [L] of those of several turns: what a length costs over others.

  A schedule compares lengths with each other. So each is compared within a
  turn, where the machine was as fast for all, and the median of the turns
  counts; the fastest time of each length would be that of another moment. The
  first length has its fastest time, for what else the machine does adds time.
  """
  turns = np.asarray(turns)
  ratios = np.median(turns / turns[:, :1], axis=0)
  return (turns[:, 0].min() * ratios).astype(np.float32)
