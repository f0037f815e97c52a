"""What `benchmark_kernels` times: operations, shapes and implementations."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from efficiency_jax.evaluation import speed
from experiments import kernel_baselines as baselines
from experiments import workdir as workdirs
from experiments.kernel_baselines import compiled
from pallas_kernels import masks
from pallas_kernels import roofline
from pallas_kernels.attention import api as attention_api
from pallas_kernels.binary_matmul import api as binary_matmul
from pallas_kernels.decode_attention import api as decode_api
from pallas_kernels.dequant_matmul import api as dequant_matmul
from pallas_kernels.dequant_matmul import formats
from pallas_kernels.int8_matmul import api as int8_matmul
from pallas_kernels.narrow_matmul import api as narrow_matmul
from pallas_kernels.panel_matmul import api as panel_matmul
from pallas_kernels.panel_matmul.reference import to_panels

TILE = (256, 256)  # of block-sparse attention
# What the fields of a config may name.
NAMES = {
  'attention': (*baselines.ATTENTION, *attention_api.IMPLEMENTATIONS),
  'decode': tuple(decode_api.IMPLEMENTATIONS),
  'products': tuple(int8_matmul.IMPLEMENTATIONS),
  'products_of_weights': tuple(dequant_matmul.IMPLEMENTATIONS),
  'products_of_few_rows': tuple(narrow_matmul.IMPLEMENTATIONS),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One operation on one shape, in several implementations.

  Attributes:
    operation: Its name.
    size: Queries, slots or rows: what grows.
    shapes: Of the random inputs, float32 normal.
    candidates: From the inputs to what is timed, see `kernel_baselines`; the
      first one is the baseline.
    work: What each of them has to do; one for all, or by name.
    alike: Whether all compute the same numbers, up to rounding.
  """

  operation: str
  size: int
  shapes: tuple[tuple[int, ...], ...]
  candidates: Mapping[str, baselines.Prepare]
  work: roofline.Work | Mapping[str, roofline.Work]
  dtype: str = 'float32'
  alike: bool = True

  @property
  def key(self) -> str:
    """Names the case in a folder of results."""
    shapes = '-'.join('x'.join(map(str, shape)) for shape in self.shapes)
    return f'{self.operation}/{shapes}'


def cases(config: ml_collections.ConfigDict) -> Iterator[Case]:
  """Everything that a config asks for."""
  yield from _attention(config)
  yield from _decode(config)
  yield from _few_rows(config)
  yield from _int8(config)
  yield from _dequant(config)
  yield from _binary(config)


def _here(names: Sequence[str]) -> list[str]:
  """Those of some implementations that can run here."""
  return [name for name in names if baselines.missing(name) is None]


