"""Trees of draft tokens: several guesses at each place, verified in one pass.

    node      0 ── 1 ── 3          0 is the last committed token
              │    └─── 4          1, 2 guess the next one, 3, 4, 5 the second
              └─── 2 ── 5          a node sees itself and its ancestors

The shape is known before anything is compiled: numbers of numpy. Nodes stand in
an order in which parents come before children. A chain, the ordinary draft, is
the tree without branches (SpecInfer, arXiv 2305.09781; Medusa, 2401.10774).
Trees whose shape only the draft tells are those of `dynamic_tree`.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import heapq
import operator

import jax
import jax.numpy as jnp
import numpy as np

# Which choice to take at each step from the root: (0, 2) is the third best
# guess at the second token, after the best guess at the first.
Path = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TokenTree:
  """A shape of N nodes; hashable.

  Attributes:
    parents: Parent of each node; -1 of node 0, the root.
  """

  parents: tuple[int, ...]

  def __post_init__(self):
    if not self.parents or self.parents[0] != -1:
      raise ValueError(f'node 0 must have parent -1, got {self.parents[:1]}.')
    for node, parent in enumerate(self.parents[1:], 1):
      if not 0 <= parent < node:
        raise ValueError(
          f'the parent of node {node} must be one of the nodes'
          f' before it, got {parent}.'
        )

  def __len__(self) -> int:
    return len(self.parents)

  @functools.cached_property
  def ancestors(self) -> np.ndarray:
    """Whether node j is node i or an ancestor of it: [N, N] bool."""
    found = np.eye(len(self), dtype=bool)
    for node, parent in enumerate(self.parents[1:], 1):
      found[node] |= found[parent]
    return found

  @functools.cached_property
  def depth(self) -> np.ndarray:
    """Steps from the root to each node: [N] int."""
    return self.ancestors.sum(axis=1) - 1

  @property
  def height(self) -> int:
    """Depth of the deepest node: tokens that a round may accept."""
    return int(self.depth.max())

  @functools.cached_property
  def rank(self) -> np.ndarray:
    """Place of each node among its siblings: [N] int."""
    rank = np.zeros(len(self), int)
    born = np.zeros(len(self), int)
    for node, parent in enumerate(self.parents[1:], 1):
      rank[node] = born[parent]
      born[parent] += 1
    return rank

  @functools.cached_property
  def is_inner(self) -> np.ndarray:
    """Whether a node has children: [N] bool."""
    return np.isin(np.arange(len(self)), self.parents)

  @functools.cached_property
  def paths(self) -> np.ndarray:
    """The way from the root to each node: [N, height + 1] int.

    Beyond the node it goes on over first children, and stays at the last.
    """
    paths = np.zeros((len(self), self.height + 1), int)
    for node in range(len(self)):
      way = [node]
      while way[0]:
        way.insert(0, self.parents[way[0]])
      while len(way) <= self.height:
        last = way[-1]
        way.append(self.parents.index(last) if self.is_inner[last] else last)
      paths[node] = way
    return paths

  def at_parents(self, values: jax.Array) -> jax.Array:
    """Values [B, N, ...] at the parent of each draft token: [B, N - 1, ...]."""
    return values[:, np.asarray(self.parents[1:], int)]

  def has_children(self, node: jax.Array) -> jax.Array:
    """Whether node `node[b]` has children: [B] bool."""
    return jnp.asarray(self.is_inner)[node]

  def path_to(self, node: jax.Array) -> jax.Array:
    """The row of `paths` of node `node[b]`: [B, height + 1] int32."""
    return jnp.asarray(self.paths, jnp.int32)[node]

  @property
  def is_chain(self) -> bool:
    """Whether no node has two children."""
    return len(self) == self.height + 1

  @property
  def choices(self) -> list[Path]:
    """The path of choices to each node but the root."""
    ways = {0: ()}
    for node, parent in enumerate(self.parents[1:], 1):
      ways[node] = (*ways[parent], int(self.rank[node]))
    return list(ways.values())[1:]


@functools.cache
def chain(length: int) -> TokenTree:
  """The tree without branches: `length` tokens, one after another."""
  return TokenTree(tuple(range(-1, length)))


def from_choices(choices: Iterable[Sequence[int]]) -> TokenTree:
  """The tree of these paths, in the notation of Medusa's released trees.

  Raises:
    ValueError: A path is empty, stands twice, or its parent or elder sibling is
      missing: the choices of a node's children are 0, 1, 2, ...
  """
  choices = sorted((tuple(c) for c in choices), key=lambda c: (len(c), c))
  nodes, parents = {(): 0}, [-1]
  for path in choices:
    if not path or path in nodes:
      raise ValueError(f'path {path} is empty or stands twice.')
    above, choice = path[:-1], path[-1]
    needed = (*above, choice - 1) if choice else above
    if above not in nodes or needed not in nodes:
      raise ValueError(f'path {path} needs {needed}, which is not in the tree.')
    nodes[path] = len(nodes)
    parents.append(nodes[above])
  return TokenTree(tuple(parents))


def grow(
  worth: Callable[[Path], float], nodes: int, most_choices: int, height: int
) -> TokenTree:
  """The `nodes` draft tokens with the most worth, parents with their children.

  `worth(path)` is the chance that all guesses of the path are right, so that
  the sum over the tree is the expected number of accepted tokens. Where it does
  not rise from parent to child, nor from one choice to the next, taking the
  best neighbour again and again is optimal; a rise is cut off.
  """
  if nodes < 1 or most_choices < 1 or height < 1:
    raise ValueError(
      'nodes, most_choices and height must be >= 1, got'
      f' {nodes}, {most_choices}, {height}.'
    )
  taken: list[Path] = []
  border = [(-worth((0,)), (0,))]
  while border and len(taken) < nodes:
    bound, path = heapq.heappop(border)
    taken.append(path)
    neighbours = []
    if path[-1] + 1 < most_choices:
      neighbours.append((*path[:-1], path[-1] + 1))
    if len(path) < height:
      neighbours.append((*path, 0))
    for neighbour in neighbours:
      heapq.heappush(border, (max(-worth(neighbour), bound), neighbour))
  return from_choices(taken)


def independent(accuracies: np.ndarray) -> Callable[[Path], float]:
  """Worth of a path if its guesses were right or wrong independently.

  `accuracies[k, r]` is the chance that choice r at the k-th token is right: the
  product of Medusa's calibration (arXiv 2401.10774, section 2.3.3).
  """
  accuracies = np.asarray(accuracies, float)
  return lambda path: float(
    np.prod([accuracies[k, r] for k, r in enumerate(path)])
  )


def joint(ranks: np.ndarray) -> Callable[[Path], float]:
  """Worth of a path as counted: no independence is assumed.

  `ranks[i, k]` is the place of the right k-th token among the guesses at it, in
  calibration example i, or anything below 0 if it is not among them.
  """
  counts: dict[Path, int] = {}
  for row in np.asarray(ranks):
    path: Path = ()
    for rank in map(operator.index, row):
      if rank < 0:
        break
      path = (*path, rank)
      counts[path] = counts.get(path, 0) + 1
  return lambda path: counts.get(path, 0) / max(len(ranks), 1)


def expected_tokens(tree: TokenTree, worth: Callable[[Path], float]) -> float:
  """Tokens a round: those accepted, and the one of the target."""
  return 1.0 + sum(map(worth, tree.choices))
