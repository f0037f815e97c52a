"""Draft-and-verify decoding: the one decoding loop.

A round drafts G tokens, scores them in one pass of the target, and commits the
prefix that a verifier keeps plus one token of the target (Leviathan et al.,
arXiv 2211.17192). With `drafters.Nothing` and G = 0 it is plain decoding.

A whole generation is one compiled `lax.while_loop` over a batch whose rows have
their own lengths, budgets and ends. Between rounds, for every row,

    the cache holds exactly the positions `0 .. length - 2`,

so the last committed token is always the first one fed, rolling back after a
refusal is setting a number, and rows may accept differently. While prompts wait
for a place the loop stops as soon as a row ends, and another row takes its
place (`replace`): continuous batching (Yu et al., Orca, OSDI 2022).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import sampling as sampling_lib
from efficiency_jax.decoding import schedule as schedule_lib
from efficiency_jax.decoding.drafters import Context
from efficiency_jax.decoding.drafters import Features
from efficiency_jax.decoding.drafters import Forecast
from efficiency_jax.decoding.drafters import Weights
from efficiency_jax.decoding.dynamic_tree import Forest
from efficiency_jax.decoding.prefill import prefill
from efficiency_jax.decoding.sampling import Sampling
from efficiency_jax.decoding.verifiers import GREEDY
from efficiency_jax.decoding.verifiers import Proposal
from efficiency_jax.decoding.verifiers import Tree
from efficiency_jax.decoding.verifiers import Verdict
from efficiency_jax.decoding.verifiers import Verifier
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.types import ApplyFn
from efficiency_jax.types import Cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
  """The static choices of a decoding loop; hashable.

  Attributes:
    apply: The target model.
    drafter: Proposes tokens.
    verifier: Decides; `GREEDY` only where all rows are greedy.
    schedule: Draft lengths. Several lengths are chosen among adaptively. The
      length of a tree is the number of its draft tokens.
  """

  apply: ApplyFn
  drafter: Any = drafters.Nothing()
  verifier: Verifier = GREEDY
  schedule: schedule_lib.Schedule = schedule_lib.Schedule(lengths=(0,))

  def __post_init__(self):
    drafts = not isinstance(self.drafter, drafters.Nothing)
    if drafts and self.schedule.longest < 1:
      raise ValueError(
        f'draft length must be >= 1 with a drafter ({self.drafter.name}).'
      )
    for length in self.schedule.lengths:
      tree = self.drafter.tree(length)
      if not (tree.is_chain or self.verifier.takes_trees):
        raise ValueError(
          f"verifier {self.verifier.name!r} takes no trees; use 'greedy',"
          " 'coupled' or 'typical'."
        )

  @property
  def slack(self) -> int:
    """Slots beyond the longest text that a round may write."""
    return self.schedule.longest + 1


class Counters(NamedTuple):
  """What happened in each row, counted up to its end token or budget."""

  runs: jax.Array  # [B] int32, passes of the target
  drafted: jax.Array  # [B] int32, draft tokens that were put to the target
  accepted: jax.Array  # [B] int32, those that it kept
  tested_at: jax.Array  # [B, G] int32, runs that reached this draft position
  accepted_at: jax.Array  # [B, G] int32, and kept its token


class State(NamedTuple):
  """Everything a generation carries from round to round."""

  tokens: jax.Array  # [B, N] int32, prompt, text, then anything
  length: jax.Array  # [B] int32, committed tokens
  limit: jax.Array  # [B] int32, `length` never passes it
  stop: jax.Array  # [K] int32, tokens that end a row and are kept; -1 is none
  done: jax.Array  # [B] bool
  keys: jax.Array  # [B] typed keys
  sampling: Sampling
  cache: Cache
  draft: Any  # the drafter's own
  forecast: Forecast
  estimate: schedule_lib.Estimate
  counters: Counters
  account: schedule_lib.Account
  accepted_draft: jax.Array  # [B, N] bool, token came from an accepted draft
  run: jax.Array  # [B, N] int32, which pass of the row committed the token
  refused: jax.Array  # [B, N] int32, draft token refused here, or -1


def start(
  decoder: Decoder,
  weights: Weights,
  tokens: jax.Array,  # [B, N] int32, right-padded prompts
  length: jax.Array,  # [B] int32, prompt lengths, at least 1
  limit: jax.Array,  # [B] int32, prompt length + budget
  stop: jax.Array,  # [K] int32
  sampling: Sampling,
  keys: jax.Array,  # [B] typed keys
  cache: Cache,  # empty
) -> State:
  """Runs target and drafter over the prompts.

  `N` must be at least `limit.max() + decoder.slack`, and the cache must have
  that many slots and `prefill.slots_for(length.max())`.
  """
  if decoder.verifier is GREEDY and not sampling_lib.is_greedy(sampling):
    raise ValueError("verifier 'greedy' needs temperature 0 in every row.")
  # Not one jitted program: decoders of one target share the compiled prefill.
  cache, hidden = prefill(
    decoder.apply,
    weights.target,
    tokens,
    length,
    cache,
    keep_hidden=decoder.drafter.needs_features,
  )
  context = Context(tokens, length, keys, sampling)
  longest = decoder.schedule.longest
  draft = decoder.drafter.init(weights, context, longest, hidden)
  return _first_state(decoder, context, limit, stop, cache, draft)


@functools.partial(
  jax.jit, static_argnames=('decoder',), donate_argnames=('cache', 'draft')
)
def _first_state(
  decoder: Decoder,
  context: Context,
  limit: jax.Array,
  stop: jax.Array,
  cache: Cache,
  draft: Any,
) -> State:
  tokens, length, keys, sampling = context
  batch, longest = tokens.shape[0], decoder.schedule.longest
  draft, forecast = decoder.drafter.observe(draft, context, longest, None)
  zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
  counters = Counters(
    zeros(batch),
    zeros(batch),
    zeros(batch),
    zeros(batch, longest),
    zeros(batch, longest),
  )
  account = schedule_lib.Account(
    zeros(len(decoder.schedule.lengths)), zeros(batch)
  )
  return State(
    tokens=tokens,
    length=length,
    limit=limit,
    stop=stop,
    done=length >= limit,
    keys=keys,
    sampling=sampling,
    cache=cache,
    draft=draft,
    forecast=forecast,
    estimate=schedule_lib.init(batch, decoder.drafter.num_kinds),
    counters=counters,
    account=account,
    accepted_draft=jnp.zeros(tokens.shape, bool),
    run=jnp.zeros(tokens.shape, jnp.int32),
    refused=jnp.full(tokens.shape, -1, jnp.int32),
  )


@functools.partial(jax.jit, static_argnames=('decoder',), donate_argnums=(2,))
def run(
  decoder: Decoder,
  weights: Weights,
  state: State,
  max_rounds: jax.Array,  # [] int32
  costs: jax.Array,  # [len(lengths)] seconds of a round of each draft length
  forced: jax.Array,  # [] int32, index of a length to use always, or -1
  waiting: jax.Array,  # [] bool, whether prompts wait for a place
) -> State:
  """Decodes until every row is done, or for `max_rounds` rounds.

  If prompts wait it stops as soon as any row is done.

  A stopped generation goes on from the returned state, which is how text is
  streamed: the rounds are the same whether or not they are interrupted.
  """
  lengths = decoder.schedule.lengths
  heights = [decoder.drafter.tree(g).height for g in lengths]

  def live(carry):
    state, rounds, _ = carry
    done = state.done
    over = jnp.where(waiting, done.any(), done.all())
    return ~over & (rounds < max_rounds)

  def choice(state):
    if len(lengths) == 1:
      return jnp.int32(0)
    chosen = schedule_lib.choose(
      decoder.schedule,
      state.estimate,
      state.forecast.kind,
      state.forecast.count,
      jnp.where(state.done, 0, state.limit - state.length),
      costs,
      heights,
      schedule_lib.affordable(
        decoder.schedule,
        costs,
        state.account,
        ~state.done,
        waiting,
      ),
      waiting,
    )
    last = len(lengths) - 1
    return jnp.where(forced >= 0, jnp.minimum(forced, last), chosen)

  def rounds_of(index, carry):
    """Rounds of one draft length, for as long as it is the choice."""

    def body(carry):
      state, rounds, _ = carry
      state = _round(decoder, weights, state, index)
      return state, rounds + 1, choice(state)

    chosen = lambda carry: live(carry) & (carry[2] == index)
    return lax.while_loop(chosen, body, carry)

  # A `lax.switch` over the lengths would copy the cache into every branch;
  # loops entered one after another update it in place.
  def any_length(carry):
    for index in range(len(lengths)):
      carry = rounds_of(index, carry)
    return carry

  carry = (state, jnp.int32(0), choice(state))
  if len(lengths) > 1:
    carry = lax.while_loop(live, any_length, carry)
  else:
    carry = rounds_of(0, carry)
  return carry[0]


@functools.partial(jax.jit, donate_argnames=('state',))
def replace(state: State, place: jax.Array, row: State) -> State:
  """Puts another row, the only one of a state, in a place of the batch.

  All that the row's own loop would read comes along, so that its tokens are
  those that it would get alone. Buffers must have the same size.
  """
  batch = state.length.shape[0]
  row = row._replace(stop=state.stop, account=state.account)

  def put(whole, one):
    pairs = zip(whole.shape, one.shape, strict=True)
    axes = [axis for axis, (many, few) in enumerate(pairs) if many != few]
    if not axes:  # what all rows share, or the one row
      return one if batch == 1 else whole
    return lax.dynamic_update_slice_in_dim(whole, one, place, axes[0])

  return jax.tree.map(put, state, row)


def _round(
  decoder: Decoder, weights: Weights, state: State, index: int
) -> State:
  """Draft, score, verify, commit."""
  drafted = decoder.schedule.lengths[index]
  tree = decoder.drafter.tree(drafted)
  context = Context(state.tokens, state.length, state.keys, state.sampling)
  proposal, draft, cache = _propose(decoder, weights, state, context, drafted)
  if proposal.parents is not None:
    tree = Forest(proposal.parents, tree.height)

  anchor = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
  fed = jnp.concatenate([anchor, proposal.tokens], axis=1)
  ancestors = None if tree.is_chain else jnp.asarray(tree.ancestors)
  output, cache = decoder.apply(weights.target, fed, cache, ancestors=ancestors)
  seen = None
  if state.sampling.repetition_penalty is not None:
    seen = _seen(state, proposal.tokens, tree, output.logits.shape[-1])
  # Of a point mass the arg max would be looked for twice.
  process = sampling_lib.processed_logits
  if decoder.verifier is GREEDY:
    process = sampling_lib.penalized
  logits = process(output.logits, state.sampling, seen)
  verdict = decoder.verifier.verify(
    state.keys, state.length, logits, proposal, tree
  )
  put, hidden = proposal.count, output.hidden
  if not tree.is_chain:
    proposal, path = _along_path(proposal, verdict, tree)
    hidden = jnp.take_along_axis(hidden, path[..., None], axis=1)
    cache = kv_cache.keep(cache, state.length - 1, path)

  before = state.length
  state = state._replace(draft=draft, cache=cache)
  state = _commit(decoder, state, proposal, put, verdict, index)
  context = context._replace(tokens=state.tokens, length=state.length)
  draft, forecast = decoder.drafter.observe(
    state.draft,
    context,
    decoder.schedule.longest,
    Features(hidden, state.length - before),
  )
  return state._replace(draft=draft, forecast=forecast)


def _along_path(proposal: Proposal, verdict: Verdict, tree: Tree):
  """The accepted path of a tree as a chain, and its nodes [B, height + 1].

  The chain goes on where the path was left: to the first child, as the token
  that was refused.
  """
  path = tree.path_to(verdict.node)
  tokens = jnp.take_along_axis(proposal.tokens, path[:, 1:] - 1, axis=1)
  refused = tree.has_children(verdict.node) & (proposal.count > 0)
  return Proposal(tokens, verdict.num_accepted + refused, None), path


def _propose(decoder, weights, state, context, drafted: int):
  if drafted == 0:
    batch = state.length.shape[0]
    nothing = jnp.zeros((batch, 0), jnp.int32)
    count = jnp.zeros((batch,), jnp.int32)
    return Proposal(nothing, count, None), state.draft, state.cache
  return decoder.drafter.propose(
    weights,
    state.draft,
    state.cache,
    context,
    drafted,
    decoder.verifier.draft_purpose,
  )


def _seen(
  state: State, draft: jax.Array, tree: Tree, vocab_size: int
) -> jax.Array:
  """Tokens before each scored position, drafts included: [B, G + 1, V]."""
  base = sampling_lib.seen_tokens(state.tokens, state.length, vocab_size)
  one_hot = jax.nn.one_hot(draft, vocab_size, dtype=jnp.float32)
  above = jnp.asarray(tree.ancestors[..., 1:], jnp.float32)
  earlier = above @ one_hot > 0
  return base[:, None] | earlier


def _commit(
  decoder: Decoder,
  state: State,
  proposal: Proposal,
  put: jax.Array,
  verdict: Verdict,
  index: int,
) -> State:
  """Appends what stands, cut at the first stop token and at the budget.

  `proposal` is a chain; `put` [B] counts the drafts that the target saw, which
  for a tree are more.
  """
  width = proposal.tokens.shape[1] + 1
  slot = jnp.arange(width)
  n = verdict.num_accepted[:, None]
  padded = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
  block = jnp.where(slot < n, padded, verdict.next_token[:, None])  # [B, G + 1]

  stop = (block[..., None] == state.stop).any(-1) & (slot <= n)
  stops = stop.any(axis=1)
  count = jnp.where(stops, jnp.argmax(stop, axis=1) + 1, n[:, 0] + 1)
  count = jnp.minimum(count, state.limit - state.length)
  count = jnp.where(state.done, 0, count)
  ended = stop & (slot < count[:, None])
  length = state.length + count

  kept = slot < count[:, None]
  meant = jnp.arange(width - 1) < proposal.count[:, None]
  # Where the block is cut short, later drafts were neither kept nor refused.
  reached = (slot[:-1] <= n) & kept[:, :-1] & meant
  accepted = (slot[:-1] < n) & kept[:, :-1] & meant
  cut = count <= verdict.num_accepted
  drafted = jnp.where(cut, accepted.sum(1), put)
  drafted = jnp.where(state.done, 0, drafted)
  refused = jnp.where(
    (slot == n) & (slot < proposal.count[:, None]) & kept, padded, -1
  )

  counters = state.counters
  counters = counters._replace(
    runs=counters.runs + ~state.done,
    drafted=counters.drafted + drafted,
    accepted=counters.accepted + accepted.sum(1),
    tested_at=counters.tested_at.at[:, : width - 1].add(reached),
    accepted_at=counters.accepted_at.at[:, : width - 1].add(accepted),
  )
  account = schedule_lib.Account(
    state.account.rounds.at[index].add(1), state.account.tokens + count
  )
  run_index = jnp.broadcast_to(counters.runs[:, None], block.shape)
  return state._replace(
    tokens=_write(state.tokens, block, state.length),
    accepted_draft=_write(state.accepted_draft, slot < n, state.length),
    run=_write(state.run, run_index, state.length),
    refused=_write(state.refused, refused, state.length),
    length=length,
    done=state.done | ended.any(axis=1) | (length >= state.limit),
    cache=state.cache._replace(length=length - 1),
    estimate=schedule_lib.observe(
      decoder.schedule,
      state.estimate,
      state.forecast.kind,
      accepted.sum(1),
      reached.sum(1),
    ),
    counters=counters,
    account=account,
  )


def _write(buffer: jax.Array, block: jax.Array, at: jax.Array) -> jax.Array:
  """Row b of `block` into row b of `buffer` from slot `at[b]` on."""
  one = lambda row, new, s: lax.dynamic_update_slice(row, new, (s,))
  return jax.vmap(one)(buffer, block.astype(buffer.dtype), at)
