"""Processed logits against sorting in float64; keys; checks of arguments."""

import itertools

import chex
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import sampling
from tests import fixtures

_ROWS = 32
_VOCAB = 13


def _processed(logits, settings, seen=None):
  q = jax.jit(sampling.processed_logits)(logits, settings, seen)
  return np.asarray(jax.nn.softmax(q)), np.asarray(q)


@hypothesis.given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_processed_logits_are_those_of_a_sort(seed, ties):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(_ROWS, 2, _VOCAB)) * 3
  if ties:
    logits = np.round(logits)
  logits = logits.astype(np.float32)
  pick = lambda *values: rng.choice(values, _ROWS)
  # Top-p values that no cumulative sum of round logits meets exactly.
  fields = {
    'temperature': pick(0.0, 1.0, 0.3, 2.5),
    'top_k': pick(0, 1, 3, _VOCAB - 1, _VOCAB, _VOCAB + 5),
    'top_p': pick(1.0, 0.91234, 0.50123, 1e-6),
    'min_p': pick(0.0, 0.05123, 0.70001),
    'repetition_penalty': pick(1.0, 1.3, 0.8),
  }
  seen = rng.random((_ROWS, 2, _VOCAB)) < 0.3
  settings = sampling.make(_ROWS, **fields)
  probs, q = _processed(jnp.asarray(logits), settings, jnp.asarray(seen))
  assert not np.isnan(q).any()
  for row, place in itertools.product(range(_ROWS), range(2)):
    one = {k: v[row] for k, v in fields.items()}
    one['penalty'] = one.pop('repetition_penalty')
    expected = fixtures.processed_probabilities(
      logits[row, place], seen=np.flatnonzero(seen[row, place]), **one
    )
    np.testing.assert_allclose(
      probs[row, place], expected, atol=2e-6, err_msg=f'{one}'
    )


def test_every_filter_alone_and_none():
  logits = jnp.asarray([[[2.0, 1.0, 1.0, 0.0, -3.0]]])
  kept = lambda **fields: np.isfinite(
    _processed(logits, sampling.make(1, temperature=1.0, **fields))[1]
  )[0, 0].tolist()
  yes, no = True, False
  assert kept() == [yes] * 5
  assert kept(top_k=1) == [yes, no, no, no, no]
  # Ties at a threshold are kept.
  assert kept(top_k=2) == kept(top_k=3) == [yes, yes, yes, no, no]
  assert kept(top_k=5) == kept(top_k=99) == [yes] * 5
  assert kept(top_p=0.5) == [yes, no, no, no, no]
  assert kept(top_p=0.6) == [yes, yes, yes, no, no]
  assert kept(top_p=0.9999) == kept(top_p=1.0) == [yes] * 5
  assert kept(min_p=0.2) == [yes, yes, yes, no, no]
  assert kept(min_p=0.999) == [yes, no, no, no, no]
  # exp(-1) / 1 is the ratio of the second to the first.
  assert kept(min_p=0.38) == [yes, no, no, no, no]


def test_top_p_one_keeps_all_of_a_large_vocabulary():
  # In float32 the mass is whole before the smallest probabilities count.
  logits = jax.random.normal(jax.random.key(0), (2, 1, 4000)) * 4
  settings = sampling.make(2, temperature=1.0, top_p=[1.0, 0.5])
  kept = np.isfinite(_processed(logits, settings)[1]).sum((1, 2))
  assert kept[0] == 4000
  assert kept[1] < 4000


@hypothesis.given(
  size=st.sampled_from([1, 13, 512, 1000, 1536]),
  values=st.integers(1, 5),
  special=st.sampled_from([0.0, -np.inf, np.inf]),
  seed=st.integers(0, 10**6),
)
def test_the_arg_max_is_the_first_of_the_largest(size, values, special, seed):
  rng = np.random.default_rng(seed)
  x = rng.integers(0, values, (2, 3, size)).astype(np.float32)
  x[0, :, rng.integers(size)] = special
  found = sampling.arg_max(jnp.asarray(x))
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, x.argmax(-1))


def test_greedy_rows_are_exact_point_masses():
  logits = jax.random.normal(jax.random.key(0), (3, 4, 7))
  settings = sampling.make(3, temperature=[0.0, 1.0, 0.0], top_k=3)
  best = np.asarray(logits).argmax(-1)
  mass = np.where(np.arange(7) == best[..., None], 0.0, -np.inf)
  _, q = _processed(logits, settings)
  np.testing.assert_array_equal(q[[0, 2]], mass[[0, 2]])
  assert (np.isfinite(q[1]).sum(-1) == 3).all()
  _, q = _processed(logits, sampling.GREEDY)
  np.testing.assert_array_equal(q, mass)
  # The first of equal scores, like an arg max.
  _, q = _processed(jnp.zeros((3, 1, 7)), settings)
  assert np.isfinite(q[0, 0]).tolist() == [True] + [False] * 6


