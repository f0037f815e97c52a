"""Tests of kernels for the CPU and of the threads that run them."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import llvm_cpu
from pallas_kernels import llvm_ir as ll

pytestmark = [
  pytest.mark.short,
  pytest.mark.skipif(bool(llvm_cpu.missing()), reason=str(llvm_cpu.missing())),
]


def _emit_sum(builder, width, pointers, part):
  """out[part] is the sum of row `part` of x [parts, width]."""
  x, out = pointers
  row = builder.mul(part, ll.number(width))
  steps = ll.carry(builder, 0, width, ll.lanes(), [ll.zeros()])
  with steps as (k, (total,), keep):
    place = ll.place(builder, x, builder.add(row, k))
    one = ll.spread(builder, ll.load(builder, ll.place(builder, x, 0)))
    vector = ll.load_vector(builder, place)
    keep([ll.apply(builder, 'fma', vector, one, total)])
  total = ll.total(builder, total)
  ll.store(builder, total, ll.place(builder, out, part))


def _emit_exp2(builder, size, pointers, part):
  x, out = pointers
  with ll.count(builder, 0, size, ll.lanes()) as i:
    value = ll.load_vector(builder, ll.place(builder, x, i))
    ll.store(builder, ll.exp2(builder, value), ll.place(builder, out, i))


def _emit_totals(builder, size, pointers, part):
  x, out = pointers
  rows = [
    ll.load_vector(builder, ll.place(builder, x, i * ll.lanes()))
    for i in range(ll.lanes())
  ]
  ll.store(builder, ll.totals(builder, rows), out)


def _emit_maxima(builder, rows, pointers, part):
  x, out = pointers
  rows = [
    ll.load_vector(builder, ll.place(builder, x, i * ll.lanes()))
    for i in range(rows)
  ]
  ll.store(builder, ll.maxima(builder, rows), out)


def _emit_order(builder, static, pointers, part):
  """Which group and tile are added, one after another, and what is `later`."""
  size, tiles, groups = static
  order, later, total = pointers
  count = ll.room(builder, 1)
  ll.store(builder, ll.constant(0.0), count)

  def add(g, tile, sums, following):
    step = ll.load(builder, count)
    index = builder.fptosi(step, ll.i64)
    for to, (group, of_group) in ((order, (g, tile)), (later, following)):
      number = builder.add(builder.mul(group, ll.number(10)), of_group)
      number = builder.sitofp(number, ll.f32)
      ll.store(builder, number, ll.place(builder, to, index))
    one = ll.constant(1.0)
    ll.store(builder, builder.fadd(step, one), count)
    ll.store(builder, builder.fadd(ll.load(builder, sums), one), sums)

  def write(tile, sums):
    ll.store(builder, ll.load(builder, sums), ll.place(builder, total, tile))

  share = ll.number(0), ll.number(tiles)
  ll.tiles_by_groups(builder, share, groups, size, add=add, write=write)


def _emit_either(builder, static, pointers, part):
  """out[part] is |x[part]|."""
  x, out = (ll.place(builder, base, part) for base in pointers)
  value = ll.load(builder, x)
  positive = builder.fcmp_ordered('>', value, ll.constant(0.0))
  (value,) = ll.either(
    builder, positive, [value], lambda: [builder.fneg(value)]
  )
  ll.store(builder, value, out)


def _emit_transposed(builder, size, pointers, part):
  x, out = pointers
  rows = [
    ll.load_vector(builder, ll.place(builder, x, i * ll.lanes()))
    for i in range(ll.lanes())
  ]
  for i, row in enumerate(ll.transposed(builder, rows)):
    ll.store(builder, row, ll.place(builder, out, i * ll.lanes()))


def _emit_both(builder, size, pointers, part):
  """A result of the sum, and one of the maximum, of a vector."""
  x, total, largest = pointers
  value = ll.load_vector(builder, x)
  ll.store(builder, ll.total(builder, value), total)
  most = ll.apply(builder, 'vector.reduce.fmax', value)
  ll.store(builder, most, largest)


def _sums(x):
  parts, width = x.shape
  result = jax.ShapeDtypeStruct((parts,), jnp.float32)
  return llvm_cpu.call(_emit_sum, width, (x,), result, parts=parts)


def _rows(parts, width=64):
  x = np.random.default_rng(parts).integers(-8, 9, (parts, width))
  x = x.astype(np.float32)
  x[0, 0] = 1  # what all vectors are multiplied with
  return x


def test_exp2_is_right_within_one_unit():
  some = np.geomspace(1e-8, 126, 2048, dtype=np.float32)
  x = np.concatenate([-some, some])
  special = [0, -126.1, -1e30, -np.inf, np.nan] + [0] * 11
  x = np.concatenate([x, np.asarray(special, np.float32)])
  result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  found = llvm_cpu.call(_emit_exp2, x.size, (x,), result, parts=1)
  exact = np.exp2(x[:4096].astype(np.float64))
  unit = np.spacing(exact.astype(np.float32))
  assert (np.abs(found[:4096] - exact) <= unit).all()
  np.testing.assert_array_equal(found[4096:4101], [1, 0, 0, 0, np.nan])


def test_totals_are_the_sums_of_vectors_in_order():
  lanes = ll.lanes()
  x = np.arange(lanes * lanes, dtype=np.float32).reshape(lanes, lanes) ** 2
  result = jax.ShapeDtypeStruct((lanes,), jnp.float32)
  found = llvm_cpu.call(_emit_totals, None, (x,), result, parts=1)
  np.testing.assert_array_equal(found, x.sum(1))


@pytest.mark.parametrize('rows', [1, 4, 8])
def test_maxima_are_those_of_vectors_in_order(rows):
  lanes = ll.lanes()
  x = np.random.default_rng(rows).standard_normal((rows, lanes), np.float32)
  result = jax.ShapeDtypeStruct((lanes,), jnp.float32)
  found = llvm_cpu.call(_emit_maxima, rows, (x,), result, parts=1)
  again = np.tile(x.max(1), lanes // rows)
  np.testing.assert_array_equal(found, again)


def test_tiles_go_by_groups_and_say_what_comes_a_run_later():
  size = ll._RUN // 2  # two tiles a run
  shape = jax.ShapeDtypeStruct
  order, later, total = llvm_cpu.call(
    _emit_order,
    (size, 5, 3),
    (),
    (
      shape((15,), jnp.float32),
      shape((15,), jnp.float32),
      shape((5,), jnp.float32),
    ),
    parts=1,
  )
  runs = ((0, 1), (2, 3), (4,))
  steps = [(g, t) for run in runs for g in range(3) for t in run]
  np.testing.assert_array_equal(order, [10 * g + t for g, t in steps])
  following = [(g + 1, t) if g < 2 else (0, min(t + 2, 4)) for g, t in steps]
  np.testing.assert_array_equal(later, [10 * g + t for g, t in following])
  np.testing.assert_array_equal(total, [3] * 5)


def test_values_are_changed_where_a_condition_fails():
  x = np.asarray([-2, 3], np.float32)
  result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  found = llvm_cpu.call(_emit_either, None, (x,), result, parts=2)
  np.testing.assert_array_equal(found, [2, 3])


def test_vectors_are_transposed():
  lanes = ll.lanes()
  x = np.arange(lanes**2, dtype=np.float32).reshape(lanes, lanes)
  result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
  found = llvm_cpu.call(_emit_transposed, None, (x,), result, parts=1)
  np.testing.assert_array_equal(found, x.T)


def test_a_kernel_may_have_several_results():
  x = np.arange(ll.lanes(), dtype=np.float32)
  one = jax.ShapeDtypeStruct((), jnp.float32)
  found = llvm_cpu.call(_emit_both, None, (x,), (one, one), parts=1)
  assert [float(value) for value in found] == [x.sum(), x.max()]


@pytest.mark.parametrize('parts', [1, 2, 3, 64, 1000])
def test_every_part_is_done_once(parts):
  x = _rows(parts)
  for _ in range(20):
    np.testing.assert_array_equal(jax.jit(_sums)(x), x.sum(1))


def test_parts_of_one_call_do_not_meet_those_of_the_next():
  """Jobs of different sizes and arrays in quick succession."""
  jobs = [_rows(parts) for parts in (1, 7, 2, 50, 3)]

  @jax.jit
  def many(jobs, count):
    def body(_, good):
      for x in jobs:
        x = x + 0 * good  # so that no round can be moved out of the loop
        good &= jnp.all(_sums(x) == x.sum(1))
      return good

    return jax.lax.fori_loop(0, count, body, True)

  assert many(jobs, 40000)


def test_calls_from_several_threads_are_right():
  x = [_rows(parts) for parts in (5, 40, 9, 17)]
  run = jax.jit(_sums)

  def repeat(i):
    return all(np.array_equal(run(x[i]), x[i].sum(1)) for _ in range(300))

  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    assert all(pool.map(repeat, range(4)))


def test_a_batch_runs_one_after_another():
  x = np.stack([_rows(3), _rows(3) * 2])
  x[1, 0, 0] = 1
  np.testing.assert_array_equal(jax.vmap(_sums)(x), x.sum(-1))


def test_a_kernel_is_compiled_once():
  x = _rows(4)
  before = llvm_cpu._register.cache_info().misses
  jax.jit(_sums)(x)
  jax.jit(lambda x: _sums(x) + 1)(x)
  assert llvm_cpu._register.cache_info().misses - before <= 1


def test_it_says_why_nothing_can_be_compiled(monkeypatch):
  for change, message in (
    (lambda: monkeypatch.setattr(llvm_cpu, 'ir', None), 'llvmlite is not'),
    (
      lambda: monkeypatch.setattr(llvm_cpu.sys, 'platform', 'win32'),
      'Linux on',
    ),
    (
      lambda: monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu'),
      'programs are for a tpu here',
    ),
  ):
    with monkeypatch.context():
      change()
      assert message in llvm_cpu.missing()
    monkeypatch.undo()
  assert llvm_cpu.missing() is None
