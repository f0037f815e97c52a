"""The verifiers keep their promises: by enumeration, and decision by decision.

`_Law` holds a context-dependent target p and draft q over a tiny vocabulary.
`_token` and `_block` are second implementations of the two rules, in numpy and
float64, that give the chance of every outcome of one draft; summed over all
drafts and continued with p they must give p's own law of the next tokens. The
compiled rules are then shown to decide like them in every cell of the cube of
uniforms, and to draw from the same weights.
"""

import collections
from collections.abc import Iterator
import functools
import itertools
from typing import NamedTuple
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding import verifiers


class _Law:
  """p and q after every prefix: two [V] each; q is None for point masses."""

  def __init__(self, vocab, drafted, seed, *, kind='random', count=None):
    rng = np.random.default_rng(seed)
    self.vocab, self.drafted = vocab, drafted
    self.count = drafted if count is None else count
    self.deterministic = kind == 'point mass'
    self.p, self.q = {}, {}
    for size in range(drafted + 2):
      for prefix in itertools.product(range(vocab), repeat=size):
        p, q = rng.dirichlet(np.full(vocab, 0.7), 2)
        if kind == 'equal' and rng.random() < 0.7:
          q = p
        if kind == 'zeros':
          p, q = (_with_a_zero(x, rng) for x in (p, q))
        if kind == 'greedy':
          p, q = (np.eye(vocab)[x.argmax()] for x in (p, q))
        if kind == 'point mass':
          q = np.eye(vocab)[rng.integers(vocab)]
        # What the compiled rule sees is float32.
        self.p[prefix], self.q[prefix] = (_rounded(x) for x in (p, q))

  def drafts(self) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every draft of `count` tokens and its chance under q."""
    for draft in itertools.product(range(self.vocab), repeat=self.count):
      chance = np.prod([self.q[draft[:i]][x] for i, x in enumerate(draft)])
      if chance > 0:
        yield draft, float(chance)

  def chain(self, prefix, size) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every continuation of `prefix` by `size` tokens and its chance."""
    for tail in itertools.product(range(self.vocab), repeat=size):
      text = prefix + tail
      yield (
        text,
        np.prod(
          [self.p[text[:i]][text[i]] for i in range(len(prefix), len(text))]
        ),
      )


def _with_a_zero(x, rng):
  x = np.where(np.arange(len(x)) == rng.integers(len(x)), 0.0, x)
  return x / x.sum()


def _rounded(x):
  """The float64 distribution that softmax(log(float32 x)) rounds."""
  x = x.astype(np.float32).astype(np.float64)
  return x / x.sum()


class _Rule(NamedTuple):
  """A rule on one draft: test i passes where uniform i < thresholds[i]."""

  thresholds: np.ndarray  # [count]
  weights: np.ndarray  # [count + 1, V] of the next token after i accepted
  needs_all: bool  # the first failure ends the prefix

  def accepted(self, passes) -> int:
    if self.needs_all:
      return int(np.cumprod(passes).sum()) if len(passes) else 0
    return max([i + 1 for i, ok in enumerate(passes) if ok], default=0)


def _normalized(residual, fallback):
  total = residual.sum()
  return residual / total if total > 0 else fallback


def _token(law: _Law, draft) -> _Rule:
  """arXiv 2211.17192, algorithm 1."""
  p = [law.p[draft[:i]] for i in range(len(draft) + 1)]
  q = [law.q[draft[:i]] for i in range(len(draft))]
  thresholds = [min(1, a[x] / b[x]) for a, b, x in zip(p, q, draft)]
  weights = [_normalized(np.maximum(a - b, 0), a) for a, b in zip(p, q)]
  return _Rule(np.array(thresholds), np.array([*weights, p[-1]]), True)


def _block(law: _Law, draft) -> _Rule:
  """arXiv 2403.10444, algorithm 2."""
  weight, thresholds, weights = 1.0, [], []
  for i in range(len(draft) + 1):
    p = law.p[draft[:i]]
    if i:
      before, x = draft[: i - 1], draft[i - 1]
      weight = min(weight * law.p[before][x] / law.q[before][x], 1.0)
    if i == len(draft):
      thresholds.append(weight)
      weights.append(p)
      continue
    residual = np.maximum(weight * p - law.q[draft[:i]], 0)
    mass = residual.sum()
    weights.append(_normalized(residual, p))
    rest = mass + 1 - weight
    thresholds.append(mass / rest if rest > 0 else 0.0)
  return _Rule(np.array(thresholds[1:]), np.array(weights), False)


_RULES = {'token': _token, 'block': _block}