def _attention(config: ml_collections.ConfigDict) -> Iterator[Case]:
  """Forward, forward with backward, and block-sparse."""
  work = functools.partial(
    roofline.attention,
    batch=config.batch,
    heads=config.heads,
    kv_heads=config.kv_heads,
    width=config.width,
    item_bytes=jnp.dtype(config.dtype).itemsize,
  )

  def case(operation, n, candidates, work, **options):
    head = lambda heads: (config.batch, n, heads, config.width)
    return Case(
      operation=operation,
      size=n,
      shapes=(head(config.heads), *[head(config.kv_heads)] * 2),
      candidates=candidates,
      work=work,
      dtype=config.dtype,
      **options,
    )

  run = lambda name, **options: functools.partial(
    attention_api.attention, implementation=name, **options
  )
  for backward in (False, True):
    known = baselines.attention(backward) | {
      name: compiled(baselines.gradients(ours) if backward else ours)
      for name in attention_api.IMPLEMENTATIONS
      for ours in [lambda *a, name=name: run(name, causal=True)(*a)[0]]
    }
    names = [n for n in _here(config.attention) if n in known]
    operation = 'attention forward' + ' and backward' * backward
    for n in config.backward if backward else config.forward:
      needed = work(q_size=n, kv_size=n, density=0.5, backward=backward)
      yield case(operation, n, {name: known[name] for name in names}, needed)
  for n in config.sparse:
    tiles = _tiles(n, config)
    density = tiles.density(-(-n // TILE[1]))
    name = config.sparse_implementation
    sparse = f'{name}, {density:.0%} of tiles'
    candidates = {name: run(name), sparse: run(name, tiles=tiles)}
    yield case(
      'attention forward, not causal',
      n,
      {name: compiled(function) for name, function in candidates.items()},
      {
        name: work(q_size=n, kv_size=n),
        sparse: work(q_size=n, kv_size=n, density=density),
      },
      alike=False,
    )


def _decode(config: ml_collections.ConfigDict) -> Iterator[Case]:
  """New tokens over a full cache, plain and in eight bits."""
  for time in config.decode_queries:
    for slots in config.decode_slots:
      batch, heads, kv_heads, width = (
        config.decode_batch,
        config.heads,
        config.kv_heads,
        config.width,
      )
      length = jnp.full((batch,), slots)
      work = functools.partial(
        roofline.decode_attention,
        batch=batch,
        time=time,
        slots=slots,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        item_bytes=jnp.dtype(config.dtype).itemsize,
      )
      run = lambda name, length=length: (
        lambda q, k, v, *scales: decode_api.decode_attention(
          q,
          k,
          v,
          length,
          implementation=name,
          **dict(zip(('k_scales', 'v_scales'), scales)),
        )[0]
      )
      names = _here(config.decode)
      candidates = {name: compiled(run(name)) for name in names}
      needed = dict.fromkeys(names, work())
      quantized = f'{names[-1]}, int8 cache'
      candidates[quantized] = compiled(run(names[-1]), _int8_cache)
      needed[quantized] = work(cache_bytes=1)
      cache = (batch, kv_heads, slots, width)
      yield Case(
        operation=f'decode attention, {time} queries, batch {batch}',
        size=slots,
        shapes=((batch, time, heads, width), cache, cache),
        candidates=candidates,
        work=needed,
        dtype=config.dtype,
      )


def _int8_cache(q, k, v):
  (k, k_scales), (v, v_scales) = map(int8_matmul.quantize_rows, (k, v))
  return q, k, v, k_scales, v_scales


def _few_rows(config: ml_collections.ConfigDict) -> Iterator[Case]:
  """A few rows and a large matrix, in float32, in eight and in four bits."""
  for m, k, n in config.few_rows:
    candidates, needed = {}, {}
    for name, (label, (product, convert, bits)) in itertools.product(
      _here(config.products_of_few_rows), _few_rows_products().items()
    ):
      ours = functools.partial(product, implementation=name)
      candidates[f'{label}, {name}'] = compiled(ours, convert)
      needed[f'{label}, {name}'] = roofline.matmul(m, n, k, w_bits=bits)
    yield Case(
      operation='product of few rows',
      size=m,
      shapes=((m, k), (k, n)),
      candidates=candidates,
      work=needed,
    )


def _few_rows_products():
  """Products, how they want their operands, and the bits of a weight."""
  int8, dequant = int8_matmul.int8_matmul, dequant_matmul.dequant_matmul
  quantize_int4, int4_bits = _FORMATS['int4']
  as_int4 = lambda x, w: (x, *quantize_int4(w)[:2])
  return {
    'float32': (narrow_matmul.narrow_matmul, lambda x, w: (x, w), 32),
    'float32 in panels': (
      panel_matmul.panel_matmul,
      lambda x, w: (x, to_panels(w)),
      32,
    ),
    'int8, int8 rows': (int8, _int8_weights, 8),
    'int4, int8 rows': (int8, as_int4, int4_bits),
    **{
      f'{name}, float32 rows': (
        dequant,
        lambda x, w, quantize=quantize: (x, *quantize(w)),
        bits,
      )
      for name, (quantize, bits) in _FORMATS.items()
    },
  }


def _int8(config: ml_collections.ConfigDict) -> Iterator[Case]:
  """Eight bits on both sides, the rows quantized in the program."""
  for m, k, n in config.int8:
    ours = lambda name: functools.partial(
      int8_matmul.int8_matmul, implementation=name
    )
    bits = 8 * jnp.dtype(config.dtype).itemsize
    float_work = roofline.matmul(m, n, k, x_bits=bits, w_bits=bits)
    yield Case(
      operation='int8 product',
      size=m,
      shapes=((m, k), (k, n)),
      candidates={config.dtype: compiled(jnp.matmul)}
      | {
        name: compiled(ours(name), _int8_weights)
        for name in _here(config.products)
      },
      work={config.dtype: float_work}
      | dict.fromkeys(
        _here(config.products), roofline.matmul(m, n, k, x_bits=bits, w_bits=8)
      ),
      dtype=config.dtype,
    )


def _int8_weights(x, w):
  values, scales = int8_matmul.quantize_rows(w.T)
  return x, values.T, scales


def _dequant(config: ml_collections.ConfigDict) -> Iterator[Case]:
  """Weights alone in eight and four bits."""
  for m, k, n in config.dequant:
    bits = 8 * jnp.dtype(config.dtype).itemsize
    matmul = functools.partial(roofline.matmul, m, n, k, x_bits=bits)
    candidates = {config.dtype: compiled(jnp.matmul)}
    needed = {config.dtype: matmul(w_bits=bits)}
    for (name, (quantize, stored)), implementation in itertools.product(
      _FORMATS.items(), config.products_of_weights
    ):
      ours = functools.partial(
        dequant_matmul.dequant_matmul, implementation=implementation
      )
      convert = lambda x, w, quantize=quantize: (x, *quantize(w))
      label = f'{name}, {implementation}'
      candidates[label] = compiled(ours, convert)
      needed[label] = matmul(w_bits=stored)
    yield Case(
      operation='product with quantized weights',
      size=m,
      shapes=((m, k), (k, n)),
      candidates=candidates,
      work=needed,
      dtype=config.dtype,
    )


# How to store a weight, and the bits of one with its share of a float32 scale.
_FORMATS = {
  'int8': (formats.quantize_int8, 8),
  'int4': (functools.partial(formats.quantize_int4, group=64), 4.5),
  'nf4': (formats.quantize_nf4, 4.5),
}


def _binary(config: ml_collections.ConfigDict) -> Iterator[Case]:
  """Signs of both sides, packed before; the baseline multiplies them."""
  for m, k, n in config.binary:
    ours = lambda name, k=k: functools.partial(
      binary_matmul.binary_matmul, size=k, implementation=name
    )
    signs = lambda x, w: (jnp.where(x >= 0, 1.0, -1.0) for x in (x, w))
    packed = lambda x, w: (
      binary_matmul.pack_signs(x),
      binary_matmul.pack_signs(w.T),
    )
    yield Case(
      operation='binary product',
      size=m,
      shapes=((m, k), (k, n)),
      candidates={'float32': compiled(jnp.matmul, signs)}
      | {name: compiled(ours(name), packed) for name in _here(config.products)},
      work={'float32': roofline.matmul(m, n, k)}
      | dict.fromkeys(
        _here(config.products), roofline.matmul(m, n, k, x_bits=1, w_bits=1)
      ),
    )


def measure(
  case: Case, config: ml_collections.ConfigDict, machine: workdirs.Row
) -> list[workdirs.Row]:
  """A row for each implementation."""
  rng = np.random.default_rng(config.seed)
  inputs = [
    jnp.asarray(rng.standard_normal(shape, np.float32), case.dtype)
    for shape in case.shapes
  ]
  ready = {name: prepare(*inputs) for name, prepare in case.candidates.items()}
  measured, clocks = timings(ready, config.repeats)
  baseline = next(iter(ready))
  results = lambda candidate: candidate.read(candidate.call())
  right = results(ready[baseline]) if case.alike else None
  rows = []
  for name, candidate in ready.items():
    seconds = measured[name].median_seconds
    work = case.work[name] if isinstance(case.work, dict) else case.work
    least = work.seconds(
      machine['flops_per_second'], machine['bytes_per_second']
    )
    peak = candidate.peak_bytes
    rows.append(
      {
        'method': f'{case.operation}, {name}',
        'operation': case.operation,
        'implementation': name,
        'shape': ' '.join('x'.join(map(str, x)) for x in case.shapes),
        'sequence_length': case.size,
        'clock': clocks[name],
        'milliseconds': 1e3 * seconds,
        'milliseconds_minimum': 1e3 * measured[name].minimum_seconds,
        'milliseconds_spread': 1e3 * measured[name].spread_seconds,
        'baseline': baseline,
        'speedup': measured[baseline].median_seconds / seconds,
        'gigaflops_per_second': work.flops / seconds / 1e9,
        'gigabytes_per_second': work.bytes / seconds / 1e9,
        'roofline_fraction': least / seconds,
        'peak_bytes': peak,
        'peak_megabytes': None if peak is None else peak / 1e6,
        'max_error': _error(results(candidate), right) if case.alike else None,
        'seed': config.seed,
      }
    )
  return rows


def timings(
  ready: Mapping[str, baselines.Ready], repeats: int
) -> tuple[dict[str, speed.Timing], dict[str, str]]:
  """Times, and whose clock they are by: that of the device where it tells."""
  found = {}
  for name, candidate in ready.items():
    if candidate.on_device is not None:
      with contextlib.suppress(speed.NoClock):
        found[name] = candidate.on_device(repeats)
  clocks = {n: 'device' if n in found else 'host' for n in ready}
  others = {n: c.call for n, c in ready.items() if n not in found}
  if others:  # in turns
    found |= speed.compare(others, repeats=repeats)
  return found, clocks


def _tiles(size: int, config: ml_collections.ConfigDict) -> masks.Tiles:
  """The diagonal and random tiles, as many in every row."""
  count = -(-size // TILE[0])
  rng = np.random.default_rng(config.seed)
  kept = np.eye(count, dtype=bool)
  for row in range(count):
    others = rng.permutation(np.delete(np.arange(count), row))
    kept[row, others[: max(0, round(config.sparse_density * count) - 1)]] = True
  return masks.Tiles.of(TILE, kept)


def _error(got: Any, right: Any) -> float:
  """The largest difference, relative to the largest number."""
  pairs = [
    (np.asarray(a, np.float32), np.asarray(b, np.float32))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(right), strict=True)
  ]
  scale = max(float(np.abs(b).max()) for _, b in pairs)
  return max(float(np.abs(a - b).max()) for a, b in pairs) / scale
