"""The int8 product on a TPU, in Pallas; int8 products begin with the v5e.

                            w [K, N] int8
                           n 0     n 1     n 2
                         +-------+-------+-------+
                    k 0  |       |       |       |   tiles of w stream by,
                         +-------+-------+-------+   k innermost
                    k 1  |       |       |       |
                         +-------+-------+-------+
         k 0     k 1
       +-------+-------+ +-------+-------+-------+
  m 0  |  xq   |  xq   | |  acc  |       |       |   out [M, N]
       +-------+-------+ +-------+-------+-------+
  m 1  |       |       | |       |       |       |
       +-------+-------+ +-------+-------+-------+
        x [M, K]

The grid is (m, n, k). A tile of the result is one int32 accumulator in VMEM:

    acc  = 0                           at the first k
    acc += xq[m, k] @ w[k, n]          int8 x int8 -> int32, exact
    out  = float(acc) s_w[n] s_x[m]    at the last k

Rows are quantized inside the kernel. A scale needs the whole row, so the block
of x is [tile, K]; it is fetched once a row of tiles, and at the first (n, k)
its scales and its int8 values go to scratch, where every n finds them. So x is
read once, as it is, and its int8 copy never sees HBM. Rows too wide for VMEM
are quantized by XLA before the kernel, which then reads int8 tiles, as it does
when x comes quantized.

Nothing pads w, which is large: its tiles may hang over the edge of the array,
where VMEM holds anything. Beyond N that lands in columns that are not written
back. Beyond K it meets zeros of x, and in integers zero times anything is zero.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import shards
from pallas_kernels.int8_matmul import reference


class Tiles(NamedTuple):
  """Largest sides of tiles; `m` is a multiple of 32, `n` and `k` of 128.

  A byte of w takes part in 2 m operations: with 256 rows a v5e (394 Top/s,
  819 GB/s) is bound by arithmetic, not by memory.
  """

  m: int = 256
  n: int = 512
  k: int = 512


TILES = Tiles()
# VMEM for rows of x; of the 16 MiB that a kernel may use by default.
ROW_BYTES = 10 * 2**20


@functools.partial(jax.jit, static_argnames=('out_dtype', 'tiles', 'interpret'))
def int8_matmul(
  x: jax.Array,  # [M, K] float32, bfloat16, or int8
  w: jax.Array,  # [K, N] int8
  w_scales: jax.Array,  # [N] float32
  x_scales: jax.Array | None = None,  # [M] float32, of int8 x
  w_offsets: jax.Array | None = None,
  *,
  out_dtype: jax.typing.DTypeLike = jnp.float32,
  tiles: Tiles = TILES,
  interpret: Any = False,
) -> jax.Array:
  """(q @ w) s_x s_w, [M, N]; see `api`.

  Args:
    x: Rows.
    w: Weights.
    w_scales: A scale a column of w.
    x_scales: A scale a row, where x is int8.
    w_offsets: None; there is no kernel for them.
    out_dtype: float32 or bfloat16.
    tiles: Bounds of the tiles.
    interpret: True or `pltpu.InterpretParams` runs the kernel without a TPU.

  Raises:
    NotImplementedError: A dtype is another one, an axis is empty, or weights
      have scales of groups or offsets.
  """
  reference.only_scales_of_columns(w, w_scales, w_offsets)
  _check(x, w, out_dtype)
  if interpret is False:
    x = dispatch.only_on('tpu', 'mosaic_tpu', x)
  (m, k), n = x.shape, w.shape[1]
  tile = Tiles(
    # Whole registers of int8 are 32 rows high.
    _even(m, tiles.m, 32),
    n if n <= tiles.n else _even(n, tiles.n, 128),
    k if k <= tiles.k else _even(k, tiles.k, 128),
  )
  rows, columns = max(m, tile.m), pl.cdiv(k, tile.k) * tile.k
  # Two buffers of x, so that one is filled while one is used, and its values.
  row_bytes = tile.m * columns * (2 * x.dtype.itemsize + 1)
  if x_scales is None and row_bytes > ROW_BYTES:
    x, x_scales = reference.quantize_rows(x)
  x = jnp.pad(x, ((0, rows - m), (0, columns - k)))
  kernel, x_and_scales = _from_floats, [x]
  if x_scales is not None:
    x_scales = jnp.pad(x_scales, (0, rows - m))[:, None]
    kernel, x_and_scales = _from_int8, [x, x_scales]
  out = _call(
    kernel, tile, x_and_scales, w, w_scales[None], out_dtype, interpret
  )
  return out[:m]


def _from_int8(x, x_scales, w, w_scales, out, acc):
  """Kernel over int8 tiles of x [m, k] and scales [m, 1]."""
  _multiply(x[...], x_scales, w, w_scales, out, acc)


def _from_floats(x, w, w_scales, out, acc, values, scales):
  """Kernel over whole rows of x [m, K], which it quantizes once a row of tiles.

  `values` [K / k, m, k] int8 and `scales` [m, 1] live from one n to the next.
  """
  n, k = pl.program_id(1), pl.program_id(2)
  tiles, _, width = values.shape
  parts = [slice(t * width, (t + 1) * width) for t in range(tiles)]

  @pl.when((n == 0) & (k == 0))
  def _quantize():
    largest = lambda part: jnp.abs(x[:, part].astype(jnp.float32)).max(
      axis=-1, keepdims=True
    )
    scales[...] = reference.scales_of(
      functools.reduce(jnp.maximum, map(largest, parts))
    )
    for t, part in enumerate(parts):
      values[t] = reference.quantize(x[:, part], scales[...])

  _multiply(values[k], scales, w, w_scales, out, acc)


def _multiply(values, x_scales, w, w_scales, out, acc):
  """One step of the recurrence; all but `values` are references."""
  step, last = pl.program_id(2), pl.num_programs(2) - 1

  @pl.when(step == 0)
  def _clear():
    acc[...] = jnp.zeros_like(acc)

  acc[...] += lax.dot_general(
    values, w[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32
  )

  @pl.when(step == last)
  def _write():
    out[...] = reference.dequantize(
      acc[...], x_scales[...], w_scales[...], out.dtype
    )


def _call(kernel, tile: Tiles, x_and_scales, w, w_scales, out_dtype, interpret):
  x = x_and_scales[0]
  (rows, columns), (k, n) = x.shape, w.shape
  grid = (pl.cdiv(rows, tile.m), pl.cdiv(n, tile.n), columns // tile.k)
  out = shards.out_shape((rows, n), out_dtype, x)
  acc = pltpu.VMEM((tile.m, tile.n), jnp.int32)
  if kernel is _from_floats:
    x_specs = [pl.BlockSpec((tile.m, columns), lambda m, n, k: (m, 0))]
    scratch = [
      acc,
      pltpu.VMEM((grid[2], tile.m, tile.k), jnp.int8),
      pltpu.VMEM((tile.m, 1), jnp.float32),
    ]
    # The values of a row of tiles are made at its first n: n goes in order.
    order = ('parallel', 'arbitrary', 'arbitrary')
    x_reads = 1
  else:
    x_specs = [
      pl.BlockSpec((tile.m, tile.k), lambda m, n, k: (m, k)),
      pl.BlockSpec((tile.m, 1), lambda m, n, k: (m, 0)),
    ]
    scratch = [acc]
    order = ('parallel', 'parallel', 'arbitrary')
    x_reads = grid[1]
  out_bytes = out.size * out.dtype.itemsize
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=[
      *x_specs,
      pl.BlockSpec((tile.k, tile.n), lambda m, n, k: (k, n)),
      pl.BlockSpec((1, tile.n), lambda m, n, k: (0, n)),
    ],
    out_specs=pl.BlockSpec((tile.m, tile.n), lambda m, n, k: (m, n)),
    out_shape=out,
    scratch_shapes=scratch,
    compiler_params=pltpu.CompilerParams(dimension_semantics=order),
    cost_estimate=pl.CostEstimate(
      flops=2 * rows * n * k,
      transcendentals=0,
      bytes_accessed=x_reads * x.nbytes + grid[0] * w.nbytes + out_bytes,
    ),
    interpret=interpret,
    name='int8_matmul' + kernel.__name__,
  )(*x_and_scales, w, w_scales)


def _even(size: int, largest: int, unit: int) -> int:
  """Side of equal tiles, at most `largest` and a multiple of `unit`."""
  return pl.cdiv(pl.cdiv(size, pl.cdiv(size, largest)), unit) * unit


def _check(x, w, out_dtype) -> None:
  if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
    raise NotImplementedError(
      f'x must be float32, bfloat16 or int8, got {x.dtype}'
    )
  if out_dtype not in (jnp.float32, jnp.bfloat16):
    raise NotImplementedError(
      f'out_dtype must be float32 or bfloat16, got {jnp.dtype(out_dtype)}'
    )
  if 0 in (*x.shape, *w.shape):
    raise NotImplementedError(f'an axis is empty: x {x.shape}, w {w.shape}')
