"""Nothing is lost or doubled, documents stay apart, and runs can go on."""

import collections
import itertools
import json
import math

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from efficiency_jax.data import packing

pytestmark = pytest.mark.short


def _documents(sizes):
  """Documents of which no two tokens are the same, counted from 1."""
  ends = list(itertools.accumulate(sizes))
  return [np.arange(end - size, end) + 1 for end, size in zip(ends, sizes)]


_SIZES = (3, 1, 20, 7, 7, 2, 5, 16, 4, 9, 1, 12, 30, 8, 2, 6, 11, 3, 10, 6)


def _batches(**options):
  plain = {'batch_size': 4, 'length': 8, 'seed': 0, 'epochs': 1}
  return packing.batches(_documents(_SIZES), **{**plain, **options})


def _segments(packed):
  """The token ids of every segment of every row."""
  return [
    tuple(row[marks == mark].tolist())
    for row, marks in zip(packed['tokens'], packed['segments'])
    for mark in range(1, marks.max(initial=0) + 1)
  ]


def _equal(left, right):
  return left.keys() == right.keys() and all(
    np.array_equal(left[key], right[key]) for key in left
  )


@hypothesis.given(
  sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
  length=st.integers(2, 16),
)
def test_segments_are_the_documents_cut_at_the_length(sizes, length):
  documents = _documents(sizes)
  packed = packing.pack(documents, length)
  expected = [
    tuple(document[i : i + length].tolist())
    for document in documents
    for i in range(0, len(document), length)
  ]
  assert sorted(_segments(packed)) == sorted(expected)
  # Segments are numbered 1, 2, ... without holes, and padding comes last.
  for marks in packed['segments']:
    steps = np.diff(np.append(marks[marks > 0], 0))
    assert set(steps[:-1].tolist()) <= {0, 1}
    assert marks[0] == 1
    assert not np.any(marks[np.count_nonzero(marks) :])
  padding = packed['segments'] == 0
  assert not packed['tokens'][padding].any()
  assert not packed['loss_mask'][padding].any()
  # Best fit opens a row only where no other has room.
  used = np.count_nonzero(packed['segments'], axis=1)
  assert len(used) == 1 or sorted(used)[0] + sorted(used)[1] > length


def test_best_fit_leaves_the_least_room():
  packed = packing.pack(_documents([2, 5, 3, 6, 3]), 8)
  rows = [
    sorted(collections.Counter(row).values())
    for row in packed['segments'].tolist()
  ]
  assert rows == [[2, 6], [3, 5], [3, 5]]


def test_types_and_shapes():
  packed = packing.pack([[5, 6, 7]], 4)
  assert {name: (a.dtype.name, a.tolist()) for name, a in packed.items()} == {
    'tokens': ('int32', [[5, 6, 7, 0]]),
    'segments': ('int32', [[1, 1, 1, 0]]),
    'loss_mask': ('bool', [[False, True, True, False]]),
  }


def test_prompts_are_not_trained_on_nor_are_first_tokens():
  prompted = packing.Document(
    tokens=np.arange(1, 7), loss_mask=np.array([1, 0, 0, 1, 0, 1])
  )
  packed = packing.pack([prompted, [7, 8, 9]], 4)
  trained = packed['tokens'][packed['loss_mask']]
  # Of 1234 56 789, each begins a segment with 1, 5 and 7.
  assert sorted(trained.tolist()) == [4, 6, 8, 9]


def test_packing_is_the_same_every_time():
  documents = _documents(_SIZES)
  assert _equal(packing.pack(documents, 8), packing.pack(documents, 8))


def test_every_token_occurs_once_an_epoch():
  rows = len(packing.pack(_documents(_SIZES), 8)['tokens'])
  assert rows % 4, 'the last batch should need rows of padding'
  per_epoch = len(list(_batches()))
  every = list(_batches(epochs=3))
  assert len(every) == 3 * per_epoch
  for epoch in range(3):
    tokens = np.concatenate(
      [
        batch['tokens'][batch['segments'] > 0]
        for batch in every[epoch * per_epoch : (epoch + 1) * per_epoch]
      ]
    )
    assert sorted(tokens.tolist()) == list(range(1, sum(_SIZES) + 1))
  assert {batch['tokens'].shape for batch in every} == {(4, 8)}


def test_a_small_source_is_filled_up_with_padding():
  (batch,) = packing.batches([[1, 2]], batch_size=3, length=4, seed=0, epochs=1)
  assert batch['tokens'].shape == (3, 4)
  assert batch['tokens'].sum() == 3
  assert np.count_nonzero(batch['segments']) == 2
  assert np.count_nonzero(batch['loss_mask']) == 1


