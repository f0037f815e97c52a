"""Inputs of attention, and its results in float64 from the definition."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import masks

TILE = (16, 16)


def make(
  seed=0,
  sizes=(37, 41),
  heads=(2, 2),
  widths=(8, 8),
  segments=None,
  tiles=None,
  tile=TILE,
  dtype=jnp.float32,
  **options,
):
  """Random inputs, and the options of `api.attention`."""
  rng = np.random.default_rng(seed)
  (n, m), (h, kh), (d, dv) = sizes, heads, widths
  q, k, v = (
    jnp.asarray(rng.standard_normal(shape), dtype)
    for shape in ((2, n, h, d), (2, m, kh, d), (2, m, kh, dv))
  )
  for name in ('offset', 'kv_length'):
    if isinstance(options.get(name), tuple):
      options[name] = jnp.asarray(options[name])
  if segments:
    options['q_segments'] = jnp.asarray(rng.integers(0, segments, (2, n)))
    options['kv_segments'] = jnp.asarray(rng.integers(0, segments, (2, m)))
  if tiles is not None:
    options['tiles'] = masks.Tiles(tile, tiles)
  return (q, k, v), options


def mask(n, m, options):
  """The definition, one pair at a time."""
  seen = np.zeros((2, n, m), bool)
  get = lambda name, b: np.broadcast_to(options.get(name, 0), (2,))[b]
  tiles = options.get('tiles')
  for b, i, j in np.ndindex(seen.shape):
    position = i + get('offset', b)
    sees = 'kv_length' not in options or j < get('kv_length', b)
    if options.get('causal'):
      sees = sees and j <= position
    if options.get('window'):
      sees = sees and abs(position - j) < options['window']
    if 'q_segments' in options:
      same = options['q_segments'][b, i] == options['kv_segments'][b, j]
      sees = sees and bool(same)
    if tiles is not None:
      sees = sees and j // tiles.size[1] in tiles.kept[i // tiles.size[0]]
    seen[b, i, j] = sees
  return seen


def exact(arrays, options, d_out=None, d_lse=None):
  """Out, lse and the three gradients in float64, from the formulas."""
  q, k, v = (np.asarray(x, np.float64) for x in arrays)
  groups = q.shape[2] // k.shape[2]
  seen = mask(q.shape[1], k.shape[1], options)[:, None]
  used = seen.any((1, 2))[:, :, None, None]
  k, v = (np.where(used, x, 0).repeat(groups, 2) for x in (k, v))
  scale = options.get('scale') or q.shape[-1] ** -0.5
  cap = options.get('softcap')
  scores = np.einsum('bihd,bjhd->bhij', q, k) * scale
  if cap:
    scores = cap * np.tanh(scores / cap)
  weights = np.where(seen, np.exp(scores), 0)
  total = weights.sum(-1, keepdims=True)
  with np.errstate(divide='ignore', invalid='ignore'):
    lse = np.log(total)[..., 0]
    p = np.where(total > 0, weights / total, 0)
  out = np.einsum('bhij,bjhd->bihd', p, v)
  if d_out is None:
    return out, lse
  d_p = np.einsum('bihd,bjhd->bhij', d_out, v)
  d_lse = np.where(np.isinf(lse), 0, d_lse)[..., None]
  ds = p * (d_p - (p * d_p).sum(-1, keepdims=True) + d_lse)
  if cap:
    ds = ds * (1 - (scores / cap) ** 2)
  ds = ds * scale
  shared = lambda x: x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)
  return (
    out,
    lse,
    np.einsum('bhij,bjhd->bihd', ds, k),
    shared(np.einsum('bhij,bihd->bjhd', ds, q)),
    shared(np.einsum('bhij,bihd->bjhd', p, d_out)),
  )


def error(got, right):
  """The largest; infinities must stand in the same places."""
  got = np.asarray(got, np.float64)
  np.testing.assert_array_equal(np.isinf(got), np.isinf(right))
  finite = np.isfinite(right)
  return np.abs(np.where(finite, got - np.where(finite, right, 0), 0)).max()
