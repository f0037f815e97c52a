"""Rules that decide how much of a draft the target keeps.

Each gets the target's processed logits at the drafted positions and one more
(`GREEDY` those that are only penalized, which have the same arg max),
and says how many draft tokens stand and which token follows them. All emit at
least one token, and each keeps a stated promise:

* `GREEDY`: the text is the arg max text of the target.
* `TOKEN`: the text has exactly the target's distribution (Leviathan et al.,
  arXiv 2211.17192, algorithm 1).
* `BLOCK`: the same, and no valid rule that sees only the block accepts more
  (Sun et al., arXiv 2403.10444, algorithm 2).
* `COUPLED`: the text is the one that plain sampling with the same seed gives,
  whatever the drafter and the draft length (arXiv 2408.07978).
* `TYPICAL`: no promise but for greedy rows, whose text is the arg max text. It
  keeps what the target finds likely enough (Medusa, arXiv 2401.10774).

`GREEDY` and `COUPLED` take one token of the target at every node of a tree and
follow the child that equals it, so they, and `TYPICAL`, verify trees of tokens
as they verify chains. `TOKEN` and `BLOCK` are rules for chains.
"""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.decoding import sampling
from efficiency_jax.decoding.dynamic_tree import Forest
from efficiency_jax.decoding.sampling import Purpose
from efficiency_jax.decoding.token_tree import TokenTree

# One tree for all rows, or one for each.
Tree = TokenTree | Forest


class Proposal(NamedTuple):
  """A draft: G tokens a row, of which the first `count[b]` are meant.

  They are the nodes 1 .. G of a tree of tokens, in its order; mostly a chain.
  """

  tokens: jax.Array  # [B, G] int32
  count: jax.Array  # [B] int32 in [0, G]
  # Processed logits of q, the distribution that each token was sampled from;
  # None where the draft is deterministic, a point mass.
  logits: jax.Array | None  # [B, G, V] float32
  # Of the nodes 0 .. G, where the tree is known only now; see `Forest`.
  parents: jax.Array | None = None  # [B, G + 1] int32


class Verdict(NamedTuple):
  """What the target said about one draft."""

  num_accepted: jax.Array  # [B] int32 in [0, count]
  next_token: jax.Array  # [B] int32: the correction, or the bonus token
  node: jax.Array  # [B] int32, where in the tree the last accepted one stands


@dataclasses.dataclass(frozen=True)
class Verifier:
  """A rule, what it guarantees, and the noise that its drafter must use.

  `verify(keys, position, logits, proposal, tree)` takes typed row keys [B], the
  position [B] of the first drafted token, the target's processed logits
  [B, G + 1, V], one for every node, the proposal and its tree of G + 1 nodes.
  Rules that do not take trees are given chains.
  """

  name: str
  guarantee: str  # 'greedy', 'distribution', 'seed' or 'none'
  draft_purpose: Purpose
  verify: Callable[[jax.Array, jax.Array, jax.Array, Proposal, Tree], Verdict]
  takes_trees: bool


def _greedy(keys, position, logits, proposal: Proposal, tree) -> Verdict:
  del keys, position
  choice = sampling.arg_max(logits)
  return _follow(choice, proposal, tree)


def _coupled(keys, position, logits, proposal: Proposal, tree) -> Verdict:
  return _follow(_sampled(keys, position, logits, tree), proposal, tree)


# Of Medusa: the most that a token's probability must pass, and the share of
# exp(-entropy) that is enough where the target is unsure.
_EPSILON, _DELTA = 0.09, 0.3


def _typical(keys, position, logits, proposal: Proposal, tree) -> Verdict:
  log_p = jax.nn.log_softmax(logits, axis=-1)
  p = jnp.exp(log_p)
  entropy = -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)
  threshold = jnp.minimum(_EPSILON, _DELTA * jnp.exp(-entropy))  # [B, N]
  likelihood = _at(tree.at_parents(log_p), proposal.tokens)
  kept = jnp.exp(likelihood) > tree.at_parents(threshold)
  choice = _sampled(keys, position, logits, tree)
  return _deepest(kept, choice, proposal, tree, likelihood)