def _order(batches):
  return [tuple(row.tolist()) for batch in batches for row in batch['tokens']]


def test_seeds_and_epochs_have_orders_of_their_own():
  orders = [_order(_batches(seed=seed)) for seed in range(4)]
  assert len({tuple(order) for order in orders}) == 4
  assert len({tuple(sorted(order)) for order in orders}) == 1
  assert _order(_batches(seed=3)) == orders[3]
  twice = _order(_batches(epochs=2))
  first, second = twice[: len(twice) // 2], twice[len(twice) // 2 :]
  assert first == orders[0]
  assert first != second
  assert sorted(first) == sorted(second)


def test_without_epochs_it_never_ends():
  one = len(list(_batches()))
  some = list(itertools.islice(_batches(epochs=None), 3 * one))
  assert _order(some) == _order(_batches(epochs=3))


@pytest.mark.parametrize(
  'hosts', [{}, {'process_index': 1, 'process_count': 2}]
)
@pytest.mark.parametrize('taken', [0, 1, 3, 9])
def test_a_resumed_iterator_gives_the_same_batches(taken, hosts):
  iterator = iter(_batches(epochs=3, **hosts))
  for _ in range(taken):
    next(iterator)
  # A state is saved as JSON.
  state = json.loads(json.dumps(iterator.get_state()))
  rest = list(iterator)
  resumed = iter(_batches(epochs=3, **hosts))
  next(resumed)
  resumed.set_state(state)
  again = list(resumed)
  assert len(rest) == 3 * len(list(_batches())) - taken
  assert len(again) == len(rest)
  assert all(_equal(left, right) for left, right in zip(rest, again))


@pytest.mark.parametrize('process_count', [2, 4])
def test_hosts_together_make_the_batches_of_one(process_count):
  alone = list(_batches(epochs=2))
  shared = [
    list(_batches(epochs=2, process_index=i, process_count=process_count))
    for i in range(process_count)
  ]
  assert {len(own) for own in shared} == {len(alone)}
  for number, batch in enumerate(alone):
    rows = [own[number]['tokens'] for own in shared]
    assert {part.shape for part in rows} == {(4 // process_count, 8)}
    expected = sorted(batch['tokens'].tolist())
    assert sorted(np.concatenate(rows).tolist()) == expected
    # Disjoint: of all tokens that are not padding, none is with two hosts.
    tokens = [set(part[part > 0].tolist()) for part in rows]
    assert sum(map(len, tokens)) == len(set.union(*tokens))


def test_little_is_padding():
  rng = np.random.default_rng(0)
  sizes = np.minimum(rng.geometric(1 / 200, 2000), 2000).tolist()
  packed = packing.pack(_documents(sizes), 1024)
  least = math.ceil(sum(sizes) / 1024)
  assert len(packed['tokens']) <= least + 1


@pytest.mark.parametrize(
  ('documents', 'length', 'message'),
  [
    ([[1]], 1, 'length must be at least 2, not 1'),
    ([], 4, 'documents must hold at least one'),
    ([[1], []], 4, 'document 1 must be a list of at least one token'),
    ([[[1]]], 4, r'document 0 .* not an array of shape \(1, 1\)'),
    ([[0.5]], 4, 'document 0 must hold token ids'),
    ([[1, -1]], 4, 'document 0 must hold token ids'),
    ([[2**31]], 4, 'document 0 must hold token ids'),
    (
      [packing.Document(tokens=np.ones(2, int), loss_mask=np.ones(3))],
      4,
      r'document 0 has 2 tokens, but a loss_mask of shape \(3,\)',
    ),
  ],
)
def test_wrong_documents_are_refused(documents, length, message):
  with pytest.raises(ValueError, match=message) as caught:
    packing.pack(documents, length)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'length': 1}, 'length must be at least 2'),
    ({'batch_size': 0}, 'batch_size must be a positive multiple'),
    (
      {'batch_size': 3, 'process_count': 2},
      'batch_size must be a positive multiple of process_count 2, not 3',
    ),
    ({'process_index': 1}, 'process_index must be one of 0 to'),
    ({'process_index': -1}, 'process_index must be one of 0 to'),
    ({'process_count': 0}, 'process_index must be one of 0 to'),
    ({'epochs': 0}, 'epochs must be None or at least 1, not 0'),
    ({'seed': -1}, 'seed must be from 0'),
    ({'seed': 2**32}, 'seed must be from 0'),
  ],
)
def test_wrong_numbers_are_refused(options, message):
  with pytest.raises(ValueError, match=message) as caught:
    _batches(**options)
  assert '\n' not in str(caught.value)
