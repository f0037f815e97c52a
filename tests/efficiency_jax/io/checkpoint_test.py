"""Tests of checkpoints: whole, verified, or not there."""

import pathlib
import subprocess

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficiency_jax.io import checkpoint
from efficiency_jax.io import errors

pytestmark = pytest.mark.short


def _tree(value=1.0):
  params = {
    'w': jnp.full((8, 4), value),
    'b': {'c': jnp.full(3, value, jnp.bfloat16)},
  }
  opt_state = optax.adam(1e-3).init(params)
  return jnp.int32(7), params, opt_state, jax.random.key(3), None


def test_what_is_saved_is_loaded(tmp_path):
  store = checkpoint.Store(folder=tmp_path / 'c')
  assert store.latest() is None
  store.save(7, _tree(), {'place': [1, 2]})
  tree, extra = store.load(7, _tree(0.0))
  chex.assert_trees_all_equal(tree[:3], _tree()[:3])
  assert type(tree[2][0]) is type(_tree()[2][0])
  np.testing.assert_array_equal(
    jax.random.key_data(tree[3]), jax.random.key_data(_tree()[3])
  )
  assert extra == {'place': [1, 2]}


def test_it_loads_into_other_shardings_and_dtypes(tmp_path):
  store = checkpoint.Store(folder=tmp_path)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec('data')
  sharding = jax.sharding.NamedSharding(mesh, spec)
  store.save(1, {'w': jnp.arange(16.0).reshape(8, 2).astype(jnp.bfloat16)})
  like = {'w': jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding)}
  tree, _ = store.load(1, like)
  assert tree['w'].sharding == sharding
  np.testing.assert_array_equal(tree['w'], np.arange(16.0).reshape(8, 2))


def test_the_latest_and_the_best_are_kept(tmp_path):
  store = checkpoint.Store(folder=tmp_path, keep=2)
  for step, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.0)):
    store.save(step, {'w': jnp.ones(2)}, score=score)
  assert store.steps() == [2, 4, 5]
  assert store.best() == 2
  assert store.latest() == 5


def test_an_unfinished_checkpoint_counts_as_absent(tmp_path):
  store = checkpoint.Store(folder=tmp_path)
  store.save(1, {'w': jnp.ones(2)})
  (tmp_path / '2').mkdir()
  (tmp_path / '.partial-3').mkdir()
  assert store.steps() == [1]
  store.save(3, {'w': jnp.ones(2)})
  store.save(2, {'w': jnp.ones(2)})
  assert store.steps() == [2, 3]


def _data_file(folder: pathlib.Path) -> pathlib.Path:
  files = [p for p in folder.rglob('d/*') if p.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize('harm', ['flip', 'cut', 'remove', 'seal'])
def test_a_damaged_checkpoint_is_refused(tmp_path, harm):
  store = checkpoint.Store(folder=tmp_path)
  store.save(4, _tree())
  path = _data_file(tmp_path / '4')
  if harm == 'flip':
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
  elif harm == 'cut':
    path.write_bytes(path.read_bytes()[:-1])
  elif harm == 'remove':
    path.unlink()
  else:
    (tmp_path / '4' / 'seal.json').write_text('{"files": {')
  with pytest.raises(errors.FileFormatError, match='remove .*4'):
    store.load(4, _tree())


@pytest.mark.parametrize(
  ('like', 'message'),
  [
    ({'w': jnp.ones((4, 8))}, r'w is \[8, 4\] there and \[4, 8\] here'),
    ({'v': jnp.ones((8, 4))}, 'v is absent there'),
    (
      {'w': jnp.ones((8, 4)), 'x': jnp.ones(1)},
      r'x is absent there and \[1\] here',
    ),
  ],
)
def test_another_tree_is_refused(tmp_path, like, message):
  store = checkpoint.Store(folder=tmp_path)
  store.save(1, {'w': jnp.ones((8, 4))})
  with pytest.raises(errors.FileFormatError, match=message):
    store.load(1, like)


def test_a_failed_write_leaves_the_earlier_ones(tmp_path, monkeypatch):
  store = checkpoint.Store(folder=tmp_path)
  store.save(1, _tree())

  def full(*args, **options):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(checkpoint.ocp, 'save_checkpointables', full)
  with pytest.raises(checkpoint.CheckpointError, match='step 2 could not'):
    store.save(2, _tree())
  assert store.steps() == [1]
  assert not list(tmp_path.glob('.partial*'))


def test_a_full_disk_leaves_the_earlier_ones(tmp_path):
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(tmp_path)],
    check=False,
    capture_output=True,
  )
  if mounted.returncode:
    pytest.skip('mounting a small file system is not allowed here.')
  try:
    store = checkpoint.Store(folder=tmp_path / 'c')
    store.save(1, {'w': jnp.ones(8)})
    noise = jax.random.bits(jax.random.key(0), (200_000,))
    with pytest.raises(checkpoint.CheckpointError, match='make room'):
      store.save(2, {'w': noise})
    assert store.steps() == [1]
    tree, _ = store.load(1, {'w': jnp.zeros(8)})
    np.testing.assert_array_equal(tree['w'], np.ones(8))
    store.save(2, {'w': jnp.ones(8)})
    assert store.steps() == [1, 2]
  finally:
    subprocess.run(['umount', str(tmp_path)], check=True)


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match='keep must be >= 1, got 0'):
    checkpoint.Store(folder=tmp_path, keep=0)
