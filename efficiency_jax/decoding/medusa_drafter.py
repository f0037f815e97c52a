"""Medusa's heads as a drafter: their guesses fill a tree of tokens.

The state of a row is what the target thought at the last position that it read
and kept. From it the heads guess (`medusa`), and the node at depth k with rank
r among its siblings holds the r-th best guess of head k.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding.token_tree import TokenTree
from efficiency_jax.decoding.token_tree import chain
from efficiency_jax.decoding.verifiers import Proposal
from efficiency_jax.linear import embed
from efficiency_jax.types import Params


class State(NamedTuple):
  """What the drafter carries from round to round."""

  hidden: jax.Array  # [B, (1 + F) D], the state that the next guesses come from
  head: Params | None  # of fewer tokens; None is the target's, or their own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Medusa:
  """The drafter: guesses of the heads on a tree; see `drafters`.

  The draft's parameters are those of `medusa.init`, and beside them
  `vocabulary` [R] int32 if the form has one, and perhaps a `head` for it. The
  draft is deterministic, so sampled text is verified as on any deterministic
  draft.

  Attributes:
    heads: Form of the heads, whose parameters are the draft's.
    output_head: The target's head, on the target's parameters.
    trees: Shapes of drafts; a draft of n tokens has the tree of n + 1 nodes.
    least_chance: A chain ends before the first guess that is less likely than
      this to be reached and kept, as the heads with `confidence` see it; the
      tokens beyond are not put forward. Trees are whole.
  """

  heads: medusa.Heads
  output_head: medusa.OutputHead
  trees: tuple[TokenTree, ...]
  least_chance: float = 0.0
  name: str = 'medusa'
  num_kinds: int = 1
  needs_features: bool = True

  def __post_init__(self):
    sizes = [len(tree) for tree in self.trees]
    if not sizes or len(set(sizes)) < len(sizes):
      raise ValueError(f'trees must differ in size, got sizes {sizes}.')
    if self.least_chance and not self.heads.confidence:
      raise ValueError(
        f'least_chance {self.least_chance} needs heads with confidence: train'
        ' such, or leave it at 0.'
      )
    for tree in self.trees:
      if tree.height > self.heads.count:
        raise ValueError(
          f'a tree of height {tree.height} needs as many heads, got'
          f' {self.heads.count}.'
        )
      size, widest = self.heads.vocabulary, int(tree.rank.max()) + 1
      if size is not None and widest > size:
        raise ValueError(
          f'a tree with {widest} siblings needs as many tokens, got a'
          f' vocabulary of {size}.'
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
    del longest
    before = jnp.maximum(context.length - 2, 0)[:, None, None]
    state = jnp.take_along_axis(hidden, before, axis=1)[:, 0]
    state = jnp.where(context.length[:, None] > 1, state, 0)
    head = None
    if self.heads.vocabulary is not None and not self.heads.own:
      vocabulary = weights.draft['vocabulary']
      if 'head' not in weights.draft:
        head = draft_vocabulary.head(weights.target, vocabulary)
    return State(state, head)

  def propose(self, weights, state, cache, context, length, purpose):
    """The best guesses, each where the tree has a place for it."""
    del purpose
    tree = self.tree(length)
    # A lower tree asks fewer heads; a bias waits for the tokens.
    asked = dataclasses.replace(self.heads, count=tree.height, markov=0)
    head = draft_vocabulary.chosen(weights, state.head)
    token = self._token(weights, context)
    score = self.output_head
    scores = medusa.logits(
      asked, weights.draft, state.hidden, score, head, token=token
    )
    if self.heads.markov:
      tokens = self._level_by_level(weights, scores, context, tree)
    else:
      best = self._best(weights, scores, tree.rank)  # [B, height, most]
      tokens = best[:, tree.depth[1:] - 1, tree.rank[1:]]
    count = jnp.full(tokens.shape[:1], length, jnp.int32)
    if self.least_chance and tree.is_chain:
      count = self._trusted(weights, state, context, tokens)
    return Proposal(tokens, count, None), state, cache

  def observe(self, state, context, longest, features):
    """The state of the last position that was read and kept."""
    if features is not None:
      last = jnp.maximum(features.count - 1, 0)[:, None, None]
      new = jnp.take_along_axis(features.hidden, last, axis=1)[:, 0]
      new = jnp.where(features.count[:, None] > 0, new, state.hidden)
      state = state._replace(hidden=new)
    return state, drafters.always(context, longest)

  def _token(self, weights, context) -> jax.Array | None:
    """The embedding of each row's last token [B, D], if the heads see it."""
    if not self.heads.token:
      return None
    return embed(_last(context)[:, 0], weights.target['embedding']['table'])

  def _best(self, weights, scores: jax.Array, ranks: np.ndarray) -> jax.Array:
    """The best tokens of `scores` [..., R], as many as ranks ask for."""
    vocabulary = weights.draft.get('vocabulary')
    best, _ = draft_vocabulary.best(scores, int(ranks.max()) + 1, vocabulary)
    return best

  def _trusted(self, weights, state, context, tokens: jax.Array) -> jax.Array:
    """How many tokens of a chain [B, G] are likely enough: [B] int32.

    Whether a token counts is decided by those before it, never by itself: a
    drafter that put forward what it liked of its own samples would change the
    text.
    """
    asked = dataclasses.replace(self.heads, count=tokens.shape[1])
    previous = None
    if asked.markov:
      before = jnp.concatenate([_last(context), tokens[:, :-1]], axis=1)
      previous = embed(before, weights.target['embedding']['table'])
    token = self._token(weights, context)
    trust = medusa.confidence(
      asked, weights.draft, state.hidden, previous, token
    )
    reached = jnp.cumprod(jax.nn.sigmoid(trust), axis=-1)
    return jnp.sum(reached >= self.least_chance, axis=-1, dtype=jnp.int32)

  def _level_by_level(self, weights, scores, context, tree) -> jax.Array:
    """Guesses that know the token before them: [B, N - 1].

    `scores` [B, height, R] are those of the heads, which do not.
    """
    table = weights.target['embedding']['table']
    tokens = jnp.pad(_last(context), ((0, 0), (0, len(tree) - 1)))
    for depth in range(1, tree.height + 1):
      born = np.flatnonzero(tree.depth == depth)
      parents, of = np.unique(
        np.asarray(tree.parents)[born], return_inverse=True
      )
      previous = embed(tokens[:, parents], table)
      biased = scores[:, depth - 1, None] + medusa.markov_bias(
        weights.draft, previous
      )
      best = self._best(weights, biased, tree.rank[born])  # [B, parents, most]
      tokens = tokens.at[:, born].set(best[:, of, tree.rank[born]])
    return tokens[:, 1:]


def _last(context: drafters.Context) -> jax.Array:
  """The last committed token of each row: [B, 1] int32."""
  return jnp.take_along_axis(
    context.tokens, context.length[:, None] - 1, axis=1
  )
