"""Several processes as one program: start-up, and batches made of their rows.

The same command runs on every host. Each process reads its own rows of a batch
and holds its own part of every array; process 0 alone prints and writes.
"""

from collections.abc import Mapping
import errno
import os
import re
import socket
import time

import jax
import numpy as np

from efficiency_jax.distributed import mesh as meshes

_VARIABLES = {
  'coordinator': 'JAX_COORDINATOR_ADDRESS',
  'num_processes': 'JAX_NUM_PROCESSES',
  'process_id': 'JAX_PROCESS_ID',
}


def start(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  automatic: bool = False,
  timeout_seconds: int = 300,
) -> None:
  """Joins the other processes; does nothing where there are none.

  It comes before the first use of a device. What is not given is taken from
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

  Args:
    coordinator: host:port of process 0, where it will listen.
    num_processes: How many processes there are; 1 starts nothing.
    process_id: Which of them this is, from 0.
    automatic: On a Cloud TPU pod, under Slurm or Kubernetes: the three are
      found by asking there. Settings that were given still count.
    timeout_seconds: How long to wait for the others. If they are too few,
      JAX ends the process itself, with a message of its own.

  Raises:
    ValueError: The settings do not fit together, in one line.
    RuntimeError: JAX has used a device already, or was started before.
    ConnectionError: Nothing listened at the coordinator's address in time, or
      process 0 cannot listen there.
  """
  settings = _settings(coordinator, num_processes, process_id)
  if not automatic:
    if all(value is None for value in settings.values()):
      return
    _check(**settings)
    if settings['num_processes'] == 1:
      return
  if settings['process_id']:
    _reach(settings['coordinator'], timeout_seconds)
  elif settings['process_id'] == 0 and settings['coordinator']:
    _check_port(settings['coordinator'])
  try:
    jax.distributed.initialize(
      settings['coordinator'],
      settings['num_processes'],
      settings['process_id'],
      initialization_timeout=timeout_seconds,
    )
  except jax.errors.JaxRuntimeError as error:
    raise _cannot_listen(settings['coordinator'], error) from error
  except ValueError as error:
    if not automatic:
      raise
    raise ValueError(
      'no cluster was found here (Cloud TPU, Slurm, Kubernetes): give'
      f' coordinator, num_processes and process_id ({error})'
    ) from error


def is_first() -> bool:
  """Whether this process is the one that prints and writes."""
  return jax.process_index() == 0


def process_rows(mesh: jax.sharding.Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a batch of `batch_size` this process reads, in order.

  Processes that share devices of one part of the batch, as they do where the
  `tensor` axis spans hosts, read the same rows.

  Raises:
    ValueError: The batch is no multiple of the devices that split it.
  """
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size < 1 or batch_size % parts:
    raise ValueError(
      f'the batch must be a multiple of data*fsdp={parts} rows, got'
      f' {batch_size}.'
    )
  sharding = meshes.batch_sharding(mesh)
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in indices]))


def process_batch(
  mesh: jax.sharding.Mesh, arrays: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
  """Joins the rows of all processes into the arrays of one batch.

  Args:
    mesh: Of all processes.
    arrays: The rows of this process [n, ...], the same n everywhere: rows
      `process_rows` of a batch. With one process that is the whole batch.

  Returns:
    Arrays [batch, ...] laid out as `mesh.batch_sharding`.

  Raises:
    ValueError: The numbers of rows differ, or do not divide evenly.
  """
  counts = {name: len(array) for name, array in arrays.items()}
  if len(set(counts.values())) > 1:
    raise ValueError(f'all arrays of a batch have as many rows, got {counts}.')
  sharding = meshes.batch_sharding(mesh)
  parts = mesh.shape['data'] * mesh.shape['fsdp']
  mine = len(process_rows(mesh, parts))  # parts of the batch that are here
  for name, count in counts.items():
    if count < 1 or count % mine:
      raise ValueError(
        f'{name} must have a multiple of {mine} rows on each process, got'
        f' {count}.'
      )
  return {
    name: jax.make_array_from_process_local_data(
      sharding,
      np.asarray(array),
      (len(array) // mine * parts, *np.shape(array)[1:]),
    )
    for name, array in arrays.items()
  }


def _settings(coordinator, num_processes, process_id):
  """The settings, those missing from the environment."""
  given = {
    'coordinator': coordinator,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  for name, variable in _VARIABLES.items():
    text = os.environ.get(variable)
    if given[name] is not None or not text:
      continue
    if name != 'coordinator' and not text.isdecimal():
      raise ValueError(f'{variable} must be a whole number, got {text!r}.')
    given[name] = text if name == 'coordinator' else int(text)
  return given


def _check(coordinator, num_processes, process_id):
  given = {
    'coordinator': coordinator,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  if num_processes is not None and num_processes < 1:
    raise ValueError(f'num_processes must be >= 1, got {num_processes}.')
  missing = [name for name, value in given.items() if value is None]
  if num_processes == 1 and process_id in (None, 0):
    return
  if missing:
    raise ValueError(
      f'{" and ".join(missing)} must be given with'
      f' {" and ".join(n for n in given if n not in missing)} (or by'
      f' {" and ".join(_VARIABLES[n] for n in missing)}).'
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'process_id must be in 0..{num_processes - 1}, got {process_id}.'
    )
  if not re.fullmatch(r'.+:\d+', coordinator):
    raise ValueError(
      f'coordinator must be host:port of process 0, got {coordinator!r}.'
    )


def _check_port(coordinator: str) -> None:
  """Tries to listen; where a port is in use, jaxlib alone may crash."""
  port = int(coordinator.rpartition(':')[2])
  for family in (socket.AF_INET6, socket.AF_INET):
    try:
      socket.create_server(('', port), family=family).close()
    except OSError as error:
      if error.errno == errno.EADDRINUSE:
        raise _cannot_listen(coordinator, error) from error


def _cannot_listen(coordinator: str, error: Exception) -> ConnectionError:
  return ConnectionError(
    f'coordinator={coordinator!r}: process 0 could not listen there'
    f' ({" ".join(str(error).split())}); is the port in use?'
  )


def _reach(coordinator: str, timeout_seconds: int) -> None:
  """Waits until process 0 listens; JAX alone would end the process if not."""
  host, _, port = coordinator.rpartition(':')
  end = time.monotonic() + timeout_seconds
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), 5).close()
      return
    except (OSError, OverflowError) as error:
      if time.monotonic() > end:
        raise ConnectionError(
          f'coordinator={coordinator!r} did not answer within'
          f' {timeout_seconds} s ({error}): is process 0 running there?'
        ) from error
      time.sleep(0.2)
