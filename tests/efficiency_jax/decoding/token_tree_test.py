"""Shapes of trees, and which shape is best, against slow search."""

import itertools

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding.token_tree import TokenTree

# The drawing at the head of the module.
_DRAWN = TokenTree((-1, 0, 0, 1, 1, 2))


def test_the_drawn_tree():
  assert _DRAWN.depth.tolist() == [0, 1, 1, 2, 2, 2]
  assert _DRAWN.rank.tolist() == [0, 0, 1, 0, 1, 0]
  assert _DRAWN.is_inner.tolist() == [True, True, True, False, False, False]
  assert _DRAWN.height == 2
  assert not _DRAWN.is_chain
  assert _DRAWN.choices == [(0,), (1,), (0, 0), (0, 1), (1, 0)]
  assert _DRAWN.paths.tolist() == [
    [0, 1, 3],  # on over first children
    [0, 1, 3],
    [0, 2, 5],
    [0, 1, 3],
    [0, 1, 4],
    [0, 2, 5],
  ]
  sees = [np.flatnonzero(row).tolist() for row in _DRAWN.ancestors]
  assert sees == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5]]


@pytest.mark.parametrize('length', [0, 1, 5])
def test_a_chain_is_a_tree_without_branches(length):
  tree = token_tree.chain(length)
  assert tree.is_chain
  assert len(tree) == length + 1
  assert tree.depth.tolist() == list(range(length + 1))
  assert (tree.ancestors == np.tri(length + 1, dtype=bool)).all()
  assert (tree.paths == np.arange(length + 1)).all()
  assert tree is token_tree.chain(length)


@hypothesis.given(st.lists(st.integers(0, 30), max_size=12))
def test_choices_and_parents_tell_the_same_tree(numbers):
  parents = (-1, *(n % (i + 1) for i, n in enumerate(numbers)))
  tree = TokenTree(parents)
  again = token_tree.from_choices(tree.choices)
  assert sorted(again.choices) == sorted(tree.choices)
  assert sorted(again.depth) == sorted(tree.depth)
  for node in range(len(tree)):
    path = tree.paths[node]
    assert path[tree.depth[node]] == node
    steps = itertools.pairwise(path)
    assert all(tree.parents[b] == a or a == b for a, b in steps)


@pytest.mark.parametrize(
  ('parents', 'message'),
  [
    ((), 'node 0 must'),
    ((0,), 'node 0 must'),
    ((-1, 1), 'parent of node 1'),
    ((-1, 0, -1), 'parent of node 2'),
  ],
)
def test_what_is_no_tree_is_refused(parents, message):
  with pytest.raises(ValueError, match=message):
    TokenTree(parents)


@pytest.mark.parametrize('choices', [[()], [(0,), (0,)], [(1,)], [(0, 0)]])
def test_choices_that_are_no_tree_are_refused(choices):
  with pytest.raises(ValueError, match='is empty or stands|which is not in'):
    token_tree.from_choices(choices)


def _slow_best(worth, nodes, most_choices, height):
  """The best expected number of accepted tokens over all trees."""
  paths = [
    path
    for size in range(1, height + 1)
    for path in itertools.product(range(most_choices), repeat=size)
  ]
  best = 0.0
  for chosen in itertools.combinations(paths, nodes):
    chosen = set(chosen)
    if all(len(p) == 1 or p[:-1] in chosen for p in chosen):
      best = max(best, sum(map(worth, chosen)))
  return best


@pytest.mark.parametrize('nodes', [1, 2, 3, 4, 5])
@pytest.mark.parametrize('kind', ['independent', 'joint'])
def test_the_grown_tree_is_the_best_of_all(kind, nodes):
  rng = np.random.default_rng(nodes)
  if kind == 'independent':
    accuracies = np.sort(rng.dirichlet([2, 1, 1], 2), axis=1)[:, ::-1]
    worth = token_tree.independent(accuracies)
  else:
    # Better choices are right more often, whatever came before.
    ranks = rng.choice([0, 0, 0, 0, 1, 1, 2, -1], (4000, 2))
    worth = token_tree.joint(ranks)
  tree = token_tree.grow(worth, nodes, 3, 2)
  assert len(tree) == nodes + 1
  got = token_tree.expected_tokens(tree, worth) - 1
  assert got == pytest.approx(_slow_best(worth, nodes, 3, 2))


def test_joint_worth_counts_whole_paths():
  ranks = [[0, 0], [0, 1], [1, -1], [-1, 0], [0, 0]]
  worth = token_tree.joint(ranks)
  assert worth((0,)) == 3 / 5
  assert worth((1,)) == 1 / 5
  assert worth((0, 0)) == 2 / 5
  assert worth((1, 0)) == 0  # independence would say 1/5 of 3/5
  assert token_tree.independent([[0.6, 0.2], [0.6, 0.2]])((1, 0)) > 0.1


def test_a_tree_grows_no_wider_than_there_are_paths():
  tree = token_tree.grow(lambda path: 0.5 ** len(path), 100, 2, 2)
  assert len(tree) == 1 + 2 + 4
  with pytest.raises(ValueError, match='must be >= 1'):
    token_tree.grow(lambda path: 1.0, 0, 2, 2)
