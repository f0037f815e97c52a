"""Products with quantized weights on a TPU: unpacked beside the matrix unit.

                            packed w, and its scales
                           n 0     n 1     n 2
                         +-------+-------+-------+
                    k 0  |       |       |       |   tiles of w stream by as
                         +-------+-------+-------+   they are stored,
                    k 1  |       |       |       |   k innermost
                         +-------+-------+-------+
         k 0     k 1
       +-------+-------+ +-------+-------+-------+
  m 0  |   x   |   x   | |  acc  |       |       |   out [M, N]
       +-------+-------+ +-------+-------+-------+

The grid is (m, n, k). A tile of the result is one float32 accumulator in VMEM:

    acc  = 0                                 at the first k
    w    = value(q[k, n]) s[k / G, n]        in registers, float32
    acc += x[m, k] @ w                       w rounded to the dtype of x
    out  = acc                               at the last k

A product with w' has the grid (m, k, n): the same tiles of w, summed over n.

    packed tile [k / 2, n]     w tile [k, n]
      +--------+     low  +--------+
      | 16 rows| -------> | 16 rows|    16 rows of bytes are 32 rows of w: two
      +--------+ \\  high  +--------+    shifts, and registers get new names
      | 16 rows|  +-----> | 16 rows|
      +--------+          +--------+

Codes are looked up with 15 selections, four bits deep. Nothing pads w, which is
large: its tiles may hang over the edge of the array, where VMEM holds anything.
There x is zero, or what comes out is not written back; but zero times an
infinite scale is NaN, and so the scales, which are small, are padded.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import shards
from pallas_kernels.dequant_matmul import formats


class Tiles(NamedTuple):
  """Largest sides of tiles; `m` is a multiple of 16, `n` and `k` of 128.

  A tile of w is dequantized for every tile of m again, so m is large. Where
  groups ask for it, k becomes up to twice as large.
  """

  m: int = 512
  n: int = 512
  k: int = 512


TILES = Tiles()


@functools.partial(
  jax.jit, static_argnames=('transposed', 'out_dtype', 'tiles', 'interpret')
)
def dequant_matmul(
  x: jax.Array,  # [M, K], or [M, N] if transposed
  values: jax.Array,  # [K, N] int8, or [K / 2, N] uint8
  scales: jax.Array,  # [K / G, N] float32 or float16
  codebook: jax.Array | None = None,  # [16] float32
  *,
  transposed: bool,
  out_dtype: jax.typing.DTypeLike,
  tiles: Tiles = TILES,
  interpret: Any = False,
) -> jax.Array:
  """x @ w [M, N], or x @ w' [M, K]; see `api`.

  Args:
    x: Rows.
    values: Weights, packed or not.
    scales: Of groups of weights.
    codebook: Values of codes.
    transposed: Whether w' is meant.
    out_dtype: float32 or bfloat16.
    tiles: Bounds of the tiles.
    interpret: True or `pltpu.InterpretParams` runs the kernel without a TPU.

  Raises:
    NotImplementedError: A dtype is another one, or no tile fits the groups.
  """
  _check(x, out_dtype)
  halves = 2 if values.dtype == jnp.uint8 else 1  # values of a byte
  m, (k, n) = x.shape[0], (values.shape[0] * halves, values.shape[1])
  group = k // scales.shape[0]
  # Whole registers of bfloat16 are 16 rows high.
  rows_of_x = _even(m, tiles.m, 16)
  # Few rows leave a tile little to do: a wider one is worth its start.
  widest = tiles.n * min(4, tiles.m // rows_of_x)
  tile = Tiles(
    rows_of_x,
    n if n <= widest else _even(n, widest, 128),
    _inner_tile(k, group, tiles.k),
  )
  if interpret is False:
    x = dispatch.only_on('tpu', 'mosaic_tpu', x)
  steps = Tiles(*(pl.cdiv(*pair) for pair in zip((m, n, k), tile, strict=True)))
  # Either a tile has several rows of scales, or a row serves several tiles.
  rows, serves = max(1, tile.k // group), pl.cdiv(group, tile.k)
  missing = rows * pl.cdiv(steps.k, serves) - len(scales)
  columns = steps.n * tile.n
  scales = scales.astype(jnp.float32)
  scales = jnp.pad(scales, ((0, missing), (0, columns - n)))
  inner = columns if transposed else steps.k * tile.k
  x = jnp.pad(x, ((0, max(m, tile.m) - m), (0, inner - x.shape[1])))

  # Blocks are placed by (m, n, k), in whichever order the grid goes.
  def spec(block, place):
    if transposed:
      return pl.BlockSpec(block, lambda m, k, n: place(m, n, k))
    return pl.BlockSpec(block, place)

  over_n = spec((tile.m, tile.n), lambda m, n, k: (m, n))
  over_k = spec((tile.m, tile.k), lambda m, n, k: (m, k))
  x_spec, out_spec = (over_n, over_k) if transposed else (over_k, over_n)
  packed_tile = (tile.k // halves, tile.n)
  specs = [
    x_spec,
    spec(packed_tile, lambda m, n, k: (k, n)),
    # Not k // serves, which asks for the sign of k and so for the chip at hand.
    spec((None, rows, tile.n), lambda m, n, k: (lax.div(k, serves), 0, n)),
  ]
  operands = [x, values, scales.reshape(-1, rows, columns)]
  if codebook is not None:
    specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    operands.append(codebook)
  out = shards.out_shape((len(x), k if transposed else n), out_dtype, x)
  again = steps.k if transposed else steps.n  # times that x is read
  return pl.pallas_call(
    functools.partial(_kernel, transposed=transposed),
    grid=(steps.m, steps.k, steps.n) if transposed else steps,
    in_specs=specs,
    out_specs=out_spec,
    out_shape=out,
    scratch_shapes=[pltpu.VMEM(out_spec.block_shape, jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * len(x) * n * k,
      transcendentals=0,
      bytes_accessed=again * x.nbytes
      + steps.m * (values.nbytes + scales.nbytes)
      + out.size * out.dtype.itemsize,
    ),
    interpret=interpret,
    name='dequant_matmul' + '_transposed' * transposed,
  )(*operands)[:m]


def _kernel(x, values, scales, *refs, transposed: bool):
  """One step of the recurrence; `refs` are the codebook, if any, out, acc."""
  *codebook, out, acc = refs
  step, last = pl.program_id(2), pl.num_programs(2) - 1

  @pl.when(step == 0)
  def _clear():
    acc[...] = jnp.zeros_like(acc)

  w = _dequantize(values[...], scales[...], *codebook).astype(x.dtype)
  acc[...] += lax.dot_general(
    x[...],
    w,
    (((1,), (1 if transposed else 0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )

  @pl.when(step == last)
  def _write():
    out[...] = acc[...].astype(out.dtype)


def _dequantize(values, scales, codebook=None) -> jax.Array:
  """A tile of w, [k, n] float32."""
  rows, columns = scales.shape
  if values.dtype == jnp.uint8:
    values = formats.unpack_int4(values, signed=codebook is None)
  if codebook is None:
    # Over int32: not every compiler widens int8 to a float at once.
    values = values.astype(jnp.int32).astype(jnp.float32)
  else:
    values = formats.look_up(values, codebook)
  groups = values.reshape(rows, -1, columns)
  return (groups * scales[:, None]).reshape(-1, columns)


def _inner_tile(k: int, group: int, largest: int) -> int:
  """Side of tiles along K: whole groups, or an equal part of a group."""
  if group == k:
    return k if k <= largest else _even(k, largest, 128)
  if group % 8:
    raise NotImplementedError(
      f'groups must be a multiple of 8 rows or all of K, got {group}'
    )
  if k <= 2 * largest:
    return k
  unit = math.lcm(group, 128)
  if unit <= 2 * largest:
    return unit * max(1, largest // unit)
  if group % 128 == 0:
    return math.gcd(group, largest)
  raise NotImplementedError(
    f'no tile of up to {2 * largest} rows holds whole groups of {group}'
  )


def _even(size: int, largest: int, unit: int) -> int:
  """Side of equal tiles, at most `largest` and a multiple of `unit`."""
  return pl.cdiv(pl.cdiv(size, pl.cdiv(size, largest)), unit) * unit


def _check(x, out_dtype) -> None:
  for name, dtype in ('x', x.dtype), ('out_dtype', jnp.dtype(out_dtype)):
    if dtype not in (jnp.float32, jnp.bfloat16):
      raise NotImplementedError(
        f'{name} must be float32 or bfloat16, got {dtype}'
      )
