"""A draft of one layer that reads the target's thoughts (EAGLE).

At position t the draft reads the token x_t and what the target thought of the
text before it, h_{t-1}, its hidden state after the final norm. Its own state
g_t plays the part of h_t (arXiv 2401.15077):

    u_t = W [norm(E x_t); norm(h_{t-1})],   W [2 D, D]
    g_t = norm(block(u_0 .. u_t)),          q(x_{t+1}) = softmax(head(g_t))

with one block of the target's kind, and the target's own embedding E and output
head. Beyond the text, where the target has not thought yet, g takes the place
of h; `eagle_training` trains it that way (EAGLE-3, arXiv 2503.01840). h_{-1}
is zero. The head may score the most frequent tokens alone (`draft_vocabulary`).

EAGLE-3 lets the draft see what the target thought on its way as well. With
x^l_t what block l of the target reads, h_t is then replaced by

    h_t + G [norm_l(x^l_t) for each of the chosen l]

with G [F D, D], zero at first, and norm_l the target's own norm before block l.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from efficiency_jax.decoding import draft_trees
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import sampling as sampling_lib
from efficiency_jax.decoding.prefill import prefill
from efficiency_jax.decoding.prefill import slots_for
from efficiency_jax.linear import embed
from efficiency_jax.linear import linear
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import rope
from efficiency_jax.models import transformer
from efficiency_jax.models.config import DecoderConfig
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Cache
from efficiency_jax.types import ModelOutput
from efficiency_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
  """The form of the draft; hashable.

  Attributes:
    target: Config of the model that it drafts for.
    vocabulary: R, tokens that it may draft; None is all. Which ones says
      `vocabulary` [R] among the parameters that a drafter is given.
    ffn_width: Hidden width of its feed-forward; None is the target's.
    layers: F blocks of the target whose inputs it sees beside the final state.
  """

  target: DecoderConfig
  vocabulary: int | None = None
  ffn_width: int | None = None
  layers: tuple[int, ...] = ()

  def __post_init__(self):
    transformer.check_layers(self.target, self.layers)
    size = self.target.vocab_size
    if self.vocabulary is not None and not 1 <= self.vocabulary <= size:
      raise ValueError(
        f'vocabulary must be in 1..{size} or None, got {self.vocabulary}.'
      )

  @property
  def config(self) -> DecoderConfig:
    """One layer of the target's kind, which sees the whole text."""
    return dataclasses.replace(
      self.target,
      num_layers=1,
      windows=(),
      ffn_width=self.ffn_width or self.target.ffn_width,
    )


class Draft(nn.Module):
  """Embedded tokens and states before them in, own states and cache out."""

  config: DecoderConfig

  @nn.compact
  def __call__(
    self,
    embedded: jax.Array,  # [B, T, D]
    features: jax.Array,  # [B, T, D]
    cache: Cache | None = None,
    ancestors: jax.Array | None = None,  # [T, T] or [B, T, T] bool
  ) -> tuple[jax.Array, Cache | None]:
    c = self.config
    norm = lambda name: transformer.RMSNorm(
      c.norm_epsilon, c.norm_plus_one, cached=cache is not None, name=name
    )
    x = transformer.Linear(c.width, name='fuse')(
      fused(norm('embedding_norm')(embedded), norm('feature_norm')(features))
    )
    batch, time, _ = x.shape
    start = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
    places = jnp.arange(time, dtype=jnp.int32)
    if ancestors is not None:
      places = jnp.sum(ancestors, axis=-1, dtype=jnp.int32) - 1
    turn = rotation(c, start[:, None] + places)
    slots = None if cache is None else (cache.keys[0], cache.values[0])
    block = transformer.Block(c, 0, name='layers_0')
    x, slots = block(x, turn, start, slots, ancestors, None)
    x = norm('final_norm')(x)
    if cache is not None:
      cache = Cache((slots[0],), (slots[1],), start + time)
    return x, cache


def fused(embedded: jax.Array, features: jax.Array) -> jax.Array:
  """What the first product reads: [..., 2 D]."""
  return jnp.concatenate([embedded, features], axis=-1)


def rotation(config: DecoderConfig, positions: jax.Array):
  """Rotary turns of the draft at `positions` [B, T]."""
  inverse = rope.frequencies(
    config.head_dim, config.rope_theta, config.rope_scaling
  )
  return rope.rotation(positions, inverse)


def init(form: Form, key: jax.Array, target: Params | None = None) -> Params:
  """Random float32 parameters of the draft: normal(0, 0.02) kernels.

  With the parameters of the target the final norm begins as the target's, which
  gives states the scale that the head expects. `eagle_training.least_squares`
  makes a better beginning of them.
  """
  width = form.target.width
  states = jnp.zeros((1, 1, width))
  params = _init_fn(form.config)(key, states, states)['params']
  if form.layers:
    kernel = jnp.zeros((len(form.layers) * width, width))
    params = {**params, 'gather': {'kernel': kernel}}
  if target is not None:
    norm = jax.tree.map(
      lambda x: jnp.array(x, jnp.float32), target['final_norm']
    )
    params = {**params, 'final_norm': norm}
  return params