def test_the_penalty_also_changes_the_greedy_choice():
  logits = jnp.asarray([[[2.0, 1.9, -1.0]]])
  settings = sampling.make(1, repetition_penalty=1.5)
  assert sampling.is_greedy(settings)
  seen = jnp.asarray([[[True, False, False]]])
  _, q = _processed(logits, settings, seen)
  assert q.argmax() == 1


def test_seen_tokens_are_those_before_the_length():
  tokens = jnp.asarray([[3, 1, 3, 4], [0, 2, 2, 2]])
  seen = sampling.seen_tokens(tokens, jnp.asarray([3, 1]), 5)
  assert np.asarray(seen).astype(int).tolist() == [
    [0, 1, 0, 1, 0],
    [1, 0, 0, 0, 0],
  ]


def test_settings_that_do_nothing_are_compiled_away():
  assert sampling.make(4) == sampling.GREEDY
  settings = sampling.make(2, temperature=1.0, top_k=[0, 0], top_p=[1.0, 0.5])
  assert settings.top_k is None
  assert settings.min_p is None
  assert settings.top_p.tolist() == [1.0, 0.5]
  chex.assert_shape(settings.temperature, (2,))


@pytest.mark.parametrize(
  ('name', 'value'),
  [
    ('temperature', -0.1),
    ('temperature', float('nan')),
    ('temperature', float('inf')),
    ('temperature', [1.0, -1.0]),
    ('top_k', -1),
    ('top_k', 1.5),
    ('top_k', 2**31),
    ('top_p', 0.0),
    ('top_p', 1.01),
    ('top_p', float('nan')),
    ('min_p', 1.0),
    ('min_p', -0.1),
    ('repetition_penalty', 0.0),
  ],
)
def test_settings_out_of_range_are_refused_by_name(name, value):
  with pytest.raises(ValueError, match=f'{name} must be'):
    sampling.make(2, **{name: value})


@pytest.mark.parametrize('value', [[1.0], [1.0] * 3, [[1.0, 1.0]]])
def test_a_wrong_number_of_rows_is_refused(value):
  with pytest.raises(ValueError, match='one value or one for each of 2'):
    sampling.make(2, temperature=value)


def _bits(*arguments):
  return np.asarray(jax.random.key_data(sampling.position_keys(*arguments)))


def test_keys_depend_on_row_position_and_purpose_alone():
  rows = jnp.asarray([7, 2, 5])
  keys = sampling.row_keys(0, rows)
  places = jnp.asarray([[4, 5], [9, 10], [4, 5]])
  purpose = sampling.Purpose.SAMPLE
  batch = _bits(keys, places, purpose)
  alone = _bits(sampling.row_keys(0, rows[1:2]), places[1:2], purpose)
  np.testing.assert_array_equal(batch[1:2], alone)
  # The same place in a wider block.
  wide = _bits(keys, places[:, :1] + jnp.arange(-1, 6), purpose)
  np.testing.assert_array_equal(wide[:, 1:3], batch)


def test_no_two_uses_share_a_key():
  keys = sampling.row_keys(0, jnp.arange(3))
  places = jnp.tile(jnp.arange(20)[None], (3, 1))
  found = [_bits(keys, places, purpose) for purpose in sampling.Purpose]
  for purpose in (sampling.Purpose.DRAFT, sampling.Purpose.ACCEPT):
    for start in range(4):
      found.append(_bits(keys, places, purpose, jnp.full((3,), start)))
  found.append(
    np.asarray(jax.random.key_data(sampling.row_keys(1, jnp.arange(60))))
  )
  found = np.concatenate([x.reshape(-1, 2) for x in found])
  assert len(np.unique(found, axis=0)) == len(found)


def test_draws_have_the_law_of_the_logits():
  count = 40_000
  logits = jnp.log(jnp.asarray([0.5, 0.0, 0.3, 0.15, 0.05]))
  keys = sampling.row_keys(0, jnp.arange(count))[:, None]
  tokens = sampling.draw(keys, jnp.broadcast_to(logits, (count, 1, 5)))
  seen = np.bincount(np.asarray(tokens)[:, 0], minlength=5)
  law = np.asarray([0.5, 0.0, 0.3, 0.15, 0.05])
  # Four sigma of a binomial count.
  bound = 4 * np.sqrt(count * law * (1 - law))
  assert (np.abs(seen - count * law) <= bound).all()


def test_one_key_couples_two_laws():
  count = 2000
  keys = sampling.row_keys(0, jnp.arange(count))[:, None]
  p = jax.random.normal(jax.random.key(1), (1, 1, 9))
  q = p + 0.1 * jax.random.normal(jax.random.key(2), (1, 1, 9))
  widen = lambda x: jnp.broadcast_to(x, (count, 1, 9))
  same = sampling.draw(keys, widen(p)) == sampling.draw(keys, widen(q))
  overlap = float(jnp.minimum(jax.nn.softmax(p), jax.nn.softmax(q)).sum())
  # Independent draws would agree about one time in five.
  assert overlap - 0.1 < float(same.mean()) < 1.0
