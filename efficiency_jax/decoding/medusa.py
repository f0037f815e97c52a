"""Medusa: a few more heads on the target guess tokens further ahead.

Head k = 1 .. K looks at the hidden state h_t from which the target predicts
token t + 1, and guesses token t + 1 + k (arXiv 2401.10774, section 2.2.1):

    p_k = softmax(W_k x_k),    x_k = h_t + silu(h_t V_k),    V_k [D, D]

V_k begins as zeros and W_k as the target's output head, so that every head
begins as the target's own guess at token t + 1. `Heads` says what W_k is: one
of its own as in the paper; the target's own, which leaves only V_k to be
trained and stored; or that with a correction of low rank. Each of them may
score the most frequent tokens alone (`draft_vocabulary`).

The guesses fill a tree, node by node: the node at depth k with rank r among its
siblings holds the r-th best guess of head k, whatever its parent holds. A bias
by the token y before the guess, here the parent's, mends that (the Markov head
of DSpark, arXiv 2607.05147):

    p_k = softmax(W_k x_k + U P e_y),    P [r, D], U [V, r]

with e_y the target's embedding of y; U is one for all heads and begins as
zeros. Then the tree is filled level by level, but W_k x_k is still computed
once. The target reads the whole tree in one pass.

The paper's heads see h_t alone. All of them may begin from more, what chosen
blocks of the target read, x^l_t (EAGLE-3, arXiv 2503.01840), and token t + 1,
which stands when they guess (Hydra, arXiv 2402.05109): in place of h_t then

    h_t + silu([n(h_t); n(x^l_t) for each of the chosen l; n(e_{t+1})] T)

with T [(2 + F) D, D], zero at first, and n(x) = x / sqrt(mean x^2 + 1e-6).

A head may also say how much it trusts its guess, the chance that the target
would keep one that is sampled from p_k (the confidence head of DSpark):

    c_k = sigmoid(w_k [x_k; P e_y] + b_k)

which may end a chain early.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding.token_tree import TokenTree
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
    vocabulary: R, tokens that they may guess; None is all. Which ones says
      `vocabulary` [R] among the parameters that a drafter is given.
    markov: Rank of the bias by the token before a guess; 0 is none.
    confidence: Whether each head says how likely its guess is to be kept.
    token: Whether the heads see the token that stands before their guesses.
    layers: F blocks of the target whose inputs they see beside its final state.
  """

  count: int = 4
  blocks: int = 1
  own: bool = False
  rank: int = 0
  vocabulary: int | None = None
  markov: int = 0
  confidence: bool = False
  token: bool = False
  layers: tuple[int, ...] = ()

  def __post_init__(self):
    if self.count < 1 or self.blocks < 1 or min(self.rank, self.markov) < 0:
      raise ValueError(
        'count and blocks must be >= 1, rank and markov >= 0, got'
        f' {self.count}, {self.blocks}, {self.rank}, {self.markov}.'
      )
    if self.own and self.rank:
      raise ValueError('a head of its own needs no correction: rank must be 0.')
    if self.vocabulary is not None and self.vocabulary < 1:
      raise ValueError(
        f'vocabulary must be >= 1 or None, got {self.vocabulary}.'
      )


def init(
  heads: Heads, key: jax.Array, width: int, vocab_size: int, table: Params
) -> Params:
  """Heads that all guess what the target guesses next, in float32.

  Args:
    heads: Their form.
    key: Of the factors of low-rank products that do not begin as zeros.
    width: D.
    vocab_size: V.
    table: The parameters that the target's output head reads, as a tree of its
      own: copied for heads that have one. With a vocabulary, those of
      `draft_vocabulary.head`.

  Raises:
    ValueError: The vocabulary is larger than the target's, or a table to copy
      has not one row for each token.
  """
  size = vocab_size if heads.vocabulary is None else heads.vocabulary
  if size > vocab_size:
    raise ValueError(f'vocabulary must be <= {vocab_size}, got {size}.')
  if heads.own and len(draft_vocabulary.table(table)) != size:
    raise ValueError(
      f'table must have the {size} rows that the heads score, got'
      f' {len(draft_vocabulary.table(table))}: take `draft_vocabulary.head`.'
    )
  params = {}
  for k in range(heads.count):
    one: dict[str, Any] = {
      f'block_{i}': {'kernel': jnp.zeros((width, width))}
      for i in range(heads.blocks)
    }
    if heads.own:
      copy = lambda x: jnp.array(x, jnp.float32)
      one['output'] = jax.tree.map(copy, table)
    if heads.rank:
      one |= _factors(jax.random.fold_in(key, k), width, heads.rank, size)
    if heads.confidence:
      one['confidence'] = {
        'kernel': jnp.zeros((width + heads.markov, 1)),
        'bias': jnp.zeros((1,)),
      }
    params[f'head_{k}'] = one
  if seen := len(heads.layers) + heads.token:
    params['trunk'] = {'kernel': jnp.zeros(((1 + seen) * width, width))}
  if heads.markov:
    last = jax.random.fold_in(key, heads.count)
    params['markov'] = _factors(last, width, heads.markov, size)
  return params


