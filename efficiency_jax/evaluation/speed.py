"""Seconds and bytes, measured so that they can be compared.

JAX returns before the work is done and compiles at the first call, so a stop
watch around a call measures neither. Every function here waits for the results
(`jax.block_until_ready`) and keeps compilation apart.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import re
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# A line that opens a computation of a compiled program, a line of one, and the
# computations that it names: body=%loop, calls={%a, %b} and their like.
_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.-]+) .*\{$')
_OPERATION = re.compile(
  r'\s+(?:ROOT )?%?[\w.-]+ = '
  r'(?:\(.*?\)|\w+\[(?P<shape>[\d,]*)\](?:\{[^}]*\})?) (?P<name>[a-z][\w-]*)\('
)
_CALLED = re.compile(
  r'(?:body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """What repeated calls of one function cost.

  Attributes:
    times: Seconds of each timed call, in the order they were made.
    compile_seconds: What the very first call cost beyond the median of the
      timed ones: tracing, compiling, or loading a compiled program. About 0
      for a function that had been called before.
  """

  times: tuple[float, ...]
  compile_seconds: float

  @property
  def median_seconds(self) -> float:
    """The middle of the times: the one number to report."""
    return float(np.median(self.times))

  @property
  def minimum_seconds(self) -> float:
    """The fastest call: the least disturbed one."""
    return min(self.times)

  @property
  def spread_seconds(self) -> float:
    """The interquartile range: half of the calls lie in a band this wide."""
    low, high = np.percentile(self.times, (25, 75))
    return float(high - low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledBytes:
  """Memory that the compiler planned for one program, in bytes.

  Attributes:
    argument: Inputs.
    output: Results, those that reuse an input's memory included.
    temporary: Everything in between, at its peak.
    aliased: The part of `output` that reuses the memory of donated inputs.
  """

  argument: int
  output: int
  temporary: int
  aliased: int


class NoClock(Exception):  # noqa: N818
  """A device does not tell how long it computed; the host's clock is left."""


def measure(
  fn: Callable[..., Any], *args: Any, repeats: int = 5, warmup: int = 1
) -> Timing:
  """Times `fn(*args)`, waiting for its results and leaving compilation out.

  Args:
    fn: What to time, jitted or not. It must not donate `args`, since it is
      called again with the same ones.
    *args: Its arguments.
    repeats: Timed calls, at least 1.
    warmup: Calls before the timed ones, at least 1: the first one compiles.

  Returns:
    The times of the `repeats` calls, and the compile time apart.
  """
  name = 'measured'
  timings = compare({name: lambda: fn(*args)}, repeats=repeats, warmup=warmup)
  return timings[name]


def compare(
  candidates: Mapping[str, Callable[[], Any]],
  *,
  repeats: int = 5,
  warmup: int = 1,
) -> dict[str, Timing]:
  """Times several functions in turn, so that a drift touches all of them.

  Each round calls every candidate once, and every other round goes through
  them backwards: a machine that slows down, or a cache that one candidate
  leaves warm for the next, favours none of them.

  Args:
    candidates: Functions without arguments, by name.
    repeats: Rounds, at least 1: an even number balances the order.
    warmup: Calls of each candidate before the first round, at least 1.

  Returns:
    A `Timing` for each name.
  """
  for argument, value in (('repeats', repeats), ('warmup', warmup)):
    if value < 1:
      raise ValueError(f'{argument} must be at least 1, got {value}.')
  if not candidates:
    raise ValueError('candidates must name at least one function, got none.')

  first = {}
  for name, fn in candidates.items():
    first[name] = _seconds(fn)
    for _ in range(warmup - 1):
      _seconds(fn)

  times = {name: [] for name in candidates}
  order = list(candidates)
  for _ in range(repeats):
    for name in order:
      times[name].append(_seconds(candidates[name]))
    order.reverse()

  return {
    name: Timing(
      times=tuple(times[name]),
      compile_seconds=max(0.0, first[name] - float(np.median(times[name]))),
    )
    for name in candidates
  }


def on_gpu(
  program: jax.stages.Compiled, *args: Any, repeats: int = 5
) -> Timing:
  """Seconds a GPU computes for `program(*args)`, by its own clock (CUPTI).

  What passes between kernels, on the host and in the queue, is left out: it is
  most of the time of a small program.

  Raises:
    NoClock: The GPU does not tell, or runs other kernels from call to call.
  """
  from jax.experimental.mosaic.gpu import profiler

  jax.block_until_ready(program(*args))  # what fails, fails here
  try:
    _, found = profiler.measure(program, iterations=repeats)(*args)
  except RuntimeError as error:
    raise NoClock(str(error)) from error
  if found is None:
    raise NoClock('the GPU tells no times of kernels.')
  times = found if isinstance(found, list) else [found]
  return Timing(times=tuple(1e-3 * t for t in times), compile_seconds=0.0)


