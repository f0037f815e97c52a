"""From logits to the distribution that is sampled, and from that to a token.

There is one `processed_logits`; plain sampling, drafting, verification and the
bonus token all use it, so they cannot disagree about the target distribution.
Where every row is greedy the arg max of `penalized` is all there is of it.

Randomness is keyed by (row, position, purpose), and that of drafts and accept
tests also by the round: what a row samples does not depend on padding or on the
rest of the batch, and plain and coupled text not on the draft length either.
"""

import enum
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Purpose(enum.IntEnum):
  """What a random number is for; two purposes never share one."""

  SAMPLE = 0  # the token of plain sampling, and of the coupled verifier
  DRAFT = 1  # a drafted token
  ACCEPT = 2  # the uniform of an accept test
  CORRECT = 3  # the token after the accepted ones


class Sampling(NamedTuple):
  """How each row samples. A field that is None is compiled away.

  The order is that of transformers: repetition penalty, temperature, top-k,
  top-p, min-p. Ties at a threshold are kept.
  """

  temperature: jax.Array | None = None  # [B] float32; 0 or None: greedy
  top_k: jax.Array | None = None  # [B] int32; 0 or V keeps all
  top_p: jax.Array | None = None  # [B] float32 in (0, 1]; 1 keeps all
  min_p: jax.Array | None = None  # [B] float32 in [0, 1); 0 keeps all
  repetition_penalty: jax.Array | None = None  # [B] float32 > 0; 1 is none


GREEDY = Sampling()


def make(
  batch: int,
  *,
  temperature: float | list[float] = 0.0,
  top_k: int | list[int] = 0,
  top_p: float | list[float] = 1.0,
  min_p: float | list[float] = 0.0,
  repetition_penalty: float | list[float] = 1.0,
) -> Sampling:
  """Checks settings given once or for each row, and drops the inactive ones.

  Raises:
    ValueError: A setting is outside its range, or has another number of rows.
  """

  def rows(name, value, dtype, valid, neutral, remedy):
    # Checked as float32 sees it: a tiny number may be zero there.
    array = np.asarray(value, np.float32 if dtype != jnp.int32 else np.float64)
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != batch):
      raise ValueError(f'{name} must be one value or one for each of {batch}.')
    for item in np.atleast_1d(array):
      if not (math.isfinite(item) and valid(item)):
        raise ValueError(f'{name} must be {remedy}, got {item:g}.')
    if (array == neutral).all():
      return None
    return jnp.asarray(np.broadcast_to(array, (batch,)), dtype)

  return Sampling(
    rows(
      'temperature',
      temperature,
      jnp.float32,
      lambda t: t == 0 or t >= 1e-6,
      0,
      '>= 0',
    ),
    rows(
      'top_k',
      top_k,
      jnp.int32,
      lambda k: 0 <= k < 2**31 and k == int(k),
      0,
      'a whole number >= 0 (0 keeps all)',
    ),
    rows('top_p', top_p, jnp.float32, lambda p: 1e-6 <= p <= 1, 1, 'in (0, 1]'),
    rows('min_p', min_p, jnp.float32, lambda p: 0 <= p < 1, 0, 'in [0, 1)'),
    rows(
      'repetition_penalty',
      repetition_penalty,
      jnp.float32,
      lambda r: r >= 1e-6,
      1,
      '> 0 (1 is none)',
    ),
  )


def is_greedy(sampling: Sampling) -> bool:
  """Whether every row is known to be greedy when the program is compiled."""
  return sampling.temperature is None


def penalized(
  logits: jax.Array,  # [B, T, V]
  sampling: Sampling,
  seen: jax.Array | None = None,  # [B, T, V] bool
) -> jax.Array:
  """Logits of which a greedy row takes the arg max: [B, T, V] float32.

  Args:
    logits: Scores of the model.
    sampling: Settings of every row.
    seen: Tokens that occur before each position, for the repetition penalty
      (arXiv 1909.05858): positive logits are divided by it, others multiplied.
  """
  logits = logits.astype(jnp.float32)
  if sampling.repetition_penalty is None:
    return logits
  penalty = sampling.repetition_penalty[:, None, None]
  scaled = jnp.where(logits > 0, logits / penalty, logits * penalty)
  return jnp.where(seen, scaled, logits)


def processed_logits(
  logits: jax.Array,  # [B, T, V]
  sampling: Sampling,
  seen: jax.Array | None = None,  # [B, T, V] bool
) -> jax.Array:
  """Log-weights of the distribution that row b samples from: [B, T, V] float32.

  Tokens outside it have -inf. A greedy row gives an exact point mass on its
  arg max, and not the limit of a small temperature. Arguments are those of
  `penalized`.
  """
  logits = penalized(logits, sampling, seen)
  best = arg_max(logits)[..., None]
  token = jnp.arange(logits.shape[-1])
  point_mass = jnp.where(token == best, 0.0, -jnp.inf)
  if is_greedy(sampling):
    return point_mass
  temperature = sampling.temperature[:, None, None]
  greedy = temperature == 0
  logits = logits / jnp.where(greedy, 1.0, temperature)
  if sampling.top_k is not None:
    logits = _keep_top_k(logits, sampling.top_k[:, None, None])
  if sampling.top_p is not None:
    logits = _keep_top_p(logits, sampling.top_p[:, None, None])
  if sampling.min_p is not None:
    threshold = (
      logits.max(-1, keepdims=True) + jnp.log(sampling.min_p)[:, None, None]
    )
    logits = jnp.where(logits < threshold, -jnp.inf, logits)
  return jnp.where(greedy, point_mass, logits)


