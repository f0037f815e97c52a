"""Shuffled batches of rows that lie in memory, resumable to the batch."""

from collections.abc import Mapping

import grain
import numpy as np


def batches(
  arrays: Mapping[str, np.ndarray],
  *,
  batch_size: int,
  seed: int,
  epochs: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """Batches of the rows of arrays [R, ...], of which each host makes its part.

  An epoch holds every row once, in an order that depends on the seed and the
  epoch; rows of zeros fill its last batch up. Of every batch, each of the hosts
  makes `batch_size / process_count` rows, and all hosts together make the batch
  that one host alone would.

  An iterator of the result has `get_state` and `set_state`: a new iterator,
  also after a restart, set to the state goes on with the very next batch. The
  state is a place in the order, so the arrays and all settings must be those of
  the run that it was taken from; only `epochs` may grow.

  Args:
    arrays: By name, of as many rows each, the same on every host.
    batch_size: Rows B of a batch, counted over all hosts.
    seed: Of the order, from 0 to 2**32 - 1; the same on every host.
    epochs: How often all is gone through; None never ends.
    process_index: Which of the hosts this is.
    process_count: How many hosts there are.

  Raises:
    ValueError: A number is out of its range, the batch cannot be divided among
      the hosts, or the arrays differ in their rows or have none.
  """
  if process_count < 1 or not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index must be one of 0 to process_count - 1, not'
      f' {process_index} with a process_count of {process_count}.'
    )
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f'batch_size must be a positive multiple of process_count'
      f' {process_count}, not {batch_size}.'
    )
  if epochs is not None and epochs < 1:
    raise ValueError(f'epochs must be None or at least 1, not {epochs}.')
  if not 0 <= seed < 2**32:
    raise ValueError(f'seed must be from 0 to 2**32 - 1, not {seed}.')
  sizes = {name: len(array) for name, array in arrays.items()}
  if len(set(sizes.values())) != 1 or 0 in sizes.values():
    raise ValueError(f'arrays must have as many rows each, got {sizes}.')
  filled = _filled_up(arrays, batch_size)
  rows = len(next(iter(filled.values())))
  # Numbers of rows go through grain, one by one; a batch of rows is then taken
  # at once, which is twice as fast as to hand grain each of them.
  order = grain.MapDataset.range(rows).seed(seed).shuffle()
  own = order.repeat(epochs)[process_index::process_count]
  own = own.batch(batch_size // process_count, batch_fn=np.asarray)
  own = own.map(lambda chosen: {k: v[chosen] for k, v in filled.items()})
  # The rows lie in memory: threads that read ahead would only wait.
  return own.to_iter_dataset(
    grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  )


def _filled_up(
  arrays: Mapping[str, np.ndarray], multiple: int
) -> dict[str, np.ndarray]:
  """Adds rows of zeros up to a multiple."""
  filled = {}
  for name, array in arrays.items():
    missing = -len(array) % multiple
    zeros = np.zeros_like(array, shape=(missing, *array.shape[1:]))
    filled[name] = np.concatenate([array, zeros]) if missing else array
  return filled