@functools.cache
def _init_fn(config: DecoderConfig):
  return jax.jit(Draft(config).init)


def apply(
  form: Form,
  params: Params,
  target: Params,
  tokens: jax.Array,  # [B, T] int32
  features: jax.Array,  # [B, T, D], the state before each token
  cache: Cache | None = None,
  *,
  ancestors: jax.Array | None = None,  # [T, T] or [B, T, T] bool
) -> tuple[jax.Array, Cache | None]:
  """The draft's own states [B, T, D] and the grown cache.

  Tokens stand, and trees of them are given, as for an `ApplyFn`; the compute
  dtype is that of the features. Embeddings need no scale: they are normed.
  """
  embedded = embedded_by(target, tokens, features.dtype)
  return Draft(form.config).apply(
    {'params': params}, embedded, features, cache, ancestors
  )


def gathered(
  form: Form, params: Params, target: Params, hidden: jax.Array
) -> jax.Array:
  """States that the draft reads, of those of the target: [..., D].

  Args:
    form: Of the draft.
    params: Of the draft.
    target: Of the target; its norms are read, if the form has `layers`.
    hidden: [..., (1 + F) D], from `transformer.apply_fn` with the form's
      layers. Zeros give zeros.
  """
  if not form.layers:
    return hidden
  c = form.target
  final, *inner = jnp.split(hidden, 1 + len(form.layers), axis=-1)
  norm = transformer.RMSNorm(c.norm_epsilon, c.norm_plus_one)
  inner = [
    norm.apply({'params': target[f'layers_{layer}']['attention_norm']}, x)
    for layer, x in zip(form.layers, inner, strict=True)
  ]
  return final + linear(
    jnp.concatenate(inner, axis=-1), params['gather']['kernel']
  )


def embedded_by(target: Params, tokens: jax.Array, dtype) -> jax.Array:
  """The target's embeddings of tokens [...]: [..., D]."""
  return embed(tokens, target['embedding']['table']).astype(dtype)


def scores_fn(form: Form) -> Callable[[Params, jax.Array], jax.Array]:
  """Parameters of a head, states [..., D] to logits: the target's head.

  The parameters are the target's, or those of `draft_vocabulary.head`.
  """
  return transformer.head_fn(form.target)


@functools.cache
def _text_fn(form: Form) -> ApplyFn:
  """The draft along a text whose features are known; an `ApplyFn`.

  Its parameters are `(draft, target, features [B, N, (1 + F) D])`, where
  features hold the target's states before every position. Its output has hidden
  states alone.
  """

  def apply_to_text(
    params, tokens, cache=None, *, ancestors=None, segments=None
  ):
    del ancestors, segments
    draft, target, features = params
    place = cache.length[:, None] + jnp.arange(tokens.shape[1])
    place = jnp.minimum(place, features.shape[1] - 1)
    before = jnp.take_along_axis(features, place[..., None], axis=1)
    before = gathered(form, draft, target, before)
    hidden, cache = apply(form, draft, target, tokens, before, cache)
    return ModelOutput(hidden[..., :0], hidden), cache

  return apply_to_text


