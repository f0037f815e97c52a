"""Cheap guesses at the next tokens.

A drafter is a frozen dataclass of static choices with three pure methods:

* `init(weights, context, longest, hidden)` gives its state for a batch of
  prompts,
* `propose(weights, state, cache, context, length, purpose)` drafts `length`
  tokens after the last committed one and hands the target's cache back (a
  drafter that shares it may have written beyond its cursor),
* `observe(state, context, longest, features)` looks at newly committed tokens
  and says how many tokens it could draft next and how sure it is (`Forecast`).
  A schedule may use that: it depends on committed tokens only.

Its `tree(length)` says how the tokens of a draft hang together: one after
another, unless it drafts several guesses at a place. One that `needs_features`
is given what the target thought of the text, its hidden states.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.decoding import draft_trees
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import sampling as sampling_lib
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding.prefill import prefill
from efficiency_jax.decoding.sampling import Purpose
from efficiency_jax.decoding.sampling import Sampling
from efficiency_jax.decoding.verifiers import Proposal
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Cache
from efficiency_jax.types import ModelOutput
from efficiency_jax.types import Params

# Tokens that a draft model behind the text takes in at a time.
_CATCH_UP = 16


class Weights(NamedTuple):
  """Parameters of the two models of a decoder."""

  target: Params
  draft: Params | None = None


class Context(NamedTuple):
  """What has been committed so far; all that a drafter may look at."""

  tokens: jax.Array  # [B, N] int32, prompt and text
  length: jax.Array  # [B] int32, committed tokens of each row
  keys: jax.Array  # [B] typed keys
  sampling: Sampling


class Forecast(NamedTuple):
  """What a drafter can do next, judged from committed tokens."""

  count: jax.Array  # [B] int32, tokens that it could draft
  kind: jax.Array  # [B] int32 < num_kinds, drafts of like reliability


class Features(NamedTuple):
  """Hidden states of the target at the positions that a round cached.

  Those are the positions `length - 1 - count .. length - 2` of a row, in order.
  """

  hidden: jax.Array  # [B, W, D]; beyond `count` it means nothing
  count: jax.Array  # [B] int32


class Drafter(Protocol):
  """The interface; see the module's docstring."""

  num_kinds: int
  name: str
  needs_features: bool

  def tree(self, length: int) -> draft_trees.Shape:
    """Shape of a draft of `length` tokens: `length + 1` nodes."""
    ...

  def init(
    self,
    weights: Weights,
    context: Context,
    longest: int,
    hidden: jax.Array | None,  # [B, N', D] of the prompts, if features
  ) -> Any:
    """State of the drafter after the prompts in `context`."""
    ...

  def propose(
    self,
    weights: Weights,
    state: Any,
    cache: Cache,
    context: Context,
    length: int,
    purpose: Purpose,
  ) -> tuple[Proposal, Any, Cache]:
    """Drafts `length` tokens a row."""
    ...

  def observe(
    self,
    state: Any,
    context: Context,
    longest: int,
    features: Features | None,  # None before the first round
  ) -> tuple[Any, Forecast]:
    """Takes in committed tokens before the next round."""
    ...


class Chain:
  """A drafter of one token after another that needs the text alone."""

  needs_features = False

  def tree(self, length: int) -> token_tree.TokenTree:
    """No branches."""
    return token_tree.chain(length)


