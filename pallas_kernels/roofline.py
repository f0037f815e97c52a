"""How much work an operation is: floating-point operations and bytes.

Cost estimates of kernels, benchmarks and tests use the same formulas. A tile
that is skipped is not counted, a score that is masked inside a tile is.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """What an operation must do at least.

  Attributes:
    flops: Multiplications and additions.
    bytes: Inputs read once and outputs written once.
  """

  flops: float
  bytes: float

  def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
    """The least time on a machine with these two peaks."""
    return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def attention(
  *,
  batch: int,
  q_size: int,
  kv_size: int,
  heads: int,
  kv_heads: int,
  width: int,
  density: float = 1.0,
  item_bytes: int = 4,
  backward: bool = False,
) -> Work:
  """Two products forward, five more backward (arXiv 2205.14135).

  `density` is the share of scores that are computed: about 1/2 when causal.
  The convention of the FlashAttention benchmarks: 4 S^2 D a head forward and
  2.5 times that backward, whatever is computed again.
  """
  flops = 4.0 * batch * heads * q_size * kv_size * width * density
  queries = batch * q_size * heads * width * item_bytes
  keys = batch * kv_size * kv_heads * width * item_bytes
  statistics = 4 * batch * heads * q_size
  moved = 2 * queries + 2 * keys + statistics
  if backward:
    flops *= 3.5
    moved += 4 * queries + 4 * keys + statistics
  return Work(flops=flops, bytes=moved)


def decode_attention(
  *,
  batch: int,
  time: int,
  slots: int,
  heads: int,
  kv_heads: int,
  width: int,
  item_bytes: int = 4,
  cache_bytes: float | None = None,
  tree: bool = False,
) -> Work:
  """`time` new queries a row over `slots` used slots of its cache.

  `cache_bytes` is an item of the cache if that differs from a query's; int8
  slots have a float32 scale a key and a value besides.
  """
  quantized = cache_bytes == 1
  cache_bytes = item_bytes if cache_bytes is None else cache_bytes
  slot = 2 * (width * cache_bytes + (4 if quantized else 0))
  moved = batch * slots * kv_heads * slot
  moved += 2 * batch * time * heads * width * item_bytes
  moved += 4 * batch * time * heads + (time * time / 8 if tree else 0)
  return Work(flops=4.0 * batch * heads * time * slots * width, bytes=moved)


def matmul(
  m: int,
  n: int,
  k: int,
  *,
  x_bits: float = 32,
  w_bits: float = 32,
  out_bits: float = 32,
) -> Work:
  """[m, k] times [k, n], with the bits of an element of each array."""
  bits = m * k * x_bits + k * n * w_bits + m * n * out_bits
  return Work(flops=2.0 * m * n * k, bytes=bits / 8)
