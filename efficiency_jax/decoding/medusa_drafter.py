"""Medusa's heads as a drafter: their guesses fill a tree of tokens.

The state of a row is what the target thought at the last position that it read
and kept. From it the heads guess (`medusa`), and the node at depth k with rank
r among its siblings holds the r-th best guess of head k. Or the tree grows
where the heads are sure (`dynamic_tree`), the worth of a node being the product
of what the heads think of the tokens on the way to it.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficiency_jax.decoding import draft_trees
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import dynamic_tree
from efficiency_jax.decoding import medusa
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
    trees: Shapes of drafts, each of another size, fixed or growing; a draft of
      n tokens has that of n + 1 nodes.
    least_chance: A chain ends before the first guess that is less likely than
      this to be reached and kept, as the heads with `confidence` see it; the
      tokens beyond are not put forward. Trees are whole.
  """

  heads: medusa.Heads
  output_head: medusa.OutputHead
  trees: tuple[draft_trees.Shape, ...]
  least_chance: float = 0.0
  name: str = 'medusa'
  num_kinds: int = 1
  needs_features: bool = True

  def __post_init__(self):
    if not self.trees:
      raise ValueError('trees must be given, one or more.')
    draft_trees.check(self.trees, self.heads.vocabulary)
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

  def tree(self, length: int) -> draft_trees.Shape:
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
    shape = self.tree(length)
    # A lower tree asks fewer heads; a bias waits for the tokens.
    asked = dataclasses.replace(self.heads, count=shape.height, markov=0)
    head = draft_vocabulary.chosen(weights, state.head)
    token = self._token(weights, context)
    scores = medusa.logits(
      asked, weights.draft, state.hidden, self.output_head, head, token=token
    )
    vocabulary = weights.draft.get('vocabulary')

    def guess(scores, most):
      return draft_vocabulary.best(scores, most, vocabulary)

    def after(tokens, depth):
      """Scores of head `depth + 1` behind tokens [B, n]: [B, n, R]."""
      own = scores[:, depth, None]
      if not self.heads.markov:
        return jnp.broadcast_to(own, (*tokens.shape, own.shape[-1]))
      previous = embed(tokens, weights.target['embedding']['table'])
      return own + medusa.markov_bias(weights.draft, previous)

    def feed(tokens, before, ancestors, fed):
      del before, ancestors
      new = tokens[:, sum(fed) :]
      return after(new, 1 + len(fed)), (*fed, new.shape[1])

    root, parents = after(_last(context), 0), None
    if isinstance(shape, dynamic_tree.Growth):
      tokens, parents, _ = dynamic_tree.grow(shape, root, guess, feed, ())
    else:
      tokens, _ = draft_trees.fill(shape, root, guess, feed, ())
    count = jnp.full(tokens.shape[:1], length, jnp.int32)
    if self.least_chance and shape.is_chain:
      count = self._trusted(weights, state, context, tokens)
    return Proposal(tokens, count, None, parents), state, cache

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


def _last(context: drafters.Context) -> jax.Array:
  """The last committed token of each row: [B, 1] int32."""
  return jnp.take_along_axis(
    context.tokens, context.length[:, None] - 1, axis=1
  )
