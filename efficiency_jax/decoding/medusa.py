"""Medusa: a few more heads on the target guess tokens further ahead.

Head k = 1 .. K looks at the hidden state h_t from which the target predicts
token t + 1, and guesses token t + 1 + k (arXiv 2401.10774, section 2.2.1):

    p_k = softmax(W_k x_k),    x_k = h_t + silu(h_t V_k),    V_k [D, D]

V_k begins as zeros and W_k as the target's output head, so that every head
begins as the target's own guess at token t + 1. `Heads` says what W_k is: one
of its own as in the paper; the target's own, which leaves only V_k to be
trained and stored; or that with a correction of low rank.

The guesses fill a tree, node by node: the node at depth k with rank r among its
siblings holds the r-th best guess of head k, whatever its parent holds. The
target then reads the whole tree in one pass.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.decoding.drafters import Forecast
from efficiency_jax.decoding.token_tree import TokenTree
from efficiency_jax.decoding.token_tree import chain
from efficiency_jax.decoding.verifiers import Proposal
from efficiency_jax.linear import linear
from efficiency_jax.types import Params

# Parameters and hidden states [..., D] to logits [..., V]: the target's head.
OutputHead = Callable[[Params, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heads:
  """The form of the heads; hashable.

  Attributes:
    count: K, how many; head k guesses the k-th token after the next one.
    blocks: Residual blocks of a head, at least one.
    own: Whether each head has an output head of its own. Then its parameters
      are as large as the target's output head.
    rank: Rank of a correction to the shared output head; 0 is none.
  """

  count: int = 4
  blocks: int = 1
  own: bool = False
  rank: int = 0

  def __post_init__(self):
    if self.count < 1 or self.blocks < 1 or self.rank < 0:
      raise ValueError(
        'count and blocks must be >= 1 and rank >= 0, got'
        f' {self.count}, {self.blocks}, {self.rank}.'
      )
    if self.own and self.rank:
      raise ValueError('a head of its own needs no correction: rank must be 0.')


def init(
  heads: Heads, key: jax.Array, width: int, vocab_size: int, table: Params
) -> Params:
  """Heads that all guess what the target guesses next.

  Args:
    heads: Their form.
    key: Of the factor of a low-rank correction that does not begin as zeros.
    width: D.
    vocab_size: V.
    table: The parameters that the target's output head reads, as a tree of its
      own: copied for heads that have one.
  """
  params = {}
  for k in range(heads.count):
    one: dict[str, Any] = {
      f'block_{i}': {'kernel': jnp.zeros((width, width))}
      for i in range(heads.blocks)
    }
    if heads.own:
      one['output'] = jax.tree.map(jnp.array, table)
    if heads.rank:
      down = jax.random.normal(jax.random.fold_in(key, k), (width, heads.rank))
      one['down'] = {'kernel': down * width**-0.5}
      one['up'] = {'kernel': jnp.zeros((heads.rank, vocab_size))}
    params[f'head_{k}'] = one
  return params


def logits(
  heads: Heads,
  params: Params,
  hidden: jax.Array,  # [..., D]
  output_head: OutputHead,
  target: Params,
) -> jax.Array:
  """What each head thinks of the token it guesses: [..., K, V] float32.

  Heads that `init` made give the target's own logits, to the last bit of a
  product of the same shape.
  """
  own = [params[f'head_{k}'] for k in range(heads.count)]

  def blocks(x, one):
    for i in range(heads.blocks):
      x = x + jax.nn.silu(linear(x, one[f'block_{i}']['kernel']))
    return x

  states = jnp.stack([blocks(hidden, one) for one in own], axis=-2)
  if heads.own:
    scores = [
      output_head(one['output'], states[..., k, :]) for k, one in enumerate(own)
    ]
    return jnp.stack(scores, axis=-2)
  # One product for all heads: it reads the table once.
  scores = output_head(target, states)
  if heads.rank:
    corrections = [
      linear(
        linear(states[..., k, :], one['down']['kernel']), one['up']['kernel']
      )
      for k, one in enumerate(own)
    ]
    scores = scores + jnp.stack(corrections, axis=-2).astype(scores.dtype)
  return scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedHeads:
  """Heads of one target, and the trees that suit them.

  Attributes:
    form: Of the heads.
    params: Their parameters.
    trees: Shapes of drafts to choose from, each of another size.
  """

  form: Heads
  params: Params
  trees: tuple[TokenTree, ...]

  @property
  def weights(self) -> Params:
    """What `drafters.Weights.draft` holds."""
    return self.params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medusa:
  """The drafter: guesses of the heads on a tree; see `drafters`.

  Its state is the hidden state of each row that the next guesses come from. The
  draft is deterministic, so sampled text is verified as on any deterministic
  draft.

  Attributes:
    heads: Form of the heads, whose parameters are the draft's.
    output_head: The target's head, on the target's parameters.
    trees: Shapes of drafts; a draft of n tokens has the tree of n + 1 nodes.
  """

  heads: Heads
  output_head: OutputHead
  trees: tuple[TokenTree, ...]
  name: str = 'medusa'
  num_kinds: int = 1
  needs_features: bool = True

  def __post_init__(self):
    sizes = [len(tree) for tree in self.trees]
    if not sizes or len(set(sizes)) < len(sizes):
      raise ValueError(f'trees must differ in size, got sizes {sizes}.')
    for tree in self.trees:
      if tree.height > self.heads.count:
        raise ValueError(
          f'a tree of height {tree.height} needs as many heads, got'
          f' {self.heads.count}.'
        )

  def tree(self, length: int) -> TokenTree:
    """The tree of `length + 1` nodes."""
    if length == 0:
      return chain(0)
    for tree in self.trees:
      if len(tree) == length + 1:
        return tree
    lengths = [len(tree) - 1 for tree in self.trees]
    raise ValueError(f'no tree has {length} tokens: there are {lengths}.')

  def init(self, weights, context, longest, hidden):
    """The state before the last token of the prompt, zeros if it has one."""
    del weights, longest
    before = jnp.maximum(context.length - 2, 0)[:, None, None]
    state = jnp.take_along_axis(hidden, before, axis=1)[:, 0]
    return jnp.where(context.length[:, None] > 1, state, 0)

  def propose(self, weights, state, cache, context, length, purpose):
    """The best guesses, each where the tree has a place for it."""
    del context, purpose
    tree = self.tree(length)
    # A lower tree asks fewer heads.
    asked = dataclasses.replace(self.heads, count=tree.height)
    scores = logits(
      asked, weights.draft, state, self.output_head, weights.target
    )
    most = int(tree.rank.max()) + 1
    _, best = lax.top_k(scores, most)  # [B, height, most]
    tokens = best[:, tree.depth[1:] - 1, tree.rank[1:]].astype(jnp.int32)
    count = jnp.full(tokens.shape[:1], length, jnp.int32)
    return Proposal(tokens, count, None), state, cache

  def observe(self, state, context, longest, features):
    """The state of the last position that was read and kept."""
    zero = jnp.zeros_like(context.length)
    if features is not None:
      last = jnp.maximum(features.count - 1, 0)[:, None, None]
      new = jnp.take_along_axis(features.hidden, last, axis=1)[:, 0]
      state = jnp.where(features.count[:, None] > 0, new, state)
    return state, Forecast(zero + longest, zero)
