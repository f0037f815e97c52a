"""Shapes of draft trees for a trained draft, from texts it was not trained on.

Half of the held-out texts say how often each path of guesses is right; trees
are grown on them, and judged on the other half.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from efficiency_jax.decoding import token_tree
from efficiency_jax.training import objectives

# Of `batch=`, arrays of some rows, to places [B, T, K] and a mask [B, T]; see
# `eagle_training.ranks`.
RanksFn = Callable[..., tuple[jax.Array, jax.Array]]

COLUMNS = {
  'method': 'tree',
  'nodes': 'nodes',
  'height': 'height',
  'expected': 'tokens a run, other half',
  'fitted': 'tokens a run, own half',
}


def calibrated(
  ranks: RanksFn,
  arrays: Mapping[str, np.ndarray],
  config: ml_collections.ConfigDict,
) -> tuple[
  tuple[token_tree.TokenTree, ...],
  tuple[np.ndarray, np.ndarray],
  list[dict[str, Any]],
]:
  """Trees from held-out texts, what they were grown on, and their table.

  Args:
    ranks: Of the trained draft, its parameters bound, among its `most` guesses.
    arrays: Of held-out texts.
    config: `tree_nodes`, `tree_choices` and `training.batch`.

  Returns:
    The trees and the table of `trees`, and between them `places`.
  """
  ranks = functools.partial(ranks, most=config.tree_choices)
  found = places(ranks, arrays, config.training.batch)
  chosen, rows = trees(found, config.tree_nodes, config.tree_choices)
  return chosen, found, rows


def places(
  ranks: RanksFn, arrays: Mapping[str, np.ndarray], batch: int
) -> tuple[np.ndarray, np.ndarray]:
  """Places of the right tokens in each half of the rows: two [n, K]."""
  halves = [], []
  compute = jax.jit(lambda part: ranks(batch=objectives.widened(part)))
  for start in range(0, len(arrays['tokens']), batch):
    part = {k: v[start : start + batch] for k, v in arrays.items()}
    found, mask = map(np.asarray, compute(part))
    for row in range(len(found)):
      halves[(start + row) % 2].append(found[row][mask[row]])
  return np.concatenate(halves[0]), np.concatenate(halves[1])


def accuracies(found: np.ndarray, most: int) -> np.ndarray:
  """How often choice r at the k-th token is right: [K, most].

  It counts every position, right or wrong before.
  """
  choices = np.arange(most)
  return (found[:, :, None] == choices).mean(axis=0)


def trees(
  halves: tuple[np.ndarray, np.ndarray],
  nodes: Sequence[int],
  most: int,
) -> tuple[tuple[token_tree.TokenTree, ...], list[dict]]:
  """For each size the tree of the most joint worth, and a table.

  Args:
    halves: From `places`.
    nodes: Sizes of trees, the root counted.
    most: Choices a node may have.

  Returns:
    The trees grown on the first half, and a row for each size and kind: chain,
    tree of independent accuracies, tree of joint ones.
  """
  own, other = halves
  height = own.shape[1]
  worth, judged = token_tree.joint(own), token_tree.joint(other)
  alone = token_tree.independent(accuracies(own, most))
  chosen, rows = {}, []
  for size in nodes:
    kinds = {
      'chain': token_tree.chain(min(size - 1, height)),
      'independent': token_tree.grow(alone, size - 1, most, height),
      'joint': token_tree.grow(worth, size - 1, most, height),
    }
    chosen[len(kinds['joint'])] = kinds['joint']
    rows += [
      {
        'method': name,
        'baseline': None,
        'nodes': size,
        'height': tree.height,
        'expected': token_tree.expected_tokens(tree, judged),
        'fitted': token_tree.expected_tokens(tree, worth),
      }
      for name, tree in kinds.items()
    ]
  return tuple(chosen.values()), rows
