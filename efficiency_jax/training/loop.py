"""The one training loop.

It calls a compiled step on one batch after another, looks at the numbers one
step late so that the device never waits for the host, evaluates, saves, and
goes on from the last checkpoint when it is called again. On a CPU the resumed
run is the uninterrupted one, bit for bit: state, data and log.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp

from efficiency_jax.io.checkpoint import Store
from efficiency_jax.io.errors import FileFormatError
from efficiency_jax.training.logbook import Logbook
from efficiency_jax.training.state import TrainState
from efficiency_jax.training.step import Step
from efficiency_jax.types import Params

# Steps between the times when several processes ask each other whether to end.
_AGREE_EVERY = 16

_logger = logging.getLogger(__name__)

# Trained parameters and frozen ones to numbers; `loss` is the score.
Evaluate = Callable[[Params, Any], Mapping[str, float]]


class TrainingError(ValueError):
  """Training cannot go on; the last checkpoint is whole."""


class Preempted(Exception):
  """The process was asked to end; with a store the run is saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """How long, and how often.

  Attributes:
    steps: Updates of the whole run.
    evaluate_every: Steps between evaluations, and one at the end; 0 is never.
    save_every: Steps between checkpoints, and one at the end; 0 is only the
      end. A step that is evaluated is saved too, with its score.
    tokens_per_step: For the rate that is logged.
    flops_per_step: Of the model's own arithmetic, for its utilization.
    peak_flops: What all devices together could do in a second, if known.
  """

  steps: int
  evaluate_every: int = 0
  save_every: int = 0
  tokens_per_step: int = 0
  flops_per_step: float = 0.0
  peak_flops: float = 0.0

  def __post_init__(self):
    for name in ('steps', 'evaluate_every', 'save_every'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name} must be >= 0, got {getattr(self, name)}.')


def fit(
  step: Step,
  state: TrainState,
  frozen: Any,
  batches: Iterator[Any],
  plan: Plan,
  *,
  store: Store | None = None,
  evaluate: Evaluate | None = None,
  logbook: Logbook | None = None,
  report: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainState:
  """Trains until `plan.steps` updates are done.

  Args:
    step: From `make_step`, compiled by the caller or not.
    state: Where to begin, unless `store` holds a checkpoint: then from there,
      in the dtypes and shardings of this one.
    frozen: Handed to every step.
    batches: An iterator. With a `store` it must have `get_state` and
      `set_state`, as grain's iterators do.
    plan: How long, and how often.
    store: Where checkpoints are; None keeps none.
    evaluate: Sees the moving average of the parameters if there is one.
    logbook: Takes the numbers of every step and evaluation.
    report: Is called after every step, to show them.

  Returns:
    The state after the last step.

  Raises:
    TrainingError: The loss or the gradient is not finite, or data ran out.
    Preempted: SIGTERM came. The state has been saved, if there is a store.
    CheckpointError: The disk is full; earlier checkpoints are whole.
  """
  if store is not None and not hasattr(batches, 'set_state'):
    raise ValueError('batches must have get_state and set_state to be resumed.')
  state, data = _resume(state, batches, store)
  done = int(state.step)
  if logbook is not None:
    logbook.rewind(done)
  meter = _Meter(plan)
  pending: tuple[int, Any] | None = None

  def settle() -> None:
    """Reads the numbers of the step before, waiting for it."""
    nonlocal pending
    if pending is None:
      return
    (number, metrics), pending = pending, None
    numbers = {name: float(value) for name, value in metrics.items()}
    _check(number, numbers, store)
    numbers |= meter.tick()
    if logbook is not None:
      logbook.write(number, numbers)
    if report is not None:
      report(number, numbers)

  def save(score=None):
    if store is not None:
      store.save(done, state, data(), score)

  with _terminations() as asked:
    while done < plan.steps:
      try:
        batch = next(batches)
      except StopIteration:
        raise TrainingError(
          f'the data ended after {done} of {plan.steps} steps: allow more'
          ' epochs, or fewer steps.'
        ) from None
      state, metrics = step(state, frozen, batch)
      settle()  # while this step runs
      done += 1
      pending = (done, metrics)
      last = done == plan.steps
      if evaluate is not None and _due(done, plan.evaluate_every, last):
        settle()
        params = state.params if state.average is None else state.average
        found = {k: float(v) for k, v in evaluate(params, frozen).items()}
        if logbook is not None:
          named = {f'validation_{name}': v for name, v in found.items()}
          logbook.write(done, named)
        save(found.get('loss'))
        meter.pause()
      elif _due(done, plan.save_every, last):
        settle()
        save()
        meter.pause()
      if not last and _stop(asked, done):
        settle()
        save()
        kept = 'is saved' if store is not None else 'is lost'
        raise Preempted(
          f'stopped at step {done} of {plan.steps}, which {kept}.'
        )
  settle()
  return state


def _due(done: int, every: int, last: bool) -> bool:
  return last or bool(every and done % every == 0)


def _resume(state: TrainState, batches: Any, store: Store | None):
  """The state to begin from, and what reads the place of the data."""
  if store is None:
    return state, lambda: None
  for step in reversed(store.steps()):
    try:
      state, place = store.load(step, state)
    except FileFormatError as error:
      if step == store.steps()[0]:
        raise
      _logger.warning('%s; trying an earlier one.', error)
      continue
    batches.set_state(place)
    break
  return state, batches.get_state


def _check(number: int, numbers: Mapping[str, float], store) -> None:
  for name in ('loss', 'gradient_norm'):
    if not math.isfinite(numbers.get(name, 0.0)):
      last = store.latest() if store is not None else None
      kept = 'nothing was saved' if last is None else f'step {last} is saved'
      raise TrainingError(
        f'{name} is {numbers[name]} at step {number}; {kept}. Lower the'
        ' learning rate, clip gradients, or look at the data.'
      )


class _Meter:
  """Seconds a step, tokens a second and utilization, compilation apart."""

  def __init__(self, plan: Plan):
    self._plan = plan
    self._before: float | None = None

  def pause(self) -> None:
    """The time until the next tick is no step's."""
    self._before = None

  def tick(self) -> dict[str, float]:
    now = time.perf_counter()
    before, self._before = self._before, now
    if before is None:
      return {}
    seconds = max(now - before, 1e-9)
    rates = {'seconds': seconds}
    if self._plan.tokens_per_step:
      rates['tokens_per_second'] = self._plan.tokens_per_step / seconds
    if self._plan.flops_per_step and self._plan.peak_flops:
      rate = self._plan.flops_per_step / seconds
      rates['model_flops_utilization'] = rate / self._plan.peak_flops
    return rates


@contextlib.contextmanager
def _terminations() -> Iterator[threading.Event]:
  """An event that SIGTERM sets, in place of ending the process."""
  asked = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield asked
    return
  before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
  try:
    yield asked
  finally:
    signal.signal(signal.SIGTERM, before)


def _stop(asked: threading.Event, done: int) -> bool:
  """Whether all processes end after this step: they agree on it."""
  if jax.process_count() == 1:
    return asked.is_set()
  if done % _AGREE_EVERY:
    return False
  mine = jnp.int32(asked.is_set())
  return bool(multihost_utils.process_allgather(mine).any())