def _outcomes(rule: _Rule) -> Iterator[tuple[np.ndarray, float]]:
  """Every pattern of passed tests and its chance, if that is not rounding."""
  for passes in itertools.product((True, False), repeat=len(rule.thresholds)):
    passes = np.array(passes, bool)
    chance = np.where(passes, rule.thresholds, 1 - rule.thresholds).prod()
    if chance > 1e-14:
      yield passes, float(chance)


def _emitted(law: _Law, rule_of, accepted_and_weights=None):
  """Law of the next count + 1 tokens of a round continued with p."""
  size = law.count + 1
  heads = collections.Counter()
  for draft, chance in law.drafts():
    rule = rule_of(law, draft)
    for passes, pass_chance in _outcomes(rule):
      accepted, weights = rule.accepted(passes), None
      if accepted_and_weights is not None:
        accepted, weights = accepted_and_weights[draft, tuple(passes)]
      else:
        weights = rule.weights[accepted]
      for token in range(law.vocab):
        prefix = (*draft[:accepted], token)
        heads[prefix] += chance * pass_chance * weights[token]
  emitted = collections.Counter()
  for prefix, head in heads.items():
    for text, tail in law.chain(prefix, size - len(prefix)):
      emitted[text] += head * tail
  return emitted


def _distance(law: _Law, emitted) -> float:
  """Total variation between `emitted` and p's chain law."""
  target = dict(law.chain((), law.count + 1))
  return 0.5 * sum(abs(target[t] - emitted[t]) for t in target)


def _mean_accepted(law: _Law, rule_of) -> float:
  return sum(
    chance * pass_chance * rule.accepted(passes)
    for draft, chance in law.drafts()
    for rule in [rule_of(law, draft)]
    for passes, pass_chance in _outcomes(rule)
  )


_LAWS = [
  pytest.param(*args, id='-'.join(map(str, args)))
  for args in (
    (3, 1, 'random', 1),
    (3, 2, 'random', 2),
    (2, 3, 'random', 3),
    (2, 4, 'random', 4),
    (3, 3, 'random', 3),
    (3, 3, 'equal', 3),
    (3, 3, 'zeros', 3),
    (3, 3, 'greedy', 3),
    (3, 3, 'point mass', 3),
    (2, 4, 'point mass', 4),
    # Shorter drafts than the width of the round.
    (3, 3, 'random', 2),
    (3, 3, 'random', 0),
    (2, 4, 'zeros', 2),
    (3, 3, 'point mass', 1),
  )
]
_NAMES = ('token', 'block')


@pytest.mark.parametrize('name', _NAMES)
@pytest.mark.parametrize(('vocab', 'drafted', 'kind', 'count'), _LAWS)
def test_the_rule_gives_the_law_of_the_target(
  name, vocab, drafted, kind, count
):
  for seed in range(3):
    law = _Law(vocab, drafted, seed, kind=kind, count=count)
    emitted = _emitted(law, _RULES[name])
    assert _distance(law, emitted) < 1e-12


@pytest.mark.parametrize('name', _NAMES)
@pytest.mark.parametrize(('vocab', 'drafted', 'kind', 'count'), _LAWS)
def test_the_compiled_rule_is_the_rule(name, vocab, drafted, kind, count):
  law = _Law(vocab, drafted, 0, kind=kind, count=count)
  cells = []
  for draft, _ in law.drafts():
    rule = _RULES[name](law, draft)
    for passes, _ in _outcomes(rule):
      # The middle of the cell of uniforms with this pattern.
      low = np.where(passes, 0.0, rule.thresholds)
      high = np.where(passes, rule.thresholds, 1.0)
      cells.append((draft, passes, (low + high) / 2, rule))
  accepted, weights = _verify_cells(name, law, cells)

  found = {}
  for cell, got, got_weights in zip(cells, accepted, weights, strict=True):
    draft, passes, _, rule = cell
    assert got == rule.accepted(passes), (draft, passes)
    got_weights = got_weights / got_weights.sum()
    # Where p equals q up to rounding any of the two laws may be drawn from.
    if kind != 'equal':
      np.testing.assert_allclose(
        got_weights, rule.weights[got], atol=3e-5, err_msg=str(cell)
      )
    found[draft, tuple(passes)] = int(got), got_weights
  # End to end: what the compiled rule emits is the law of the target. The
  # rest is the rounding of float32.
  emitted = _emitted(law, _RULES[name], found)
  assert _distance(law, emitted) < 1e-5


_CELLS = 256  # at most, so that few programs serve all laws


