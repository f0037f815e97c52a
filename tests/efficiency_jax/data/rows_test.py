"""Tests of batches of rows; those of packed documents try more."""

import numpy as np
import pytest

from efficiency_jax.data import rows

pytestmark = pytest.mark.short


def test_an_epoch_has_every_row_once_and_rows_stay_together():
  arrays = {
    'a': np.arange(1, 8, dtype=np.float16),
    'b': 10 * np.arange(1, 8)[:, None] * np.ones((1, 3), int),
  }
  made = list(rows.batches(arrays, batch_size=3, seed=0, epochs=1))
  assert [len(batch['a']) for batch in made] == [3, 3, 3]
  a = np.concatenate([batch['a'] for batch in made])
  b = np.concatenate([batch['b'] for batch in made])
  assert sorted(a.tolist()) == [0, 0, 1, 2, 3, 4, 5, 6, 7]
  np.testing.assert_array_equal(b, 10 * a[:, None] * np.ones((1, 3), int))
  assert a.dtype == np.float16


def test_it_goes_on_from_its_state():
  arrays = {'a': np.arange(10)}
  make = lambda: iter(rows.batches(arrays, batch_size=4, seed=3))
  whole = make()
  expected = [next(whole)['a'].tolist() for _ in range(7)]
  first = make()
  for _ in range(4):
    next(first)
  second = make()
  second.set_state(first.get_state())
  assert [next(second)['a'].tolist() for _ in range(3)] == expected[4:]


@pytest.mark.parametrize(
  'arrays', [{'a': np.zeros(3), 'b': np.zeros(2)}, {'a': np.zeros(0)}, {}]
)
def test_arrays_must_have_rows_and_as_many_each(arrays):
  with pytest.raises(ValueError, match='as many rows each'):
    rows.batches(arrays, batch_size=1, seed=0)
