"""Inputs of attention, and its results in float64 from the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import masks
from pallas_kernels.attention import api

TILE = (16, 16)
# Options whose values a compiled program takes; the others make another one.
LIMITS = ('offset', 'kv_length', 'q_segments', 'kv_segments')


def make(
  seed=0,
  sizes=(37, 41),
  heads=(2, 2),
  widths=(8, 8),
  segments=None,
  packed=False,
  tiles=None,
  tile=TILE,
  dtype=jnp.float32,
  **options,
):
  """Random inputs, and the options of `api.attention`.

  Segments lie anyhow, or `packed` one behind the other.
  """
  rng = np.random.default_rng(seed)
  (n, m), (h, kh), (d, dv) = sizes, heads, widths
  q, k, v = (
    rng.standard_normal(shape).astype(dtype)
    for shape in ((2, n, h, d), (2, m, kh, d), (2, m, kh, dv))
  )
  for name in ('offset', 'kv_length'):
    if isinstance(options.get(name), tuple):
      options[name] = np.asarray(options[name], np.int32)
  if segments:
    for name, size in (('q_segments', n), ('kv_segments', m)):
      drawn = np.int32(rng.integers(0, segments, (2, size)))
      options[name] = np.sort(drawn, axis=1) if packed else drawn
  if tiles is not None:
    options['tiles'] = masks.Tiles(tile, tiles)
  return (q, k, v), options


def _outputs(arrays, limits, implementation, options):
  return api.attention(
    *arrays, implementation=implementation, **limits, **dict(options)
  )


def _and_gradients(arrays, limits, cotangents, implementation, options):
  run = lambda *a: _outputs(a, limits, implementation, options)
  outputs, pull_back = jax.vjp(run, *arrays)
  if cotangents is None:
    cotangents = jax.tree.map(jnp.ones_like, outputs)
  return *outputs, *pull_back(cotangents)


# One program of a case; what tests patch must not change within a module.
_compile = functools.partial(
  jax.jit, static_argnames=('implementation', 'options')
)
_outputs_program = _compile(_outputs)
_and_gradients_program = _compile(_and_gradients)
# A TPU will not run what LLVM makes of its kernels here: no effort on it. What
# they hand to each other is rounded as it is in memory.
_interpreted_program = _compile(
  _and_gradients,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_allow_excess_precision': False,
  },
)


def _split(options):
  limits = {name: options[name] for name in LIMITS if name in options}
  static = tuple(pair for pair in options.items() if pair[0] not in limits)
  return limits, static


def outputs(implementation, arrays, options):
  """Out and lse."""
  limits, static = _split(options)
  return _outputs_program(arrays, limits, implementation, static)


def outputs_and_gradients(implementation, arrays, options, cotangents=None):
  """Out, lse and the gradients of q, k and v; of ones, without cotangents."""
  limits, static = _split(options)
  if cotangents is not None:
    d_out, d_lse = cotangents
    cotangents = d_out.astype(arrays[0].dtype), d_lse.astype(np.float32)
  program = _and_gradients_program
  if implementation == 'interpreted':
    program = _interpreted_program
  return program(arrays, limits, cotangents, implementation, static)


def cotangents(arrays, seed=9):
  """Random float64 numbers, of out and of lse."""
  rng = np.random.default_rng(seed)
  (batch, size, heads, _), width = arrays[0].shape, arrays[2].shape[-1]
  return (
    rng.standard_normal((batch, size, heads, width)),
    rng.standard_normal((batch, heads, size)),
  )


def mask(n, m, options):
  """The definition, one pair at a time."""
  seen = np.zeros((2, n, m), bool)
  offset, kv_length = (
    np.broadcast_to(options.get(name, 0), (2,)).tolist()
    for name in ('offset', 'kv_length')
  )
  tiles = options.get('tiles')
  for b, i, j in np.ndindex(seen.shape):
    position = i + offset[b]
    sees = 'kv_length' not in options or j < kv_length[b]
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
