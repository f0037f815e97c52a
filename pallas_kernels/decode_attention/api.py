"""Attention of a few new tokens over a long cache, exact.

    out_t = sum_s p_ts v_s,   p_ts = exp(s_ts - lse_t),   s_ts = q_t k_s scale

over the slots s that query t sees: all that were there before, and of the new
ones those up to itself, or its ancestors in a tree of tokens (SpecInfer, arXiv
2305.09781). A tree is so verified in one pass.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels import masks
from pallas_kernels.decode_attention import blockwise
from pallas_kernels.decode_attention import llvm_cpu
from pallas_kernels.decode_attention import mosaic_gpu
from pallas_kernels.decode_attention import mosaic_tpu
from pallas_kernels.decode_attention import reference

IMPLEMENTATIONS = {
  'reference': reference.attention,
  'blockwise': blockwise.attention,
  'mosaic_tpu': mosaic_tpu.attention,
  'mosaic_gpu': mosaic_gpu.attention,
  'llvm_cpu': llvm_cpu.attention,
}


def decode_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  length: jax.Array,
  *,
  ancestors: jax.Array | None = None,
  k_scales: jax.Array | None = None,
  v_scales: jax.Array | None = None,
  window: int | None = None,
  softcap: float | None = None,
  scale: float | None = None,
  splits: int | None = None,
  implementation: dispatch.Implementation = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention over a cache and its log-sum-exp; not differentiable.

  The T new tokens of a row are in the cache already, in its last used slots:
  query t in slot `length - T + t`. Statistics are float32. A query that sees
  nothing has output 0 and log-sum-exp -inf. What slots hold that no query of
  their row sees, NaN and infinities included, does not matter. The time follows
  the longest row, not the number of slots.

  Args:
    q: [B, T, H, D] float32, bfloat16 or float16.
    k: [B, K, S, D] in the dtype of q, or int8; K divides H.
    v: [B, K, S, Dv] likewise.
    length: [B] int32, used slots of each row, the new ones among them.
    ancestors: [T, T] or [B, T, T] bool; `ancestors[t, u]` says that token u is
      token t or an ancestor of it. None is a chain, each token the child of the
      one before. A token must not stand before its parent.
    k_scales: [B, K, S] float32, `k k_scales` is meant by an int8 cache.
    v_scales: [B, K, S] float32.
    window: A query sees positions closer than this, itself included; in a tree
      the position of a token is its depth.
    softcap: c replaces scores by `c tanh(s / c)` (arXiv 2408.00118).
    scale: Factor of the scores; None is `D ** -0.5`.
    splits: Parts of the cache that are worked on apart and merged, for devices
      with more cores than there are rows and key heads; None is the
      implementation's choice.
    implementation: See `dispatch`: 'reference', 'blockwise', 'mosaic_tpu',
      'mosaic_gpu', 'llvm_cpu', or None.

  Returns:
    Out [B, T, H, Dv] in the dtype of q and log-sum-exp [B, H, T] float32.
    `attention.api.merge` joins the results of different keys.

  Raises:
    ValueError: Shapes or options do not fit together.
  """
  _check(q, k, v, length, ancestors, k_scales, v_scales)
  for name, value in (('window', window), ('splits', splits)):
    if value is not None and value < 1:
      raise ValueError(f'{name} must be >= 1, got {value}.')
  if softcap is not None and softcap <= 0:
    raise ValueError(f'softcap must be > 0, got {softcap}.')
  batch, time = q.shape[:2]
  if ancestors is not None:
    ancestors = jnp.broadcast_to(ancestors, (batch, time, time))
  limits = masks.Limits(length - time, length, None, None, ancestors)
  rule = masks.Rule(
    scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    causal=True,  # of the ancestors too: none stands before its parent
    window=window,
    softcap=softcap,
  )
  bound = dispatch.bind(IMPLEMENTATIONS, rule, splits)
  arrays = (q, k, v, limits, k_scales, v_scales)
  return dispatch.call('decode_attention', bound, implementation, *arrays)


def _check(q, k, v, length, ancestors, k_scales, v_scales) -> None:
  if not q.ndim == k.ndim == v.ndim == 4:
    raise ValueError(
      'q must be [B, T, heads, width], k and v [B, heads, slots, width], got'
      f' {q.shape}, {k.shape}, {v.shape}.'
    )
  if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
    raise ValueError(
      'q, k and v must agree in B, k and v in K and S, got'
      f' {q.shape}, {k.shape}, {v.shape}.'
    )
  if q.shape[3] != k.shape[3]:
    raise ValueError(f'q has width {q.shape[3]} and k has {k.shape[3]}.')
  if q.shape[2] % k.shape[1]:
    raise ValueError(
      f'{q.shape[2]} query heads cannot share {k.shape[1]} key heads evenly.'
    )
  batch, time = q.shape[:2]
  if length.shape != (batch,):
    raise ValueError(f'length must be [B] = [{batch}], got {length.shape}.')
  if ancestors is not None:
    if ancestors.shape not in ((time, time), (batch, time, time)):
      raise ValueError(
        f'ancestors must be [T, T] or [B, T, T] with T = {time}, got'
        f' {ancestors.shape}.'
      )
    if ancestors.dtype != bool:
      raise ValueError(f'ancestors must be bool, got {ancestors.dtype}.')
  quantized = k.dtype == jnp.int8, v.dtype == jnp.int8
  scaled = k_scales is not None, v_scales is not None
  if quantized not in ((True, True), (False, False)) or quantized != scaled:
    raise ValueError(
      'k and v are both int8 and come with k_scales and v_scales, or neither'
      f' does, got {k.dtype}, {v.dtype} and scales {scaled}.'
    )
  for scales in (k_scales, v_scales):
    if scales is not None and scales.shape != k.shape[:3]:
      raise ValueError(f'scales must be {k.shape[:3]}, got {scales.shape}.')
