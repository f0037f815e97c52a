"""Costs of rounds, compared between methods; decode_test runs the rest."""

import json
import types

import numpy as np
import pytest

from efficiency_jax.evaluation import decoding


def _engine(*lengths):
  schedule = types.SimpleNamespace(lengths=lengths)
  return types.SimpleNamespace(decoder=types.SimpleNamespace(schedule=schedule))


def test_costs_are_compared_within_a_turn(monkeypatch):
  """A machine that is slow for a whole turn changes no ratio."""
  plain, adaptive = _engine(0), _engine(0, 3)
  methods = [
    decoding.Method(name='plain', engine=plain),
    decoding.Method(name='n-gram', engine=adaptive),
    decoding.Method(name='n-gram, 3', engine=adaptive, force_length=3),
  ]
  costs = {id(plain): [1.0], id(adaptive): [1.1, 1.5]}
  # In the second turn only the last measurement is slow.
  slowness = iter([3.0, 3.0, 1.0, 2.0, 2.0, 2.0])
  monkeypatch.setattr(
    decoding.engine_lib,
    'measure_costs',
    lambda engine, *_, **__: next(slowness) * np.array(costs[id(engine)]),
  )
  where = 1, 128, {'temperature': 0.0}
  turns = decoding.time_rounds(methods, *where, turns=3)
  # As from a file: JSON's keys are strings.
  turns = json.loads(json.dumps(turns))
  found = decoding.round_seconds(turns)
  assert found['plain'] == pytest.approx({0: 1.0})
  assert found['n-gram'] == pytest.approx({0: 1.1, 3: 1.5})
  assert found['n-gram, 3'] == found['n-gram']


def test_what_rounds_cost_predicts_the_speed_up():
  records = [
    {'rounds_by_length': {'0': 4, '3': 10}},
    {'rounds_by_length': {'0': 6, '3': 0}},
  ]
  plain = [{'rounds': 24}, {'rounds': 6}]
  costs = {0: 1.1, 3: 1.5}
  of = lambda some: decoding.predicted_speedup(
    records[some], plain[some], costs, 1.0
  )
  assert of(slice(2)) == pytest.approx(30 / (1.1 * 10 + 1.5 * 10))
  assert of(slice(1)) == pytest.approx(24 / (1.1 * 4 + 1.5 * 10))


@pytest.mark.parametrize('backwards', [False, True])
def test_methods_take_turns_forwards_and_backwards(backwards, monkeypatch):
  """The first one of a turn is often the slowest, so it is not always one."""
  order = []

  def generate(engine, *_, **__):
    order.append(engine)
    return types.SimpleNamespace(decode_seconds=len(order), number=len(order))

  monkeypatch.setattr(decoding.generation, 'generate', generate)
  methods = [decoding.Method(name=name, engine=name) for name in 'abc']
  found = decoding.measure(
    methods,
    [[1]],
    max_new_tokens=1,
    slots=8,
    settings={},
    repeats=3,
    backwards=backwards,
  )
  turns = ['abc', 'cba', 'abc'] if not backwards else ['cba', 'abc', 'cba']
  assert ''.join(order) == ''.join(turns)
  # The median of three runs is the second.
  assert found['a'].number == (6 if not backwards else 4)
