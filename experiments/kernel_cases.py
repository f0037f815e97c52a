"""What `benchmark_kernels` times: operations, shapes and implementations."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from efficiency_jax.evaluation import speed
from experiments import workdir as workdirs
from pallas_kernels import masks
from pallas_kernels import roofline
from pallas_kernels.attention import api

TILE = (256, 256)  # of block-sparse attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One operation on one shape, in several implementations.

  Attributes:
    operation: Its name.
    size: Queries and keys.
    candidates: Functions of q, k and v; the first is the baseline.
    work: What each of them has to do.
    alike: Whether all compute the same numbers.
  """

  operation: str
  size: int
  candidates: Mapping[str, Callable]
  work: Mapping[str, roofline.Work]
  alike: bool = True

  @property
  def key(self) -> str:
    """Names the case in a folder of results."""
    return f'{self.operation}/{self.size}'


def attention(config: ml_collections.ConfigDict) -> Iterator[Case]:
  """Forward, forward with backward, and block-sparse."""
  names = ('reference', 'blockwise')
  run = lambda name, **options: functools.partial(
    api.attention, implementation=name, **options
  )
  work = functools.partial(
    roofline.attention,
    batch=config.batch,
    heads=config.heads,
    kv_heads=config.kv_heads,
    width=config.width,
    item_bytes=jnp.dtype(config.dtype).itemsize,
  )
  for n in config.forward:
    yield Case(
      operation='attention forward',
      size=n,
      candidates={name: run(name, causal=True) for name in names},
      work=dict.fromkeys(names, work(q_size=n, kv_size=n, density=0.5)),
    )
  for n in config.backward:
    each = work(q_size=n, kv_size=n, density=0.5, backward=True)
    yield Case(
      operation='attention forward and backward',
      size=n,
      candidates={name: _gradients(run(name, causal=True)) for name in names},
      work=dict.fromkeys(names, each),
    )
  for n in config.sparse:
    tiles = _tiles(n, config)
    density = tiles.density(-(-n // TILE[1]))
    yield Case(
      operation='attention forward, not causal',
      size=n,
      candidates={
        'blockwise': run('blockwise'),
        f'blockwise, {density:.0%} of tiles': run('blockwise', tiles=tiles),
      },
      work={
        'blockwise': work(q_size=n, kv_size=n),
        f'blockwise, {density:.0%} of tiles': work(
          q_size=n, kv_size=n, density=density
        ),
      },
      alike=False,
    )


def measure(
  case: Case, config: ml_collections.ConfigDict, machine: workdirs.Row
) -> list[workdirs.Row]:
  """A row for each implementation."""
  rng = np.random.default_rng(config.seed)
  draw = lambda heads: jnp.asarray(
    rng.standard_normal((config.batch, case.size, heads, config.width)),
    config.dtype,
  )
  arrays = draw(config.heads), draw(config.kv_heads), draw(config.kv_heads)
  programs = {
    name: jax.jit(function).lower(*arrays).compile()
    for name, function in case.candidates.items()
  }
  timings = speed.compare(
    {name: functools.partial(p, *arrays) for name, p in programs.items()},
    repeats=config.repeats,
  )
  baseline = next(iter(programs))
  right = programs[baseline](*arrays)
  rows = []
  for name, program in programs.items():
    seconds = timings[name].median_seconds
    work = case.work[name]
    least = work.seconds(
      machine['flops_per_second'], machine['bytes_per_second']
    )
    plan = program.memory_analysis()
    peak = plan.temp_size_in_bytes + plan.output_size_in_bytes
    rows.append(
      {
        'method': f'{case.operation}, {name}',
        'operation': case.operation,
        'implementation': name,
        'shape': [list(x.shape) for x in arrays],
        'sequence_length': case.size,
        'milliseconds': 1e3 * seconds,
        'milliseconds_minimum': 1e3 * min(timings[name].times),
        'milliseconds_maximum': 1e3 * max(timings[name].times),
        'baseline': baseline,
        'speedup': timings[baseline].median_seconds / seconds,
        'gigaflops_per_second': work.flops / seconds / 1e9,
        'gigabytes_per_second': work.bytes / seconds / 1e9,
        'roofline_fraction': least / seconds,
        'peak_bytes': peak,
        'peak_megabytes': peak / 1e6,
        'max_error': _error(program(*arrays), right) if case.alike else None,
        'seed': config.seed,
      }
    )
  return rows


def _gradients(run: Callable) -> Callable:
  return jax.grad(lambda *arrays: run(*arrays)[0].sum(), (0, 1, 2))


def _tiles(size: int, config: ml_collections.ConfigDict) -> masks.Tiles:
  """The diagonal and random tiles, as many in every row."""
  count = -(-size // TILE[0])
  rng = np.random.default_rng(config.seed)
  kept = np.eye(count, dtype=bool)
  for row in range(count):
    others = rng.permutation(np.delete(np.arange(count), row))
    kept[row, others[: max(0, round(config.sparse_density * count) - 1)]] = True
  return masks.Tiles.of(TILE, kept)


def _error(got, right) -> float:
  leaves = zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True)
  return max(float(jnp.abs(a - b).max()) for a, b in leaves)