def _verify_cells(name, law: _Law, cells):
  """The real rule on all cells at once: accepted [N], weights [N, V]."""
  drafted, vocab = law.drafted, law.vocab
  # Nothing beyond `count` may matter: there the draft is noise.
  rng = np.random.default_rng(5)
  tokens = rng.integers(0, vocab, (_CELLS, drafted))
  uniforms = rng.random((_CELLS, drafted))
  p = rng.dirichlet(np.ones(vocab), (_CELLS, drafted + 1))
  q = rng.dirichlet(np.ones(vocab), (_CELLS, drafted))
  for row, (draft, _, uniform, _) in enumerate(cells):
    tokens[row, : law.count] = draft
    uniforms[row, : law.count] = uniform
    for i in range(law.count + 1):
      p[row, i] = law.p[draft[:i]]
    for i in range(law.count):
      q[row, i] = law.q[draft[:i]]
  proposal = verifiers.Proposal(
    tokens.astype(np.int32),
    np.full((_CELLS,), law.count, np.int32),
    None if law.deterministic else _log(q),
  )
  accepted, weights = _decisions(
    name, _log(p), proposal, uniforms.astype(np.float32)
  )
  return np.asarray(accepted)[: len(cells)], np.asarray(weights)[: len(cells)]


@functools.partial(jax.jit, static_argnums=0)
def _verify(name, *arguments):
  """A rule on chains, compiled."""
  verify = verifiers.named(name).verify
  return verify(*arguments, _chain(arguments[-1]))


def _chain(proposal):
  return token_tree.chain(proposal.tokens.shape[1])


@functools.partial(jax.jit, static_argnums=0)
def _decisions(name, logits, proposal, uniforms):
  """The real rule with given uniforms, and the weights it draws from."""
  drawn = []

  def draw(keys, logits):
    drawn.append(jnp.exp(logits)[:, 0])
    return jnp.zeros(keys.shape, jnp.int32)

  batch = logits.shape[0]
  keys = sampling.row_keys(0, jnp.arange(batch))
  position = jnp.full((batch,), 7, jnp.int32)
  with (
    mock.patch.object(verifiers, '_uniforms', return_value=uniforms),
    mock.patch.object(sampling, 'draw', draw),
  ):
    verify = verifiers.named(name).verify
    verdict = verify(keys, position, logits, proposal, _chain(proposal))
  (weights,) = drawn
  return verdict.num_accepted, weights


def _log(x):
  with np.errstate(divide='ignore'):
    return np.log(x).astype(np.float32)


def test_the_toy_example_of_the_block_paper():
  # Section 2 of arXiv 2403.10444: 10/9 and 11/9 accepted tokens.
  law = _Law(2, 2, 0)
  for prefix in law.p:
    law.p[prefix] = np.array([1 / 3, 2 / 3])
    law.q[prefix] = np.array([2 / 3, 1 / 3])
  np.testing.assert_allclose(_mean_accepted(law, _token), 10 / 9, rtol=1e-12)
  np.testing.assert_allclose(_mean_accepted(law, _block), 11 / 9, rtol=1e-12)


@pytest.mark.parametrize('seed', range(10))
def test_block_accepts_at_least_as_much_as_token(seed):
  law = _Law(3, 3, seed)
  token, block = (_mean_accepted(law, rule) for rule in (_token, _block))
  assert block > token + 1e-6


@functools.partial(jax.jit, static_argnums=1)
def _row_keys(seed, rows):
  return sampling.row_keys(seed, jnp.arange(rows))


# Rows of all tests below, so that a program serves several of them.
_BATCH = 64


