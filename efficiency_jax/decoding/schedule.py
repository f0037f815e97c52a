"""How many tokens to draft next: the adaptive draft length.

A round that drafts G tokens costs `costs[G]` seconds, measured on this machine,
and emits `(1 - a^(g+1)) / (1 - a)` tokens in a row whose drafts are accepted
with probability a and that can draft g <= G (equation 1 of arXiv 2211.17192).
Every round the length with the most expected worth per second over the live
rows is taken from a small compiled set. A batch ends with its slowest row, so a
token of a row is worth `(remaining / most remaining) ^ urgency`: tokens that a
row wins while others are behind it end nothing sooner. While prompts wait for a
place in the batch all tokens are worth the same. Length 0 is plain decoding, so
a row that accepts nothing soon costs what plain decoding costs.

Nor does a prompt pay for the tries: a round is run only if it may fail and the
time since the beginning is still within (1 + loss) of what plain decoding would
have taken to come as far (`affordable`). By the table of costs no generation is
slower than that, whatever the drafts are. Where prompts waited for a place,
that holds of two parts: until the last of them has one, and from then on.

The choice looks at committed tokens and past verdicts only. A rule that looked
at the draft to decide how much of it to verify would bias sampled text.
"""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficiency_jax.decoding import cost_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """The compiled draft lengths and how acceptance is estimated.

  Acceptance of a (row, kind of draft) is a Beta posterior mean whose counts
  fade, so that it follows a text that changes and tries again after failures.

  Attributes:
    lengths: Draft lengths to compile, ascending; one length is a fixed draft.
    prior: Acceptance assumed of a kind of draft before any was seen, one for
      every kind; the last stands for those not listed.
    prior_weight: How many observations the prior is worth.
    decay: What a round leaves of the counts of the kind it observed.
    recovery: What every round leaves of all counts.
    margin: What a draft must promise beyond plain decoding, as a share: costs
      and acceptance are estimates, and plain decoding never loses.
    loss: What drafts may cost beyond plain decoding, as a share of its time.
    urgency: How fast the worth of a token falls with its row's lead over the
      slowest row; 0 counts all tokens alike.
  """

  lengths: tuple[int, ...] = (4,)
  prior: tuple[float, ...] = (0.5,)
  prior_weight: float = 2.0
  decay: float = 0.85
  recovery: float = 0.995
  margin: float = 0.05
  loss: float = 0.05
  urgency: float = 16.0

  def __post_init__(self):
    if not self.lengths or any(g < 0 for g in self.lengths):
      raise ValueError(
        f'draft lengths must be >= 0 and at least one, got {self.lengths}.'
      )
    if tuple(sorted(set(self.lengths))) != self.lengths:
      raise ValueError(f'draft lengths must ascend, got {self.lengths}.')
    for name in ('urgency', 'loss'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name} must be >= 0, got {getattr(self, name)}.')
    if not all(0 < p < 1 for p in self.prior) or not self.prior:
      raise ValueError(f'prior must be inside (0, 1), got {self.prior}.')

  @property
  def longest(self) -> int:
    """The largest draft length."""
    return self.lengths[-1]


class Estimate(NamedTuple):
  """Faded counts of accepted and refused draft tokens."""

  accepted: jax.Array  # [B, kinds] float32
  refused: jax.Array  # [B, kinds] float32


class Account(NamedTuple):
  """What rounds were run since the beginning, and what they brought.

  A place of the batch keeps its tokens when another row takes it.
  """

  rounds: jax.Array  # [len(lengths)] int32, of each draft length
  tokens: jax.Array  # [B] int32, committed


def init(batch: int, num_kinds: int) -> Estimate:
  """Nothing observed yet."""
  zeros = jnp.zeros((batch, num_kinds), jnp.float32)
  return Estimate(zeros, zeros)