class State(NamedTuple):
  """What the drafter carries from round to round."""

  cache: Cache  # of the draft, made of the target's states alone
  features: jax.Array  # [B, N, (1 + F) D], the target's before each position
  head: Params | None  # of fewer tokens; None is the draft's or the target's
  columns: jax.Array | None  # [V] int32; see `draft_vocabulary`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eagle:
  """The drafter; see `drafters`.

  The draft's parameters are those of `init`, and beside them `vocabulary` [R]
  int32 if the form has one, and perhaps a `head` for it. A chain is sampled
  from q, which a verifier is given; a tree holds the best guesses of q after
  each node, so its draft is deterministic. Its shape is given, or grows where q
  is sure (EAGLE-2).

  After a round the cache of the draft lacks the kept tokens, or holds what was
  computed of the draft's own states. The next draft feeds them again with the
  states of the target, all at once: `tree.height + 1` positions, which is what
  the round before may have kept. Only a longer or a draftless round before
  leaves more; those are fed in steps.

  Attributes:
    form: Of the draft.
    trees: Shapes of drafts, each of another size; other lengths are chains.
  """

  form: Form
  trees: tuple[draft_trees.Shape, ...] = ()
  name: str = 'eagle'
  num_kinds: int = 1
  needs_features: bool = True

  def __post_init__(self):
    size = self.form.vocabulary or self.form.target.vocab_size
    draft_trees.check(self.trees, size)

  def tree(self, length: int) -> draft_trees.Shape:
    """The given tree of `length + 1` nodes, or a chain."""
    return draft_trees.of_length(self.trees, length)

  def init(self, weights, context, longest, hidden):
    """Runs the draft over the prompts."""
    form, size = self.form, self.form.target.vocab_size
    batch, slots = context.tokens.shape
    room = draft_trees.room(self.trees, longest)
    # Position t is fed with the state at t - 1.
    features = jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))
    cache = kv_cache.init(
      form.config,
      batch,
      max(slots + room, slots_for(slots)),
      hidden.dtype,
    )
    head = columns = None
    if form.vocabulary is not None:
      vocabulary = weights.draft['vocabulary']
      if 'head' not in weights.draft:
        head = draft_vocabulary.head(weights.target, vocabulary)
      columns = draft_vocabulary.columns(vocabulary, size)
    cache, _ = prefill(
      _text_fn(form),
      (weights.draft, weights.target, features),
      context.tokens,
      context.length,
      cache,
    )
    return State(cache, features, head, columns)

  def propose(self, weights, state, cache, context, length, purpose):
    """Drafts a chain or a tree after the last committed token."""
    tree = self.tree(length)
    params = weights.draft, weights.target, state.features
    text = functools.partial(_text_fn(self.form), params)
    output, own = drafters.after_text(
      text, state.cache, context, tree.height + 1
    )
    if tree.is_chain:
      proposal, own = self._chain(
        weights, state, own, output.hidden, context, length, purpose
      )
    else:
      proposal, own = self._tree(weights, state, own, output.hidden, tree)
    # What follows the text was computed of the draft's own states.
    own = own._replace(length=context.length)
    return proposal, state._replace(cache=own), cache

  def observe(self, state, context, longest, features):
    """Keeps the target's states of the committed text."""
    if features is not None:
      # Those at `length - 1 - count` on come before the next positions.
      buffer = drafters.write(
        state.features, features.hidden, context.length - features.count
      )
      state = state._replace(features=buffer)
    return state, drafters.always(context, longest)

  def _scores(self, weights, state, hidden):
    """Logits [..., R] of own states."""
    head = draft_vocabulary.chosen(weights, state.head)
    return scores_fn(self.form)(head, hidden)

  def _step(self, weights, *args, **options):
    return apply(self.form, weights.draft, weights.target, *args, **options)

  def _chain(self, weights, state, own, root, context, length, purpose):
    settings = context.sampling
    penalized = settings.repetition_penalty is not None
    # The best of the vocabulary is the best of all tokens.
    within = sampling_lib.is_greedy(settings) and not penalized
    within &= state.columns is not None

    def scored(hidden):
      logits = self._scores(weights, state, hidden)
      if state.columns is None or within:
        return logits
      return draft_vocabulary.spread(logits, state.columns)

    def token_of(column):
      return weights.draft['vocabulary'][column] if within else column

    def feed(column, carry):
      own, hidden = carry
      hidden, own = self._step(weights, token_of(column), hidden, own)
      return scored(hidden), (own, hidden)

    proposal, (own, _) = drafters.sample_chain(
      feed, scored(root), (own, root), context, length, purpose
    )
    return proposal._replace(tokens=token_of(proposal.tokens)), own

  def _tree(self, weights, state, own, root, tree):
    def guess(hidden, most):
      logits = self._scores(weights, state, hidden)
      vocabulary = weights.draft.get('vocabulary')
      return draft_vocabulary.best(logits, most, vocabulary)

    def feed(tokens, before, ancestors, own):
      return self._step(weights, tokens, before, own, ancestors=ancestors)

    return draft_trees.propose(tree, root, guess, feed, own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedDraft:
  """A draft of one target, ready to use.

  Attributes:
    form: Of the draft.
    params: Its trained parameters.
    vocabulary: [R] tokens that it may draft, if the form has a vocabulary.
    trees: Shapes of drafts, if not chains alone.
    head: Parameters of a head [R] of its own, stored in another way than the
      target's rows, which None takes; see `quantized_drafts`.
  """

  form: Form
  params: Params
  vocabulary: jax.Array | None = None
  trees: tuple[draft_trees.Shape, ...] = ()
  head: Params | None = None

  def __post_init__(self):
    draft_vocabulary.check(self.vocabulary, self.form.vocabulary)
    if self.head is not None and self.vocabulary is None:
      raise ValueError('a head of its own needs the vocabulary that it scores.')

  @property
  def weights(self) -> Params:
    """What `drafters.Weights.draft` holds."""
    if self.vocabulary is None:
      return self.params
    vocabulary = jnp.asarray(self.vocabulary, jnp.int32)
    own = {} if self.head is None else {'head': self.head}
    return {**self.params, **own, 'vocabulary': vocabulary}