def _proposal(seed=0):
  """Drafts of up to three of five tokens."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(_BATCH, 3, 5)).astype(np.float32)
  tokens = rng.integers(0, 5, (_BATCH, 3)).astype(np.int32)
  count = np.arange(_BATCH, dtype=np.int32) % 4
  return verifiers.Proposal(tokens, count, logits)


@pytest.mark.parametrize('name', ['greedy', 'coupled'])
def test_following_rules_keep_what_the_target_would_have_chosen(name):
  proposal = _proposal(seed=1)
  rng = np.random.default_rng(2)
  logits = rng.normal(size=(_BATCH, 4, 5)).astype(np.float32)
  keys = _row_keys(3, _BATCH)
  position = np.asarray(rng.integers(1, 50, _BATCH), np.int32)
  if name == 'greedy':
    choice = logits.argmax(-1)
  else:

    @jax.jit
    def draw(keys, places, logits):
      keys = sampling.position_keys(keys, places, sampling.Purpose.SAMPLE)
      return sampling.draw(keys, logits)

    places = position[:, None] + np.arange(4, dtype=np.int32)
    choice = np.asarray(draw(keys, places, logits))
  # Half of the rows propose the choice itself.
  tokens = proposal.tokens
  tokens[::2] = choice[::2, :3]
  verdict = _verify(name, keys, position, logits, proposal)
  verdict = jax.tree.map(np.asarray, verdict)
  for row in range(_BATCH):
    n = 0
    count = int(proposal.count[row])
    while n < count and tokens[row, n] == choice[row, n]:
      n += 1
    assert int(verdict.num_accepted[row]) == n
    assert int(verdict.next_token[row]) == choice[row, n]


_processed = jax.jit(sampling.processed_logits)


@pytest.mark.parametrize('name', _NAMES)
def test_greedy_rows_of_a_sampled_batch_follow_the_arg_max(name):
  settings = sampling.make(_BATCH, temperature=[0.0, 1.0] * (_BATCH // 2))
  rng = np.random.default_rng(3)
  raw = rng.normal(size=(_BATCH, 4, 5)).astype(np.float32)
  logits = _processed(raw, settings)
  best = raw.argmax(-1)
  keys, position = _row_keys(0, _BATCH), np.arange(_BATCH, dtype=np.int32)
  for wrong in range(4):
    tokens = best[:, :3].copy()
    if wrong < 3:
      tokens[:, wrong] = (tokens[:, wrong] + 1) % 5
    one_hot = np.where(np.arange(5) == tokens[..., None], 0.0, -np.inf)
    proposal = verifiers.Proposal(
      tokens.astype(np.int32),
      np.full((_BATCH,), 3, np.int32),
      one_hot.astype(np.float32),
    )
    verdict = _verify(name, keys, position, logits, proposal)
    verdict = jax.tree.map(np.asarray, verdict)
    for row in range(0, _BATCH, 2):
      assert int(verdict.num_accepted[row]) == wrong
      assert int(verdict.next_token[row]) == best[row, wrong]


@pytest.mark.parametrize(
  ('name', 'eager'),
  [
    *((name, False) for name in sorted(verifiers.VERIFIERS)),
    ('greedy', True),
    # An eager rule is one program for each of its operations.
    *(
      pytest.param(name, True, marks=pytest.mark.slow)
      for name in ('token', 'block', 'coupled', 'typical')
    ),
  ],
)
def test_rules_are_the_same_compiled_or_not_and_in_any_batch(name, eager):
  verify = verifiers.named(name).verify
  proposal = _proposal()
  keys = _row_keys(0, _BATCH)
  rng = np.random.default_rng(1)
  position = rng.integers(1, 10, _BATCH).astype(np.int32)
  logits = rng.standard_normal((_BATCH, 4, 5)).astype(np.float32)
  arguments = keys, position, logits, proposal
  tree = _chain(proposal)
  compiled = _verify(name, *arguments)
  third = lambda tree: jax.tree.map(lambda x: x[2:3], tree)
  if eager:
    with jax.disable_jit():
      alone = verify(*third(arguments), tree)
  else:
    alone = _verify(name, *third(arguments))
  chex.assert_trees_all_equal(third(compiled), alone)


@pytest.mark.parametrize('name', sorted(verifiers.VERIFIERS))
def test_an_empty_draft_gives_one_token_of_the_target(name):
  proposal = verifiers.Proposal(
    np.zeros((2, 0), np.int32), np.zeros((2,), np.int32), None
  )
  logits = np.where(np.arange(5) == 3, 0.0, -np.inf) + np.zeros((2, 1, 1))
  verdict = _verify(
    name,
    _row_keys(0, 2),
    np.arange(2, dtype=np.int32),
    logits.astype(np.float32),
    proposal,
  )
  assert verdict.num_accepted.tolist() == [0, 0]
  assert verdict.next_token.tolist() == [3, 3]


def test_a_draft_from_the_target_is_always_kept():
  # Where p equals q nothing is left to correct with, and 0 / 0 must not be.
  rng = np.random.default_rng(0)
  raw = rng.standard_normal((_BATCH, 4, 5)).astype(np.float32)
  p = np.asarray(jax.jit(jax.nn.log_softmax)(raw))
  tokens = rng.integers(0, 5, (_BATCH, 3)).astype(np.int32)
  count = np.full((_BATCH,), 3, np.int32)
  proposal = verifiers.Proposal(tokens, count, p[:, :3])
  position = np.arange(_BATCH, dtype=np.int32)
  for name in _NAMES:
    verdict = _verify(name, _row_keys(0, _BATCH), position, p, proposal)
    assert verdict.num_accepted.tolist() == [3] * _BATCH


def test_a_verifier_is_found_by_its_name():
  assert verifiers.named('block') is verifiers.BLOCK
  with pytest.raises(ValueError, match='token, block, coupled, typical'):
    verifiers.named('vibes')


def test_accept_noise_is_new_in_every_round():
  keys = _row_keys(0, 3)
  uniforms = jax.jit(verifiers._uniforms, static_argnums=2)
  one, next_round = (
    np.asarray(uniforms(keys, np.full((3,), start, np.int32), 3))
    for start in (4, 5)
  )
  # Position 5 of both rounds.
  assert not np.any(one[:, 1] == next_round[:, 0])
  assert np.unique(one).size == 9
