"""Attention of whole sequences, exact, without the n x n matrix.

    out_i = sum_j p_ij v_j,   p_ij = exp(s_ij - lse_i),   s_ij = q_i k_j scale

over the keys j that query i sees (FlashAttention, arXiv 2205.14135).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import masks
from pallas_kernels.attention import blockwise
from pallas_kernels.attention import llvm_cpu
from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention import mosaic_tpu
from pallas_kernels.attention import reference

IMPLEMENTATIONS = {
  'reference': reference.attention,
  'blockwise': blockwise.attention,
  'mosaic_tpu': mosaic_tpu.attention,
  'mosaic_gpu': mosaic_gpu.attention,
  'llvm_cpu': llvm_cpu.attention,
}


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool = False,
  offset: jax.Array | int = 0,
  window: int | None = None,
  kv_length: jax.Array | None = None,
  q_segments: jax.Array | None = None,
  kv_segments: jax.Array | None = None,
  softcap: float | None = None,
  scale: float | None = None,
  tiles: masks.Tiles | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention and its log-sum-exp; differentiable in q, k and v.

  Statistics are float32 whatever the inputs are. Memory grows with Sq + Sk. A
  query that sees no key has output 0, log-sum-exp -inf and gradient 0. What
  keys hold that no query sees, NaN and infinities included, does not matter.

  Args:
    q: [B, Sq, H, D] float32, bfloat16 or float16.
    k: [B, Sk, K, D]; K divides H, and H / K queries share a key head.
    v: [B, Sk, K, Dv].
    causal: Query i, at position `i + offset`, sees keys up to that position.
    offset: A number, or one a row [B]. `Sk - Sq` lets the last query see all.
    window: Query i sees positions closer than this, itself included.
    kv_length: [B] int32, how many keys each row has; None is Sk.
    q_segments: [B, Sq] int32; a query sees keys of its own segment only.
    kv_segments: [B, Sk] int32.
    softcap: c replaces scores by `c tanh(s / c)` (arXiv 2408.00118).
    scale: Factor of the scores; None is `D ** -0.5`.
    tiles: Tiles of the score matrix to compute; the others are hidden.
    implementation: See `dispatch`: 'reference', 'blockwise', 'mosaic_tpu',
      'mosaic_gpu', 'llvm_cpu', or None, which takes the last one only where
      there is one device.

  Returns:
    Out [B, Sq, H, Dv] in the dtype of q and log-sum-exp [B, H, Sq] float32.
    `merge` joins the results of different keys.

  Raises:
    ValueError: Shapes or options do not fit together.
  """
  _check(q, k, v, window, softcap, q_segments, kv_segments, tiles)
  batch = q.shape[0]
  row = lambda x: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch,))
  limits = masks.Limits(
    row(offset),
    row(k.shape[1] if kv_length is None else kv_length),
    q_segments,
    kv_segments,
  )
  rule = masks.Rule(
    scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    causal=causal,
    window=window,
    softcap=softcap,
    tiles=tiles,
  )
  offered = dict(IMPLEMENTATIONS)
  if implementation is None and jax.device_count() > 1:
    # XLA gathers arrays that are divided among devices to call it.
    del offered['llvm_cpu']
  bound = dispatch.bind(offered, rule)
  return dispatch.call('attention', bound, implementation, q, k, v, limits)


def merge(
  parts: list[tuple[jax.Array, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
  """Joins attention over disjoint keys into attention over all of them."""
  outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
  lse = jax.nn.logsumexp(lses, axis=0)
  empty = jnp.isneginf(lse)
  weights = jnp.where(empty, 0, jnp.exp(lses - jnp.where(empty, 0, lse)))
  weights = weights.transpose(0, 1, 3, 2)[..., None]
  out = (weights * outs.astype(jnp.float32)).sum(0)
  return out.astype(outs.dtype), lse


def _check(q, k, v, window, softcap, q_segments, kv_segments, tiles) -> None:
  if not q.ndim == k.ndim == v.ndim == 4:
    raise ValueError(
      'q, k and v must be [B, S, heads, width], got'
      f' {q.shape}, {k.shape}, {v.shape}.'
    )
  if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
    raise ValueError(
      'q, k and v must agree in B, k and v in Sk and K, got'
      f' {q.shape}, {k.shape}, {v.shape}.'
    )
  if q.shape[3] != k.shape[3]:
    raise ValueError(f'q has width {q.shape[3]} and k has {k.shape[3]}.')
  if q.shape[2] % k.shape[2]:
    raise ValueError(
      f'{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly.'
    )
  if window is not None and window < 1:
    raise ValueError(f'window must be >= 1, got {window}.')
  if softcap is not None and softcap <= 0:
    raise ValueError(f'softcap must be > 0, got {softcap}.')
  if (q_segments is None) != (kv_segments is None):
    raise ValueError('q_segments and kv_segments come together.')
  if tiles is not None:
    rows, columns = (
      -(-s // t) for s, t in zip((q.shape[1], k.shape[1]), tiles.size)
    )
    highest = max((max(row) for row in tiles.kept if row), default=-1)
    if len(tiles.kept) != rows or highest >= columns:
      raise ValueError(
        f'tiles of {tiles.size} over {q.shape[1]} x {k.shape[1]} are'
        f' {rows} x {columns}, got {len(tiles.kept)} rows and column {highest}.'
      )