def peak_bytes() -> int:
  """The most memory that this process has held so far, in bytes.

  On an accelerator it is the fullest local device's peak. Where a backend
  keeps no count (the CPU), it is the peak resident memory of the process,
  Python and compiler included. A peak never falls: to compare two cases,
  measure each in a process of its own.
  """
  statistics = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [stats.get('peak_bytes_in_use') for stats in statistics]
  if all(peak is not None for peak in peaks):
    return max(peaks)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Linux counts kilobytes, macOS bytes.
  return peak if sys.platform == 'darwin' else peak * 1024


def compiled_bytes(fn: Callable[..., Any], *args: Any) -> CompiledBytes:
  """The memory plan of `fn` compiled for `args`; nothing is run.

  Args:
    fn: A function of arrays, jitted or not. Jit it to keep its static and
      donated arguments.
    *args: Arrays, or `jax.ShapeDtypeStruct`s in their place.

  Raises:
    NotImplementedError: The backend does not tell.
  """
  lower = fn.lower if hasattr(fn, 'lower') else jax.jit(fn).lower
  plan = lower(*args).compile().memory_analysis()
  if plan is None:
    raise NotImplementedError(
      f'the {jax.default_backend()} backend has no memory analysis.'
    )
  return CompiledBytes(
    argument=plan.argument_size_in_bytes,
    output=plan.output_size_in_bytes,
    temporary=plan.temp_size_in_bytes,
    aliased=plan.alias_size_in_bytes,
  )


def loop_operations(
  program: str,
) -> collections.Counter[tuple[str, tuple[int, ...]]]:
  """What the while loops of a compiled program do, counted by name and shape.

  An array that a loop only seems to update in place shows here as a `copy` of
  its shape, and weights that are widened at every step as a `convert`.

  Args:
    program: `jitted.lower(...).compile().as_text()`.

  Returns:
    How often each operation with one result of a shape stands in the body or
    the condition of a loop, or in anything that these call.
  """
  names, calls, operations, current = set(), {}, {}, ''
  for line in program.splitlines():
    if head := _COMPUTATION.match(line):
      current = head[1]
      calls[current], operations[current] = set(), collections.Counter()
    elif (found := _OPERATION.match(line)) and current:
      called = {
        name.strip(' %')
        for group in _CALLED.findall(line)
        for name in group.strip('{}').split(',')
      }
      calls[current] |= called
      if found['name'] == 'while':
        names |= called
      if found['shape'] is not None:
        shape = tuple(int(size) for size in found['shape'].split(',') if size)
        operations[current][found['name'], shape] += 1
  reached, total = set(), collections.Counter()
  while names:
    name = names.pop()
    if name in calls and name not in reached:
      reached.add(name)
      names |= calls[name]
      total += operations[name]
  return total


def read_bandwidth(size: int = 512 * 2**20, *, repeats: int = 8) -> float:
  """Bytes a second that `bandwidth_reader` finds."""
  return bandwidth_reader(size, repeats=repeats)()


def bandwidth_reader(
  size: int = 512 * 2**20, *, repeats: int = 8
) -> Callable[[], float]:
  """Measures again and again how fast memory is read, with one array.

  It gives the bytes a second that a compiled program can read here.

  Decoding one token reads every weight once, so bandwidth / bytes of weights
  bounds the tokens per second of plain decoding from above. It is measured as
  the best of `repeats` sums over the rows of an array too large for caches,
  on the default device with the threads that XLA uses for any program.

  Args:
    size: Bytes of the array, at least 4 MiB. Choose it several times larger
      than the last-level cache.
    repeats: Timed passes, at least 1; the fastest counts.
  """
  rows = 4096  # enough to keep all threads busy; a row is a long plain read
  columns = size // (4 * rows)
  if columns < 256:
    raise ValueError(f'size must be at least 4 MiB (4194304), got {size}.')
  array = jax.block_until_ready(jnp.ones((rows, columns), jnp.float32))
  total = jax.jit(lambda x: x.sum(axis=1))

  def read() -> float:
    timing = measure(total, array, repeats=repeats, warmup=2)
    return array.nbytes / timing.minimum_seconds

  return read


def arithmetic_rate(size: int = 2048, *, repeats: int = 5) -> float:
  """Floating-point operations a second of a float32 matrix product here.

  What utilization is measured against where no data sheet applies: the best of
  `repeats` products of two [size, size] matrices, on all devices together.
  """
  if size < 1:
    raise ValueError(f'size must be >= 1, got {size}.')
  matrix = jnp.ones((size, size), jnp.float32)
  timing = measure(jax.jit(jnp.dot), matrix, matrix, repeats=repeats, warmup=2)
  return 2.0 * size**3 / timing.minimum_seconds * jax.device_count()


def compiled_flops(program: jax.stages.Compiled) -> float:
  """Operations of a compiled program as its compiler counts them; 0 unknown.

  The body of a loop is counted once.
  """
  found = program.cost_analysis() or {}
  return float(found.get('flops', 0.0))


def _seconds(fn: Callable[[], Any]) -> float:
  """Wall-clock seconds of one call, up to its results being there."""
  start = time.perf_counter()
  jax.block_until_ready(fn())
  return time.perf_counter() - start