def observe(
  schedule: Schedule,
  estimate: Estimate,
  kind: jax.Array,  # [B] int32
  accepted: jax.Array,  # [B] int32
  tested: jax.Array,  # [B] int32: accepted, and the refused one if any
) -> Estimate:
  """Counts a round; rows with `tested` 0 only recover."""
  kinds = jnp.arange(estimate.accepted.shape[1])
  hit = (kinds == kind[:, None]) & (tested > 0)[:, None]
  fade = schedule.recovery * jnp.where(hit, schedule.decay, 1.0)
  add = lambda old, new: old * fade + jnp.where(hit, new[:, None], 0)
  return Estimate(
    add(estimate.accepted, accepted), add(estimate.refused, tested - accepted)
  )


def choose(
  schedule: Schedule,
  estimate: Estimate,
  kind: jax.Array,  # [B] int32
  count: jax.Array,  # [B] int32, tokens that the drafter can draft
  remaining: jax.Array,  # [B] int32, tokens left in the budget; 0 is done
  costs: jax.Array,  # [len(lengths)] seconds of one round
  heights: Sequence[int] | None = None,
  allowed: jax.Array | None = None,  # [len(lengths)] bool; None allows all
  waiting: jax.Array | bool = False,  # [] bool, whether prompts wait for a row
) -> jax.Array:
  """Index into `schedule.lengths` of the best expected rate: [] int32.

  `heights` says how many tokens a draft of each length may win; None takes the
  lengths. For trees they are fewer, and acceptance is that of a level.
  """
  slowest = jnp.maximum(remaining.max(), 1)
  urgency = jnp.where(waiting, 0.0, schedule.urgency)
  worth = (remaining / slowest) ** urgency
  worth = jnp.where(remaining > 0, worth, 0.0)[:, None]
  num_kinds = estimate.accepted.shape[1]
  prior = jnp.asarray(
    [schedule.prior[min(k, len(schedule.prior) - 1)] for k in range(num_kinds)]
  )
  total = estimate.accepted + estimate.refused + schedule.prior_weight
  alpha = (estimate.accepted + schedule.prior_weight * prior) / total
  alpha = jnp.take_along_axis(alpha, kind[:, None], axis=1)  # [B, 1]
  lengths = jnp.asarray(schedule.lengths, jnp.float32)
  most = lengths if heights is None else jnp.asarray(heights, jnp.float32)
  usable = jnp.minimum(most, count[:, None].astype(jnp.float32))
  tokens = cost_model.expected_tokens(jnp.minimum(alpha, 0.999), usable)
  rate = (worth * tokens).sum(0) / costs
  rate = jnp.where(lengths == 0, rate * (1 + schedule.margin), rate)
  if allowed is not None:
    rate = jnp.where(allowed, rate, -1.0)
  return jnp.argmax(rate).astype(jnp.int32)


def affordable(
  schedule: Schedule,
  costs: jax.Array,  # [len(lengths)] seconds of one round
  account: Account,
  live: jax.Array,  # [B] bool, rows that go on
  waiting: jax.Array | bool = False,  # [] bool, whether prompts wait for a row
) -> jax.Array:
  """Lengths whose next round keeps drafts from being a loss: [len(lengths)].

  With c_G = costs[G] / costs[0], S = sum_G rounds[G] c_G, the time so far in
  plain rounds, and e the tokens of the live place that has fewest,

      S + c_G <= (1 + loss) (e + 1)

  for a row gains one token at least. Plain decoding needs as many rounds as the
  row that ends last has tokens from where the account began, and at its last
  round that row was live. While prompts wait no place is idle, plain decoding
  commits a token in each of them a round, and e is the mean of all. The first
  length, plain decoding, may always be run: it keeps what holds.
  """
  relative = costs / costs[0]
  tokens = account.tokens
  fewest = jnp.where(live, tokens, jnp.iinfo(jnp.int32).max - 1).min()
  come = jnp.where(waiting, tokens.mean(), fewest)
  spent = (account.rounds * relative).sum()
  within = spent + relative <= (1 + schedule.loss) * (come + 1)
  return within.at[0].set(True)
