"""Tests what is counted and waited for, and never how fast anything is."""

import jax
import jax.numpy as jnp
import pytest

from efficiency_jax.evaluation import speed

pytestmark = pytest.mark.short


class _Pending:
  """A result that is not there yet, as an array under asynchronous dispatch."""

  def __init__(self):
    self.waited = False

  def block_until_ready(self):
    self.waited = True
    return self


class _Clock:
  """Stands for `time.perf_counter`: moves only when it is told to."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = _Clock()
  monkeypatch.setattr(speed.time, 'perf_counter', clock)
  return clock


def test_a_cpu_has_no_clock_of_its_own():
  program = jax.jit(lambda x: x + 1).lower(1.0).compile()
  with pytest.raises(speed.NoClock):
    speed.on_gpu(program, 1.0)


@pytest.mark.parametrize(
  ('told', 'seconds'), [([2.0, 3.0], (0.002, 0.003)), (2.0, (0.002,))]
)
def test_a_gpu_tells_milliseconds(monkeypatch, told, seconds):
  from jax.experimental.mosaic.gpu import profiler

  def measure(program, *, iterations):
    assert iterations == len(seconds)
    return lambda *args: (program(*args), told)

  monkeypatch.setattr(profiler, 'measure', measure)
  timing = speed.on_gpu(lambda x: x, 1.0, repeats=len(seconds))
  assert timing.times == pytest.approx(seconds)


def test_a_gpu_that_runs_nothing_tells_nothing(monkeypatch):
  from jax.experimental.mosaic.gpu import profiler

  silent = lambda program, *, iterations: lambda *args: (None, None)
  monkeypatch.setattr(profiler, 'measure', silent)
  with pytest.raises(speed.NoClock, match='tells no times'):
    speed.on_gpu(lambda x: x, 1.0)


def test_measure_keeps_the_first_call_out_of_the_times(clock):
  seconds = iter([100.0, 7.0, 1.0, 4.0, 2.0, 3.0])

  def work():
    clock.now += next(seconds)

  timing = speed.measure(work, repeats=4, warmup=2)
  assert timing.times == (1.0, 4.0, 2.0, 3.0)
  assert timing.median_seconds == 2.5
  assert timing.minimum_seconds == 1.0
  assert timing.spread_seconds == 1.5
  assert timing.compile_seconds == 97.5


def test_measure_compiles_once_and_outside_the_times():
  traces = []

  @jax.jit
  def double(x):
    traces.append(None)
    return 2 * x

  timing = speed.measure(double, jnp.ones(3), repeats=3)
  assert len(traces) == 1
  assert len(timing.times) == 3
  assert timing.compile_seconds > timing.minimum_seconds


def test_measure_waits_for_every_leaf_of_every_result():
  results = []

  def work():
    results.append((_Pending(), {'deep': _Pending()}))
    return results[-1]

  speed.measure(work, repeats=2, warmup=2)
  assert len(results) == 4
  assert all(a.waited and b['deep'].waited for a, b in results)


def test_measure_stops_the_clock_after_waiting(clock):
  class Slow(_Pending):
    def block_until_ready(self):
      clock.now += 5.0
      return self

  assert speed.measure(Slow, repeats=1).times == (5.0,)


def test_compare_alternates_the_candidates(clock):
  calls = []

  def candidate(name, seconds):
    def work():
      calls.append(name)
      clock.now += seconds

    return work

  timings = speed.compare(
    {'a': candidate('a', 1.0), 'b': candidate('b', 2.0)}, repeats=4
  )
  assert ''.join(calls) == 'ab' + 'abbaabba'
  assert timings['a'].median_seconds == 1.0
  assert timings['b'].times == (2.0,) * 4


def test_compare_does_not_favour_either_under_a_steady_drift(clock):
  calls = []

  def work():
    calls.append(None)
    clock.now += len(calls)

  timings = speed.compare({'a': work, 'b': work}, repeats=4)
  assert timings['a'].median_seconds == timings['b'].median_seconds


@pytest.mark.parametrize('argument', ['repeats', 'warmup'])
def test_counts_below_one_are_refused(argument):
  with pytest.raises(ValueError, match=f'{argument} must be at least 1, got 0'):
    speed.measure(lambda: None, **{argument: 0})


def test_compare_refuses_nothing_to_compare():
  with pytest.raises(ValueError, match='at least one'):
    speed.compare({})


def test_peak_bytes_does_not_fall():
  before = speed.peak_bytes()
  array = jnp.ones(2**20).block_until_ready()
  assert speed.peak_bytes() >= before > 2**20
  del array


@pytest.mark.parametrize('wrap', [lambda fn: fn, jax.jit])
def test_compiled_bytes_counts_arguments_and_outputs(wrap):
  shape = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  plan = speed.compiled_bytes(wrap(lambda x, y: x @ y), shape, shape)
  assert plan.argument == 2 * 256 * 256 * 4
  assert plan.output == 256 * 256 * 4
  assert plan.temporary >= 0
  assert plan.aliased == 0


def test_compiled_bytes_counts_donated_memory():
  shape = jax.ShapeDtypeStruct((1024,), jnp.float32)
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  assert speed.compiled_bytes(step, shape).aliased == 4096


def test_read_bandwidth_is_that_of_some_machine():
  bandwidth = speed.read_bandwidth(16 * 2**20, repeats=2)
  assert 1e8 < bandwidth < 1e14  # 0.1 GB/s to 100 TB/s


def test_read_bandwidth_refuses_an_array_that_fits_a_cache():
  with pytest.raises(ValueError, match='size must be at least'):
    speed.read_bandwidth(1000)


def test_arithmetic_rate_is_that_of_some_machine():
  assert 1e8 < speed.arithmetic_rate(64, repeats=2) < 1e17
  with pytest.raises(ValueError, match='size must be >= 1'):
    speed.arithmetic_rate(0)


def test_compiled_flops_are_those_of_a_product():
  a, b = jnp.ones((8, 16)), jnp.ones((16, 32))
  program = jax.jit(jnp.dot).lower(a, b).compile()
  assert speed.compiled_flops(program) == 2 * 8 * 16 * 32


def _program(fn, *args):
  return jax.jit(fn).lower(*args).compile().as_text()


def test_loop_operations_finds_what_a_loop_copies():
  def mirrored(x, i):
    # Every element is read by another: this cannot be done in place.
    step = lambda c: (c[0][::-1] * 2.0, c[1] + 1)
    return jax.lax.while_loop(lambda c: c[1] < 9, step, (x, i))

  def in_place(x, i):
    step = lambda c: (c[0].at[c[1]].set(1.0), c[1] + 1)
    return jax.lax.while_loop(lambda c: c[1] < 9, step, (x, i))

  arguments = (jnp.ones((40, 50)), jnp.int32(0))
  copied = speed.loop_operations(_program(mirrored, *arguments))
  assert copied['copy', (40, 50)] >= 1
  clean = speed.loop_operations(_program(in_place, *arguments))
  assert clean['copy', (40, 50)] == 0
  assert clean['dynamic-update-slice', (40, 50)] == 1


def test_loop_operations_counts_inside_what_a_loop_calls_and_nowhere_else():
  program = """HloModule m

%fused (p: bf16[4,8]) -> f32[4,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %c = f32[4,8]{1,0} convert(%p), metadata={op_name="x"}
}

body (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  t = (s32[], f32[4,8]{1,0}) parameter(0)
  f = f32[4,8]{1,0:T(8,128)} fusion(t), kind=kLoop, calls=%fused
  ROOT r = (s32[], f32[4,8]{1,0}) tuple(t, f)
}

%cond (t: (s32[], f32[4,8])) -> pred[] {
  ROOT %k = pred[] call(t), to_apply=%less
}

%less (t: s32[]) -> pred[] {
  ROOT %l = pred[] compare(t, t), direction=LT
}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {
  %copy.1 = f32[4,8]{1,0} copy(%x)
  %w = (s32[], f32[4,8]{1,0}) while(%copy.1), condition=%cond, body=%body
  ROOT %g = f32[4,8]{1,0} get-tuple-element(%w), index=1
}
"""
  found = speed.loop_operations(program)
  assert found == {
    ('parameter', (4, 8)): 1,
    ('convert', (4, 8)): 1,
    ('fusion', (4, 8)): 1,
    ('call', ()): 1,
    ('compare', ()): 1,
  }
