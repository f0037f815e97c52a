"""Claims hold or do not, by the numbers that are given."""

import pytest

from experiments import claims


def _row(method, ratio, spread=0.0, **more):
  return {
    'method': method,
    'perplexity_ratio': ratio,
    'perplexity_ratio_low': ratio - spread,
    'perplexity_ratio_high': ratio + spread,
    **more,
  }


def _held(found):
  return {row['claim'].partition(' (')[0]: row['holds'] for row in found}


def test_worse_means_intervals_apart():
  rows = [
    _row('int4', 1.7, 0.1),
    _row('FP4', 1.5, 0.05),
    _row('NF4', 1.4, 0.06),
  ]
  held = _held(claims.ladder(rows))
  assert held == {
    'int4 is worse than FP4': True,
    'FP4 is worse than NF4': False,
  }


def test_claims_need_the_methods_they_speak_of():
  assert claims.ladder([_row('float32', 1.0), _row('NF4', 1.4)]) == []


def test_gptq_may_be_further_in_weights_and_nearer_in_outputs():
  rows = [
    _row('int4', 1.7, weight_error=0.1, kl=0.7),
    _row('GPTQ int4', 1.5, weight_error=0.12, kl=0.5),
  ]
  found = claims.ladder(rows)
  assert [row['holds'] for row in found] == [True, True]
  assert found[0]['measured'] == 'GPTQ int4 0.12, int4 0.1'


def test_llm_int8_is_as_good_as_floats_within_two_percent():
  assert _held(claims.ladder([_row('LLM.int8', 1.019)])) == {
    'LLM.int8() is as good as floats': True
  }
  assert not claims.ladder([_row('LLM.int8', 1.021)])[0]['holds']


def _encoder(gobo=0.81, trained=0.84, loss=0.5, loss_trained=0.4):
  return claims.encoder(
    released=[
      {'method': 'float32', 'accuracy': 0.815},
      {'method': 'GOBO 3 bits', 'accuracy': gobo},
      # Also trained, below: one claim, not two.
      {'method': 'int3', 'accuracy': 0.7},
    ],
    clusterings=[
      {'method': 'GOBO, 3 bits', 'iterations': 7.0, 'most': 9},
      {'method': 'k-means, 3 bits', 'iterations': 60.0, 'most': 80},
    ],
    tuned=[
      {'method': 'fine-tuned', 'accuracy': 0.85},
      {'method': 'int3, rounded', 'accuracy': 0.75},
      {'method': 'int3, trained', 'accuracy': trained},
    ],
    shared=[
      {'method': 'uniform, rounded', 'loss': 0.5},
      {'method': 'uniform, trained', 'loss': 0.4},
      {'method': 'by Hessian, rounded', 'loss': loss},
      {'method': 'by Hessian, trained', 'loss': loss_trained},
      {'method': 'against Hessian, rounded', 'loss': 0.9},
      {'method': 'against Hessian, trained', 'loss': 0.9},
    ],
  )


def test_claims_on_an_encoder():
  assert [row['holds'] for row in _encoder()] == [True] * 5
  assert not _encoder(gobo=0.80)[1]['holds']
  assert not _encoder(trained=0.79)[2]['holds']
  assert not _encoder(loss=0.51)[3]['holds']
  assert _encoder(loss=0.51)[4]['holds']
  assert not _encoder(loss_trained=0.41)[4]['holds']


def test_nothing_lost_is_nothing_won_back():
  found = claims.encoder(
    released=[],
    clusterings=[],
    tuned=[
      {'method': 'fine-tuned', 'accuracy': 0.8},
      {'method': 'int4, rounded', 'accuracy': 0.8},
      {'method': 'int4, trained', 'accuracy': 0.9},
    ],
    shared=[],
  )
  assert [row['holds'] for row in found] == [False]


@pytest.mark.parametrize(
  ('first', 'second'),
  [
    ('W8A8 per tensor', 'W8A8'),
    ('W8A8', 'SmoothQuant'),
    ('int4', 'AWQ int4'),
    ('int4', 'FP4'),
    ('FP4', 'NF4'),
  ],
)
def test_the_first_is_worse_than_the_second(first, second):
  right = [_row(first, 1.5, 0.1), _row(second, 1.2, 0.1)]
  wrong = [_row(first, 1.2, 0.1), _row(second, 1.5, 0.1)]
  assert [row['holds'] for row in claims.ladder(right)] == [True]
  assert [row['holds'] for row in claims.ladder(wrong)] == [False]


def test_outliers_apart_are_at_least_as_good():
  held = lambda plain, apart: claims.ladder(
    [_row('W8A8', plain), _row('LLM.int8', apart)]
  )[0]['holds']
  assert held(1.04, 1.01)
  assert held(1.01, 1.01)
  assert not held(1.01, 1.04)
