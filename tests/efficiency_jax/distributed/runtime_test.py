"""Several processes: start-up, their rows, and the losses of one process."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from efficiency_jax.distributed import mesh as meshes
from efficiency_jax.distributed import runtime
from tests.efficiency_jax.distributed import tiny_training

ROOT = pathlib.Path(__file__).parents[3]


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def _start(*arguments, **variables):
  """A Python program with these variables, its streams kept apart."""
  return subprocess.Popen(
    [sys.executable, *arguments],
    cwd=ROOT,
    env={**os.environ, **variables},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _end(process, seconds=60):
  try:
    out, err = process.communicate(timeout=seconds)
  finally:
    process.kill()
  return process.returncode, out, err


def test_two_processes_train_as_one_does():
  coordinator = f'localhost:{_free_port()}'
  processes = [
    _start(
      '-m',
      'tests.efficiency_jax.distributed.tiny_training',
      JAX_COORDINATOR_ADDRESS=coordinator,
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(n),
    )
    for n in range(2)
  ]
  ended = [_end(process) for process in processes]
  for code, _, err in ended:
    assert code == 0, err[-2000:]
  found = [json.loads(out.splitlines()[-1]) for _, out, _ in ended]
  assert [f['processes'] for f in found] == [2, 2]
  assert [f['first'] for f in found] == [True, False]
  assert found[0]['key'] == found[1]['key']

  alone, _ = tiny_training.train(meshes.make(devices=jax.devices()[:1]))
  for f in found:
    for run in f['runs']:
      np.testing.assert_allclose(run['losses'], alone, atol=1e-5)
  split, spanning = zip(*(f['runs'] for f in found), strict=True)
  # Batches over both processes: each reads its half.
  assert [run['rows'] for run in split] == [[0, 1, 2, 3], [4, 5, 6, 7]]
  assert [run['kernel'] for run in split] == [[16, 128]] * 2
  # Heads over both processes: each reads everything.
  assert [run['rows'] for run in spanning] == [list(range(8))] * 2
  assert [run['kernel'] for run in spanning] == [[32, 32]] * 2


def test_one_process_starts_nothing(monkeypatch):
  for name in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'):
    monkeypatch.delenv(f'JAX_{name}', raising=False)
  runtime.start()
  runtime.start(num_processes=1)
  runtime.start('localhost:1', 1, 0)
  assert not jax.distributed.is_initialized()
  assert runtime.is_first()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (('host:1', None, None), 'num_processes and process_id must be given with'),
    (('host:1', 2, None), 'process_id must be given with coordinator and num'),
    ((None, 2, 0), r'coordinator must be given with .*JAX_COORDINATOR_ADDRESS'),
    (('host:1', 2, 2), r'process_id must be in 0\.\.1, got 2\.'),
    (('host:1', 2, -1), r'process_id must be in 0\.\.1, got -1\.'),
    (('host:1', 1, 3), r'process_id must be in 0\.\.0, got 3\.'),
    (('host:1', 0, 0), 'num_processes must be >= 1, got 0'),
    (('host', 2, 0), "coordinator must be host:port of process 0, got 'host'"),
  ],
)
def test_settings_that_do_not_fit_are_refused(settings, message, monkeypatch):
  for name in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'):
    monkeypatch.delenv(f'JAX_{name}', raising=False)
  with pytest.raises(ValueError, match=message) as caught:
    runtime.start(*settings)
  assert '\n' not in str(caught.value)


def test_a_coordinator_that_is_not_there_is_named():
  address = f'localhost:{_free_port()}'
  with pytest.raises(ConnectionError, match=f'{address}.*is process 0 running'):
    runtime.start(address, 2, 1, timeout_seconds=0)


def test_a_port_in_use_is_named():
  with socket.socket(socket.AF_INET6) as taken:
    taken.bind(('::', 0))
    taken.listen()
    address = f'localhost:{taken.getsockname()[1]}'
    code = (
      'from efficiency_jax.distributed import runtime\n'
      f'try:\n  runtime.start({address!r}, 2, 0, timeout_seconds=5)\n'
      'except ConnectionError as error:\n  print(error)\n'
    )
    _, out, err = _end(_start('-c', code))
  assert f"coordinator='{address}': process 0 could not listen" in out, err


def test_a_device_that_was_used_before_is_an_error():
  jax.devices()
  with pytest.raises(RuntimeError, match='must be called before'):
    runtime.start(f'localhost:{_free_port()}', 2, 0)


def test_the_environment_is_read_and_checked(monkeypatch):
  monkeypatch.setenv('JAX_NUM_PROCESSES', 'two')
  with pytest.raises(ValueError, match='JAX_NUM_PROCESSES must be a whole num'):
    runtime.start('host:1', process_id=0)
  monkeypatch.setenv('JAX_NUM_PROCESSES', '2')
  monkeypatch.setenv('JAX_PROCESS_ID', '5')
  with pytest.raises(ValueError, match=r'process_id must be in 0\.\.1, got 5'):
    runtime.start('host:1')


def test_a_batch_is_split_over_data_and_fsdp():
  mesh = meshes.make(data=2, fsdp=2, tensor=2)
  arrays = {
    'tokens': np.arange(32, dtype=np.int32).reshape(8, 4),
    'weight': np.arange(8, dtype=np.float32),
  }
  assert runtime.process_rows(mesh, 8).tolist() == list(range(8))
  batch = runtime.process_batch(mesh, arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(batch[name], array)
    assert batch[name].dtype == array.dtype
    assert batch[name].sharding == meshes.batch_sharding(mesh)
    shards = {shard.data.shape[0] for shard in batch[name].addressable_shards}
    assert shards == {2}


def test_rows_that_do_not_divide_are_refused():
  mesh = meshes.make(data=4, fsdp=2)
  with pytest.raises(ValueError, match='x must have a multiple of 8 rows'):
    runtime.process_batch(mesh, {'x': np.zeros((4, 2))})
  with pytest.raises(ValueError, match='as many rows, got'):
    runtime.process_batch(mesh, {'x': np.zeros((8, 2)), 'y': np.zeros(16)})
  with pytest.raises(ValueError, match=r'a multiple of data\*fsdp=8 rows, got'):
    runtime.process_rows(mesh, 12)