@dataclasses.dataclass(frozen=True)
class Nothing(Chain):
  """Drafts nothing, which makes the speculative loop a plain one.

  With a draft length G above 0 the target still runs at width G + 1: that is
  plain decoding whose products have the shapes of verification, and whose text
  therefore equals speculative text bit for bit in any dtype.
  """

  name: str = 'plain'
  num_kinds: int = 1

  def init(self, weights, context, longest, hidden=None):
    """No state."""
    del weights, context, longest, hidden
    return ()

  def propose(self, weights, state, cache, context, length, purpose):
    """`length` placeholders, none of them meant."""
    del weights, purpose
    batch = context.length.shape[0]
    tokens = jnp.zeros((batch, length), jnp.int32)
    count = jnp.zeros((batch,), jnp.int32)
    return Proposal(tokens, count, None), state, cache

  def observe(self, state, context, longest, features=None):
    """Nothing to draft."""
    del longest, features
    zero = jnp.zeros_like(context.length)
    return state, Forecast(zero, zero)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGram(Chain):
  """Prompt lookup: copies what followed the same tokens earlier on.

  The longest suffix of the text, up to `longest_match` tokens, that occurs
  before is looked for; among equal lengths the latest place wins. The draft is
  what stands behind it, and where that reaches the end of the text it goes on
  from the place again, as a text that repeats with that period would. The whole
  search is a comparison of shifted copies of the token buffer in the compiled
  loop.

  Attributes:
    longest_match: Most tokens of the suffix to compare.
    shortest_match: Fewest tokens that make a match.
  """

  longest_match: int = 8
  shortest_match: int = 1
  name: str = 'n-gram'

  def __post_init__(self):
    if not 1 <= self.shortest_match <= self.longest_match:
      raise ValueError(
        'shortest_match must be in 1..longest_match ='
        f' {self.longest_match}, got {self.shortest_match}.'
      )

  @property
  def num_kinds(self) -> int:
    """Matches of each length draft with their own reliability."""
    return self.longest_match - self.shortest_match + 1

  def init(self, weights, context, longest, hidden=None):
    """No draft yet: `observe` finds the first."""
    del weights, hidden
    batch = context.length.shape[0]
    return Proposal(
      jnp.zeros((batch, longest), jnp.int32),
      jnp.zeros((batch,), jnp.int32),
      None,
    )

  def propose(self, weights, state, cache, context, length, purpose):
    """The first `length` tokens of what `observe` found."""
    del weights, context, purpose
    count = jnp.minimum(state.count, length)
    return Proposal(state.tokens[:, :length], count, None), state, cache

  def observe(self, state, context, longest, features=None):
    """Looks the suffix of every row up in the row."""
    del state, features
    tokens, length = context.tokens, context.length
    slots = jnp.arange(tokens.shape[1])
    matched = jnp.zeros(tokens.shape, jnp.int32)
    still = slots[None] < length[:, None] - 1  # an end of an earlier n-gram
    for back in range(self.longest_match):
      last = jnp.take_along_axis(
        tokens, jnp.maximum(length - 1 - back, 0)[:, None], axis=1
      )
      shifted = jnp.pad(tokens, ((0, 0), (back, 0)))[:, : tokens.shape[1]]
      still &= (shifted == last) & (slots >= back)
      matched += still
    # The longest match; of those the latest.
    place = jnp.argmax(matched * tokens.shape[1] + slots, axis=1)
    size = jnp.take_along_axis(matched, place[:, None], axis=1)[:, 0]
    found = size >= self.shortest_match
    period = jnp.maximum(length - 1 - place, 1)[:, None]
    source = place[:, None] + 1 + jnp.arange(longest) % period
    source = jnp.minimum(source, tokens.shape[1] - 1)
    draft = jnp.take_along_axis(tokens, source, axis=1)
    count = jnp.where(found, longest, 0)
    kind = jnp.maximum(size - self.shortest_match, 0)
    return Proposal(draft, count, None), Forecast(count, kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftModel:
  """A smaller model with the same tokenizer and a cache of its own.

  A chain is sampled from its law, which a verifier is given; a tree holds its
  best guesses after each node, so its draft is deterministic.

  Attributes:
    apply: The draft model.
    init_cache: `init_cache(batch, slots)` gives it an empty cache.
    head: Its output head, of its parameters and hidden states; needed by trees
      alone. Column j is the token `vocabulary[j]` if the parameters hold one.
    trees: Shapes of drafts, each of another size; other lengths are chains.
  """

  apply: ApplyFn
  init_cache: Any
  head: Callable[[Params, jax.Array], jax.Array] | None = None
  trees: tuple[draft_trees.Shape, ...] = ()
  name: str = 'draft model'
  num_kinds: int = 1
  needs_features: bool = False

  def __post_init__(self):
    draft_trees.check(self.trees)
    if self.trees and self.head is None:
      raise ValueError('trees need head=, the output head of the draft model.')

  def tree(self, length: int) -> draft_trees.Shape:
    """The given tree of `length + 1` nodes, or a chain."""
    return draft_trees.of_length(self.trees, length)

  def init(self, weights, context, longest, hidden=None):
    """Runs the draft model over the prompts."""
    batch, slots = context.tokens.shape
    room = draft_trees.room(self.trees, longest)
    cache = self.init_cache(batch, slots + room)
    del hidden  # the target's
    cache, _ = prefill(
      self.apply, weights.draft, context.tokens, context.length, cache
    )
    return cache

  def propose(self, weights, state, cache, context, length, purpose):
    """Drafts a chain or a tree after the last committed token.

    After a fully accepted chain the cache lacks the last drafted token, and
    feeding two always costs less than a second kind of step. Of a tree it keeps
    nothing. Only other rounds than those of this length leave more.
    """
    tree = self.tree(length)
    apply = functools.partial(self.apply, weights.draft)
    width = 2 if tree.is_chain else tree.height + 1
    output, state = after_text(apply, state, context, width)

    def feed_one(token, draft_cache):
      output, draft_cache = apply(token, draft_cache)
      return output.logits, draft_cache

    def feed_nodes(tokens, before, ancestors, draft_cache):
      del before  # it knows its own past
      output, draft_cache = apply(tokens, draft_cache, ancestors=ancestors)
      return output.hidden, draft_cache

    def guess(hidden, most):
      logits = self.head(weights.draft, hidden)
      vocabulary = weights.draft.get('vocabulary')
      return draft_vocabulary.best(logits, most, vocabulary)

    if tree.is_chain:
      proposal, state = sample_chain(
        feed_one, output.logits, state, context, length, purpose
      )
    else:
      proposal, state = draft_trees.propose(
        tree, output.hidden, guess, feed_nodes, state
      )
    return proposal, state, cache

  def observe(self, state, context, longest, features=None):
    """Can always draft; forgets the refused tokens."""
    del features
    length = jnp.minimum(state.length, context.length - 1)
    return state._replace(length=length), always(context, longest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExit(Chain):
  """The first layers of the target with its own norm and head as the draft.

  They write the same keys and values that the target's verification then
  writes, so the target's cache is the draft's (LayerSkip, arXiv 2404.16710).

  Attributes:
    apply: The target's first layers, on the target's parameters.
  """

  apply: ApplyFn
  name: str = 'early exit'
  num_kinds: int = 1

  def init(self, weights, context, longest, hidden=None):
    """No state of its own."""
    del weights, context, longest, hidden
    return ()

  def propose(self, weights, state, cache, context, length, purpose):
    """Samples `length` tokens through the first layers."""

    def feed(tokens, cache):
      output, cache = self.apply(weights.target, tokens, cache)
      return output.logits, cache

    cursor = cache.length
    anchor = jnp.take_along_axis(
      context.tokens, context.length[:, None] - 1, axis=1
    )
    logits, cache = feed(anchor, cache)
    proposal, cache = sample_chain(
      feed, logits, cache, context, length, purpose
    )
    return proposal, state, cache._replace(length=cursor)

  def observe(self, state, context, longest, features=None):
    """Can always draft."""
    del features
    return state, always(context, longest)


def always(context: Context, longest: int) -> Forecast:
  """The forecast of a drafter that can draft after any text."""
  zero = jnp.zeros_like(context.length)
  return Forecast(zero + longest, zero)


def write(buffer: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
  """Row b of `block` [B, W, ...] into `buffer` [B, N, ...] from `at[b]` on."""

  def one(row, new, slot):
    at = (slot,) + (0,) * (row.ndim - 1)
    return lax.dynamic_update_slice(row, new, at)

  return jax.vmap(one)(buffer, block.astype(buffer.dtype), at)


def after_text(
  apply: Callable[[jax.Array, Cache], tuple[ModelOutput, Cache]],
  cache: Cache,
  context: Context,
  width: int,
) -> tuple[ModelOutput, Cache]:
  """A draft's output [B, 1, ...] after the committed text, and its cache of it.

  Args:
    apply: The draft, on tokens [B, T] and its cache.
    cache: Of the draft, behind the text or not; what it holds of the last
      `width` tokens is written again.
    context: The text.
    width: Tokens to feed at once, at least 1; if more are missing, the others
      are fed in steps before.
  """
  cache = _catch_up(
    lambda tokens, cache: apply(tokens, cache)[1], cache, context, width
  )
  start = jnp.maximum(context.length - width, 0)
  place = start[:, None] + jnp.arange(width)
  place = jnp.minimum(place, context.tokens.shape[1] - 1)
  tokens = jnp.take_along_axis(context.tokens, place, axis=1)
  output, cache = apply(tokens, cache._replace(length=start))
  last = (context.length - 1 - start)[:, None, None]
  output = ModelOutput(*(jnp.take_along_axis(x, last, axis=1) for x in output))
  return output, cache._replace(length=context.length)


def _catch_up(
  feed: Callable[[jax.Array, Cache], Cache],
  cache: Cache,
  context: Context,
  most: int,
) -> Cache:
  """Feeds committed tokens until at most the last `most` >= 1 are missing."""

  def behind(cache):
    return jnp.any(cache.length < context.length - most)

  def body(cache):
    last = jnp.maximum(context.length - _CATCH_UP, 0)
    start = jnp.minimum(cache.length, last)
    place = start[:, None] + jnp.arange(_CATCH_UP)
    place = jnp.minimum(place, context.tokens.shape[1] - 1)
    tokens = jnp.take_along_axis(context.tokens, place, axis=1)
    cache = feed(tokens, cache._replace(length=start))
    length = jnp.minimum(start + _CATCH_UP, context.length - 1)
    return cache._replace(length=length)

  return lax.while_loop(behind, body, cache)


def sample_chain(
  feed: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
  logits: jax.Array,
  carry: Any,
  context: Context,
  length: int,
  purpose: Purpose,
) -> tuple[Proposal, Any]:
  """Draws `length` tokens, feeding each back; `logits` [B, 1, V] start it.

  `feed(token [B, 1], carry)` gives the logits after the token and what to carry
  on, a cache for one.

  The kept logits are those that were drawn from, filters included: a verifier
  needs the true q. Of a greedy draft, a point mass, none are kept.
  """
  seen = None
  if context.sampling.repetition_penalty is not None:
    seen = sampling_lib.seen_tokens(
      context.tokens, context.length, logits.shape[-1]
    )[:, None]

  # Noise shared with plain sampling has a place, other noise also a round.
  start = None if purpose == Purpose.SAMPLE else context.length

  def draw(logits, seen, index):
    if sampling_lib.is_greedy(context.sampling):
      q = sampling_lib.penalized(logits, context.sampling, seen)
      token = sampling_lib.arg_max(q)
    else:
      q = sampling_lib.processed_logits(logits, context.sampling, seen)
      position = (context.length + index)[:, None]
      keys = sampling_lib.position_keys(context.keys, position, purpose, start)
      token = sampling_lib.draw(keys, q)
    if seen is not None:
      seen |= jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    return token, q, seen

  def step(carry, index):
    token, seen, carry = carry
    logits, carry = feed(token, carry)
    token, q, seen = draw(logits, seen, index)
    return (token, seen, carry), (token, q)

  token, q, seen = draw(logits, seen, 0)
  (_, _, carry), (tokens, kept) = lax.scan(
    step, (token, seen, carry), jnp.arange(1, length)
  )
  tokens = jnp.concatenate([token[None], tokens]).swapaxes(0, 1)[..., 0]
  kept = jnp.concatenate([q[None], kept]).swapaxes(0, 1)[:, :, 0]
  # A greedy draft is a point mass, which needs no [B, G, V] array.
  greedy = sampling_lib.is_greedy(context.sampling)
  count = jnp.full(tokens.shape[:1], length, jnp.int32)
  return Proposal(tokens, count, None if greedy else kept), carry