def logits(
  heads: Heads,
  params: Params,
  hidden: jax.Array,  # [..., (1 + F) D]
  output_head: OutputHead,
  target: Params,
  previous: jax.Array | None = None,  # [..., K, D]
  token: jax.Array | None = None,  # [..., D]
) -> jax.Array:
  """What each head thinks of the token it guesses: [..., K, R] float32.

  Heads that `init` made give the target's own logits, to the last bit of a
  product of the same shape.

  Args:
    heads: The form.
    params: Of the heads.
    hidden: States of the target, from `transformer.apply_fn` with the form's
      layers.
    output_head: The target's head.
    target: What it reads: the target's parameters, or with a vocabulary those
      of `draft_vocabulary.head`.
    previous: The target's embeddings of the token before each guess, for heads
      with a Markov bias.
    token: The target's embedding of the token after that of `hidden`, for heads
      that see it.

  Raises:
    ValueError: `previous` or `token` is missing, or the heads have no use for
      it.
  """
  _check(heads, previous, token)
  own = [params[f'head_{k}'] for k in range(heads.count)]
  states = _states(heads, params, hidden, token)
  if heads.own:
    each = [
      output_head(one['output'], states[..., k, :]) for k, one in enumerate(own)
    ]
    scores = jnp.stack(each, axis=-2)
  else:
    # One product for all heads: it reads the table once.
    scores = output_head(target, states)
  if heads.rank:
    each = [_through(states[..., k, :], one) for k, one in enumerate(own)]
    scores += jnp.stack(each, axis=-2)
  if heads.markov:
    scores += markov_bias(params, previous)
  return scores


def confidence(
  heads: Heads,
  params: Params,
  hidden: jax.Array,  # [..., (1 + F) D]
  previous: jax.Array | None = None,  # [..., K, D]
  token: jax.Array | None = None,  # [..., D]
) -> jax.Array:
  """How likely each head's guess is to be kept, as logits: [..., K] float32.

  Args:
    heads: The form, with `confidence`.
    params: Of the heads.
    hidden: As for `logits`.
    previous: As for `logits`. A guess is judged before it is known, by the
      tokens before it alone.
    token: As for `logits`.

  Raises:
    ValueError: As `logits` does.
  """
  _check(heads, previous, token)
  seen = _states(heads, params, hidden, token)
  if previous is not None:
    before = linear(previous, params['markov']['down']['kernel'])
    seen = jnp.concatenate([seen, before], axis=-1)
  # Heads learn to guess as they would if nothing were asked of them here.
  seen = lax.stop_gradient(seen)
  judged = []
  for k in range(heads.count):
    one = params[f'head_{k}']['confidence']
    judged.append(linear(seen[..., k, :], one['kernel'], one['bias']))
  return jnp.concatenate(judged, axis=-1).astype(jnp.float32)


def markov_bias(params: Params, previous: jax.Array) -> jax.Array:
  """U P e_y for embeddings e_y [..., D]: what to add to logits [..., R]."""
  return _through(previous, params['markov'])


def _check(heads: Heads, previous: Any, token: Any) -> None:
  seen = ('previous', previous, heads.markov), ('token', token, heads.token)
  for name, value, wanted in seen:
    if (value is not None) != bool(wanted):
      raise ValueError(
        f'{name} must be given if and only if the heads see it, got'
        f' {"none" if value is None else "some"} for {heads}.'
      )


def final_state(heads: Heads, hidden: jax.Array) -> jax.Array:
  """h_t [..., D] of states [..., (1 + F) D] that the heads read."""
  return jnp.split(hidden, 1 + len(heads.layers), axis=-1)[0]


def _start(
  heads: Heads, params: Params, hidden: jax.Array, token: jax.Array | None
) -> jax.Array:
  """What every head begins from: [..., D]."""
  if 'trunk' not in params:
    return hidden
  seen = jnp.split(hidden, 1 + len(heads.layers), axis=-1)
  if token is not None:
    seen.append(token)
  wide = [x.astype(jnp.float32) for x in seen]
  normed = [jax.nn.standardize(x, mean=0.0, epsilon=1e-6) for x in wide]
  joined = jnp.concatenate(normed, axis=-1).astype(hidden.dtype)
  return seen[0] + jax.nn.silu(linear(joined, params['trunk']['kernel']))


def _states(
  heads: Heads, params: Params, hidden: jax.Array, token: jax.Array | None
) -> jax.Array:
  """x_k of every head: [..., K, D]."""
  start = _start(heads, params, hidden, token)
  states = []
  for k in range(heads.count):
    x = start
    for i in range(heads.blocks):
      block = params[f'head_{k}'][f'block_{i}']
      x = x + jax.nn.silu(linear(x, block['kernel']))
    states.append(x)
  return jnp.stack(states, axis=-2)


def _factors(key: jax.Array, width: int, rank: int, size: int) -> Params:
  """Two factors of a product [D, R] that begins as zero."""
  down = jax.random.normal(key, (width, rank)) * width**-0.5
  return {
    'down': {'kernel': down},
    'up': {'kernel': jnp.zeros((rank, size))},
  }


def _through(x: jax.Array, factors: Params) -> jax.Array:
  down = linear(x, factors['down']['kernel'])
  return linear(down, factors['up']['kernel'])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedHeads:
  """Heads of one target, and the trees that suit them.

  Attributes:
    form: Of the heads.
    params: Their parameters.
    vocabulary: [R] tokens that they may guess, if the form has a vocabulary.
    trees: Shapes of drafts to choose from, each of another size.
    least_chance: See `medusa_drafter.Medusa`.
    head: Parameters of a head [R] of its own, stored in another way than the
      target's rows, which None takes; see `quantized_drafts`.
  """

  form: Heads
  params: Params
  vocabulary: jax.Array | None = None
  trees: tuple[TokenTree, ...]
  least_chance: float = 0.0
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