def seen_tokens(
  tokens: jax.Array,  # [B, N] int32
  length: jax.Array,  # [B] int32
  vocab_size: int,
) -> jax.Array:
  """Which tokens occur in the first `length[b]` of row b: [B, V] bool."""
  live = jnp.arange(tokens.shape[1]) < length[:, None]
  target = jnp.where(live, tokens, vocab_size)
  mark = lambda row: jnp.zeros(vocab_size, bool).at[row].set(True, mode='drop')
  return jax.vmap(mark)(target)


def row_keys(seed: int, rows: jax.Array) -> jax.Array:
  """A key for every row id in `rows` [B]: typed keys [B]."""
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def position_keys(
  keys: jax.Array,  # [B] typed keys
  positions: jax.Array,  # [B, T] int32
  purpose: Purpose,
  start: jax.Array | None = None,  # [B] int32
) -> jax.Array:
  """The key of every (row, position, purpose): typed keys [B, T].

  Noise of drafts and accept tests is drawn anew by every round: `start` is the
  position where the round begins. A rule that weighs a whole block learns about
  the noise behind the prefix that it keeps, and the next round, which begins
  there, would be biased if it met the same noise again.
  """

  def one(key, position, start):
    key = jax.random.fold_in(jax.random.fold_in(key, position), int(purpose))
    return key if start is None else jax.random.fold_in(key, start)

  row = jax.vmap(one, (None, 0, None))
  return jax.vmap(row, (0, 0, None if start is None else 0))(
    keys, positions, start
  )


def draw(
  keys: jax.Array,  # [B, T] typed keys
  logits: jax.Array,  # [B, T, V] processed
) -> jax.Array:
  """A token of softmax(logits) at every position, as an arg max: [B, T] int32.

  The token is arg max(logits + g) with g standard Gumbel noise that depends on
  the key alone. Two models that draw with one key are coupled: they agree as
  often as position-keyed noise allows (arXiv 2408.07978).
  """
  vocab_size = logits.shape[-1]
  noise = jax.vmap(
    jax.vmap(lambda key: jax.random.gumbel(key, (vocab_size,), mode='high'))
  )
  return arg_max(logits + noise(keys))


# Columns that one maximum is taken of; see `arg_max`.
_COLUMNS = 512


def arg_max(x: jax.Array) -> jax.Array:
  """`jnp.argmax` of x [..., V], without NaN, over its last axis: [...] int32.

  XLA carries a number and its place through all of V one by one, on a CPU ten
  times as slowly as a maximum alone. So maxima of groups of columns are taken,
  and places are looked for among those, and in the one group that wins.
  """
  columns = math.gcd(x.shape[-1], _COLUMNS)
  groups = x.reshape(*x.shape[:-1], -1, columns)
  group = jnp.argmax(groups.max(axis=-1), axis=-1, keepdims=True)
  winner = jnp.take_along_axis(groups, group[..., None], axis=-2)[..., 0, :]
  place = group[..., 0] * columns + jnp.argmax(winner, axis=-1)
  return place.astype(jnp.int32)


def _keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
  vocab_size = logits.shape[-1]
  top_k = jnp.where(top_k == 0, vocab_size, jnp.minimum(top_k, vocab_size))
  count = lambda keep: keep.sum(-1, keepdims=True)
  threshold = _largest_threshold(logits, lambda keep: count(keep) >= top_k)
  return jnp.where(logits < threshold, -jnp.inf, logits)


def _keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
  probs = jax.nn.softmax(logits, axis=-1)
  mass = lambda keep: jnp.where(keep, probs, 0.0).sum(-1, keepdims=True)
  # Rounding can leave the whole mass below top_p, or lose the smallest.
  most = jnp.minimum(top_p, mass(jnp.full(probs.shape, True)))
  threshold = _largest_threshold(probs, lambda keep: mass(keep) >= most)
  return jnp.where((probs < threshold) & (top_p < 1), -jnp.inf, logits)


def _largest_threshold(values: jax.Array, enough) -> jax.Array:
  """Largest t with `enough(values >= t)`, by bisection on the bits of float32.

  32 passes over the vocabulary find the exact value, where a sort of it would
  cost far more. `enough` must hold for the smallest value and be monotone.
  """
  ordered = _sortable(values)
  shape = (*values.shape[:-1], 1)
  low = jnp.full(shape, _sortable(jnp.float32(-jnp.inf)), jnp.int32)
  high = jnp.full(shape, _sortable(jnp.float32(jnp.inf)), jnp.int32)

  def halve(_, bounds):
    low, high = bounds
    # The mean rounded up without overflow.
    middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
    fits = enough(ordered >= middle)
    return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

  low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
  return _from_sortable(low)


def _sortable(x: jax.Array) -> jax.Array:
  """Maps float32 to int32 so that the order stays."""
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
  return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _from_sortable(bits: jax.Array) -> jax.Array:
  bits = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