def _token(keys, position, logits, proposal: Proposal, tree) -> Verdict:
  del tree
  p, q, meant = _distributions(logits, proposal)
  uniform = _uniforms(keys, position, meant.shape[1])
  p_token, q_token = (_at(x[:, :-1], proposal.tokens) for x in (p, q))
  # u q < p and not u < p / q: nothing to divide by where q is zero.
  accepted = (uniform * q_token < p_token) & meant
  num_accepted = jnp.cumprod(accepted, axis=-1).sum(axis=-1)
  residual = jnp.maximum(_row(p, num_accepted) - _row(q, num_accepted), 0.0)
  fallback = _row(p, num_accepted)
  return _correct(keys, position, num_accepted, residual, fallback)


def _block(keys, position, logits, proposal: Proposal, tree) -> Verdict:
  del tree
  p, q, meant = _distributions(logits, proposal)
  drafted = meant.shape[1]
  uniform = _uniforms(keys, position, drafted)
  p_token, q_token = (_at(x[:, :-1], proposal.tokens) for x in (p, q))
  ratio = p_token / jnp.where(q_token > 0, q_token, 1.0)

  # The paper's p_i, the weight of the prefix of i tokens: [B, G + 1].
  weights = [jnp.ones(position.shape, jnp.float32)]
  for i in range(drafted):
    weights.append(jnp.minimum(weights[-1] * ratio[:, i], 1.0))
  weight = jnp.stack(weights, axis=1)
  residuals = jnp.maximum(weight[..., None] * p - q, 0.0)  # [B, G + 1, V]

  # h_i = S_i / (S_i + 1 - p_i) with S_i the residual mass after i tokens; the
  # last token meant has h = p. u (S + 1 - p) < S needs no division.
  mass = residuals.sum(-1)[:, 1:]
  inner = uniform * (mass + (1.0 - weight[:, 1:])) < mass
  is_last = jnp.arange(1, drafted + 1) == proposal.count[:, None]
  kept = jnp.where(is_last, uniform < weight[:, 1:], inner) & meant
  # The longest prefix whose test passed, whatever the tests before it said.
  num_accepted = jnp.max(
    jnp.where(kept, jnp.arange(1, drafted + 1), 0), axis=-1, initial=0
  )
  # After the whole draft q is zero, and the residual is p but for a factor.
  residual = _row(residuals, num_accepted)
  fallback = _row(p, num_accepted)
  return _correct(keys, position, num_accepted, residual, fallback)


GREEDY = Verifier('greedy', 'greedy', Purpose.SAMPLE, _greedy, True)
TOKEN = Verifier('token', 'distribution', Purpose.DRAFT, _token, False)
BLOCK = Verifier('block', 'distribution', Purpose.DRAFT, _block, False)
COUPLED = Verifier('coupled', 'seed', Purpose.SAMPLE, _coupled, True)
TYPICAL = Verifier('typical', 'none', Purpose.SAMPLE, _typical, True)
VERIFIERS = {v.name: v for v in (GREEDY, TOKEN, BLOCK, COUPLED, TYPICAL)}


def named(name: str) -> Verifier:
  """The verifier called `name`; a ValueError lists the names there are."""
  if name not in VERIFIERS:
    raise ValueError(
      f'verifier {name!r} is unknown; there are {", ".join(VERIFIERS)}.'
    )
  return VERIFIERS[name]


def _sampled(keys, position, logits, tree: Tree) -> jax.Array:
  """What plain sampling would take at each node: [B, N] int32.

  Nodes of one depth share their noise, which belongs to the place in the text.
  """
  positions = position[:, None] + tree.depth
  keys = sampling.position_keys(keys, positions, Purpose.SAMPLE)
  return sampling.draw(keys, logits)


