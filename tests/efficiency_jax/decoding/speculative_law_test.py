"""The compiled loop samples exactly the target, for drafter x verifier.

The batch is the sample: its rows have keys of their own, hence independent
texts. The law of the first three tokens is compared with the one enumerated
from the model without cache, loop, draft or compiled filters. Rows of one batch
are divided among settings, so that one program serves all of them.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

from efficiency_jax.decoding import drafters
from efficiency_jax.decoding import dynamic_tree
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import prefill
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import schedule
from efficiency_jax.decoding import speculative
from efficiency_jax.decoding import verifiers
from efficiency_jax.models import cache as kv_cache
from efficiency_jax.models import transformer
from pallas_kernels.decode_attention import blockwise as decode_attention
from tests import fixtures
from tests.efficiency_jax.decoding import eagle_models

_VOCAB = 4
_PROMPT = [1, 2, 1]
_TOKENS = 3

# The first setting has most rows: its test must see small biases.
_SETTINGS = (
  {'temperature': 1.0},
  {'temperature': 0.7, 'top_p': 0.9},
  {'temperature': 1.0, 'top_k': 2},
  {'temperature': 1.3, 'min_p': 0.2},
  {'temperature': 1.0, 'penalty': 1.7},
  {'temperature': 0.0},
)
_ROWS = (20_000, 3000, 3000, 3000, 3000, 1000)

_TARGET = fixtures.config(vocab_size=_VOCAB, num_heads=2, num_kv_heads=1)
_DRAFT = fixtures.config(
  vocab_size=_VOCAB, num_layers=1, num_heads=2, num_kv_heads=1
)
# Drafts of three of the four tokens, in another order.
_EAGLE = eagle.Form(target=_TARGET, vocabulary=3)
_DRAFTERS = {
  'eagle': eagle.Eagle(
    form=_EAGLE, trees=(dynamic_tree.Growth(nodes=7, expand=3, height=2),)
  ),
  'n-gram': drafters.NGram(longest_match=2),
  'draft model': drafters.DraftModel(
    apply=transformer.apply_fn(_DRAFT), init_cache=kv_cache.initializer(_DRAFT)
  ),
  'early exit': drafters.EarlyExit(
    apply=transformer.apply_fn(_TARGET.truncated(1))
  ),
  'plain': drafters.Nothing(),
}


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch):
  """Ten positions a row need no blocks of 128."""
  monkeypatch.setattr(decode_attention, 'BLOCK', 16)
  monkeypatch.setattr(kv_cache, 'BLOCK', 16)
  monkeypatch.setattr(prefill, 'CHUNK', 4)


def _settings() -> sampling.Sampling:
  column = lambda name, default: np.repeat(
    [s.get(name, default) for s in _SETTINGS], _ROWS
  )
  return sampling.make(
    sum(_ROWS),
    temperature=column('temperature', 0.0),
    top_k=column('top_k', 0),
    top_p=column('top_p', 1.0),
    min_p=column('min_p', 0.0),
    repetition_penalty=column('penalty', 1.0),
  )


@functools.cache
def _logits() -> np.ndarray:
  """Of the target after every prefix of every text: [V ** 3, 6, V]."""
  texts = itertools.product(range(_VOCAB), repeat=_TOKENS)
  whole = np.asarray([_PROMPT + list(text) for text in texts], np.int32)
  apply = jax.jit(transformer.apply_fn(_TARGET))
  return np.asarray(apply(fixtures.params(_TARGET), whole)[0].logits)


@functools.cache
def _law(setting: int) -> np.ndarray:
  """Chance of every text of three tokens: [V ** 3]."""
  texts = list(itertools.product(range(_VOCAB), repeat=_TOKENS))
  settings, logits = _SETTINGS[setting], _logits()
  law = np.ones(len(texts))
  for index, text in enumerate(texts):
    for i, token in enumerate(text):
      law[index] *= fixtures.processed_probabilities(
        logits[index, len(_PROMPT) - 1 + i],
        seen=_PROMPT + list(text[:i]),
        **settings,
      )[token]
  np.testing.assert_allclose(law.sum(), 1, rtol=1e-9)
  return law


def _check(texts: np.ndarray, law: np.ndarray):
  """Chi-square of [N, 3] texts; what the law forbids may not occur."""
  index = texts @ _VOCAB ** np.arange(_TOKENS)[::-1]
  seen = np.bincount(index, minlength=law.size)
  assert seen[law == 0].sum() == 0
  if (law > 0).sum() == 1:
    return
  # Cells of fewer than 5 expected texts are one cell.
  expected = law * len(texts)
  rare = expected < 5
  seen = np.append(seen[~rare], seen[rare].sum())
  expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
  statistic = ((seen - expected) ** 2 / np.maximum(expected, 1)).sum()
  # Mean and deviation of chi-square; 4.5 sigma, one in 10^5 and the seed is
  # fixed. Sharing noise between rounds gave 6 sigma and more.
  freedom = len(seen) - 1
  assert statistic < freedom + 4.5 * np.sqrt(2 * freedom)


_CASES = [
  *itertools.product(
    ('n-gram', 'draft model', 'early exit'),
    ('token', 'block', 'coupled'),
    ((3,),),
  ),
  ('plain', 'token', (0,)),
  ('plain', 'block', (2,)),
  ('eagle', 'token', (3,)),
  ('eagle', 'block', (3,)),
  # A tree that grows; the others are chains.
  ('eagle', 'coupled', (7,)),
  # The draft length follows what was accepted.
  ('draft model', 'block', (0, 1, 3)),
]


_SLOW = (
  # Coupled text is the plain text of the seed, token by token, for each drafter
  # (`speculative_test`, `eagle_test`); that text has its own case here, and so
  # has one coupled drafter.
  ('eagle', 'coupled', (7,)),
  ('draft model', 'coupled', (3,)),
  ('early exit', 'coupled', (3,)),
  # One of the lengths of the last case.
  ('draft model', 'block', (3,)),
)


@pytest.mark.parametrize(
  ('drafter', 'verifier', 'lengths'),
  [
    pytest.param(
      *c,
      id=f'{c[0]}-{c[1]}-{c[2]}',
      marks=pytest.mark.slow if c in _SLOW else (),
    )
    for c in _CASES
  ],
)
def test_the_text_has_the_law_of_the_target(drafter, verifier, lengths):
  decoder = speculative.Decoder(
    apply=transformer.apply_fn(_TARGET),
    drafter=_DRAFTERS[drafter],
    verifier=verifiers.named(verifier),
    schedule=schedule.Schedule(lengths=lengths),
  )
  weights = drafters.Weights(
    fixtures.params(_TARGET), fixtures.params(_DRAFT, 1)
  )
  if drafter == 'eagle':
    weights = eagle_models.weights(_EAGLE, vocabulary=(3, 0, 2))
  state = fixtures.generate(
    decoder,
    weights,
    _TARGET,
    [_PROMPT] * sum(_ROWS),
    _TOKENS,
    settings=_settings(),
    seed=11,
  )
  first = len(_PROMPT)
  texts = np.asarray(state.tokens)[:, first : first + _TOKENS]
  parts = np.split(texts, np.cumsum(_ROWS)[:-1])
  for setting, part in enumerate(parts):
    _check(part, _law(setting))
  if drafter != 'plain':
    # The drafts were of use, so that the test is one.
    assert float(state.counters.accepted.mean()) > 0.3