def _follow(choice: jax.Array, proposal: Proposal, tree: Tree) -> Verdict:
  """Accepts while drafts equal the target's own choice [B, N] before them."""
  same = proposal.tokens == tree.at_parents(choice)
  return _deepest(same, choice, proposal, tree)


def _deepest(
  kept: jax.Array,  # [B, N - 1] bool, whether a node may follow its parent
  choice: jax.Array,  # [B, N] int32, the target's token after each node
  proposal: Proposal,
  tree: Tree,
  likelihood: jax.Array | None = None,  # [B, N - 1] float32, of each node
) -> Verdict:
  """The deepest node that stands with all its ancestors.

  Of several the likeliest path, or the first node.
  """
  meant = jnp.arange(kept.shape[1]) < proposal.count[:, None]
  root = ((0, 0), (1, 0))
  kept = jnp.pad(kept & meant, root, constant_values=True)
  stands = jnp.all(kept[:, None] | ~tree.ancestors, axis=-1)
  depth = jnp.where(stands, tree.depth.astype(np.int32), -1)
  num_accepted = depth.max(axis=1)
  best = depth == num_accepted[:, None]
  if likelihood is not None:
    path = jnp.where(tree.ancestors, jnp.pad(likelihood, root)[:, None], 0.0)
    best = jnp.where(best, path.sum(-1), -jnp.inf)
  node = jnp.argmax(best, axis=1).astype(jnp.int32)
  return Verdict(num_accepted, _at(choice, node[:, None])[:, 0], node)


def _distributions(logits, proposal: Proposal):
  """p and q, both [B, G + 1, V], and which drafts are meant [B, G].

  q is zero beyond the draft, where the residual max(p - q, 0) then is p.
  """
  p = jax.nn.softmax(logits, axis=-1)
  meant = jnp.arange(proposal.tokens.shape[1]) < proposal.count[:, None]
  if proposal.logits is None:
    q = jax.nn.one_hot(proposal.tokens, logits.shape[-1], dtype=p.dtype)
  else:
    q = jax.nn.softmax(proposal.logits, axis=-1)
  q = jnp.where(meant[..., None], q, 0.0)
  return p, jnp.pad(q, ((0, 0), (0, 1), (0, 0))), meant


def _uniforms(keys, position, drafted: int) -> jax.Array:
  """One uniform in [0, 1) for the accept test of each position: [B, G]."""
  positions = position[:, None] + jnp.arange(drafted)
  keys = sampling.position_keys(keys, positions, Purpose.ACCEPT, position)
  return jax.vmap(jax.vmap(jax.random.uniform))(keys)


def _correct(keys, position, num_accepted, residual, fallback) -> Verdict:
  """Draws the token after the accepted ones from norm(residual) [B, V]."""
  # A residual of zero means p == q up to rounding: p is then right as well.
  empty = residual.sum(-1, keepdims=True) <= 0
  weights = jnp.where(empty, fallback, residual)
  positions = (position + num_accepted)[:, None]
  keys = sampling.position_keys(keys, positions, Purpose.CORRECT)
  token = sampling.draw(keys, jnp.log(weights)[:, None])[:, 0]
  return Verdict(num_accepted, token, num_accepted)


def _at(values: jax.Array, index: jax.Array) -> jax.Array:
  """Picks along the last axis: [B, G, V], [B, G] -> [B, G] and likewise 2-D."""
  expand = values.ndim > index.ndim
  index = index[..., None] if expand else index
  picked = jnp.take_along_axis(values, index, axis=-1)
  return picked[..., 0] if expand else picked


def _row(values: jax.Array, index: jax.Array) -> jax.Array:
  """Row `index` of every batch element: [B, G, V], [B] -> [B, V]."""
  return jnp.take_along_axis(values, index[:, None, None], axis=1)[:, 0]
