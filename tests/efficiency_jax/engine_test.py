"""Engines with trained drafts; `generation_test` has the others."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import sampling
from efficiency_jax.decoding import token_tree
from efficiency_jax.decoding.dynamic_tree import Growth
from efficiency_jax.io import untrained


@functools.cache
def _lm():
  return untrained.language_model()


@pytest.fixture
def lm():
  return _lm()


@functools.cache
def _begun(form):
  return eagle.init(form, jax.random.key(0), _lm().params)


def _draft(lm, **options):
  form = eagle.Form(target=lm.config, vocabulary=20)
  return eagle.TrainedDraft(
    form=form,
    params=_begun(form),
    vocabulary=np.arange(20),
    **options,
  )


def test_a_draft_of_one_layer_decodes_as_plain(lm):
  prompts = ['to be or not to be or', 'x']
  tree = token_tree.from_choices([(0,), (1,), (0, 0)])
  plain = generation.generate(lm, prompts, drafter='plain', max_new_tokens=12)
  for heads, length in ((_draft(lm), 2), (_draft(lm, trees=(tree,)), 3)):
    mine = generation.generate(
      lm,
      prompts,
      drafter='eagle',
      heads=heads,
      draft_length=length,
      max_new_tokens=12,
    )
    for a, b in zip(plain.rows, mine.rows, strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)


_TREE = token_tree.from_choices([(0,), (1,), (0, 0)])
_GROWTH = Growth(nodes=4, expand=3, height=2)


def _model(lm, layers=(1,), size: int | None = 128, **options):
  form = draft_model.Form(
    target=lm.config, layers=layers, vocabulary=size, ffn_width=96
  )
  return draft_model.TrainedDraft(
    form=form,
    params=draft_model.init(form, lm.params),
    vocabulary=None if size is None else np.arange(size)[::-1],
    **options,
  )


@pytest.mark.parametrize(
  ('temperature', 'length', 'trees'),
  [(0.0, 3, (_TREE,)), (1.0, 2, ())],
)
def test_a_draft_model_of_few_tokens_decodes_as_plain(
  lm, temperature, length, trees
):
  prompts = ['to be or not to be or', 'x']
  options = {
    'max_new_tokens': 12,
    'temperature': temperature,
    'verifier': 'coupled' if temperature else 'greedy',
    'seed': 3,
  }
  plain = generation.generate(lm, prompts, drafter='plain', **options)
  mine = generation.generate(
    lm,
    prompts,
    drafter='draft model',
    heads=_model(lm, trees=trees),
    draft_length=length,
    **options,
  )
  for a, b in zip(plain.rows, mine.rows, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert b.statistics.accepted > 0


def test_a_draft_model_shares_the_tables_of_the_target(lm):
  prepare = functools.partial(engine_lib.prepare, lm, drafter='draft model')
  weights = prepare(heads=_model(lm, size=None)).weights
  assert weights.draft['embedding']['table'] is lm.params['embedding']['table']
  engine = prepare(heads=_model(lm), greedy=False)
  assert engine.weights.draft['head']['table'].shape == (128, lm.config.width)
  assert engine.decoder.verifier.name == 'block'
  assert engine.decoder.schedule.lengths == engine_lib.MODEL_LENGTHS


def test_lengths_and_verifiers_follow_the_draft(lm):
  def prepare(drafter, **options):
    engine = engine_lib.prepare(lm, drafter=drafter, greedy=False, **options)
    return engine.decoder

  for drafter, draft in (('eagle', _draft), ('draft model', _model)):
    chains = prepare(drafter, heads=draft(lm))
    trees = prepare(drafter, heads=draft(lm, trees=(_TREE,)))
    none = prepare(drafter, heads=draft(lm, trees=(_TREE,)), trees=())
    for found in (chains, none):
      assert found.verifier.name == 'block'
      assert found.schedule.lengths == engine_lib.MODEL_LENGTHS
      assert found.drafter.tree(3).is_chain
    assert trees.verifier.name == 'coupled'
    assert trees.schedule.lengths == (0, 3)
    assert trees.drafter.tree(3) == _TREE


def test_a_whole_model_drafts_trees_as_well(lm):
  prepare = functools.partial(engine_lib.prepare, lm, greedy=False)
  decoder = prepare(
    drafter='draft model', draft=lm, trees=(_GROWTH, _TREE)
  ).decoder
  assert decoder.verifier.name == 'coupled'
  assert decoder.schedule.lengths == (0, 3, 4)
  assert decoder.drafter.tree(4) is _GROWTH
  mine = generation.generate(
    lm,
    ['to be or not to be or', 'x'],
    drafter='draft model',
    draft=lm,
    trees=(_TREE,),
    draft_length=3,
    max_new_tokens=12,
    stop=False,
  )
  # The first guesses are the target's own: two of a tree, and one more.
  assert [row.statistics.runs for row in mine.rows] == [4, 4]


def test_trees_that_do_not_fit_are_refused(lm):
  with pytest.raises(ValueError, match="'n-gram' takes no trees; draft model,"):
    engine_lib.prepare(lm, trees=(_TREE,))
  wide = Growth(nodes=5, expand=129, height=1)
  with pytest.raises(ValueError, match='at most 128 children'):
    engine_lib.prepare(
      lm, drafter='draft model', heads=_model(lm), trees=(wide,)
    )


def test_a_foreign_draft_is_refused(lm):
  with pytest.raises(ValueError, match="'eagle' needs heads="):
    engine_lib.prepare(lm, drafter='eagle')
  with pytest.raises(ValueError, match="'medusa' needs heads="):
    engine_lib.prepare(lm, drafter='medusa', heads=_draft(lm))
  config = dataclasses.replace(lm.config, max_positions=7)
  foreign = dataclasses.replace(lm, config=config)
  for drafter, heads in (('eagle', _draft(lm)), ('draft model', _model(lm))):
    with pytest.raises(ValueError, match='for another config'):
      engine_lib.prepare(foreign, drafter=drafter, heads=heads)
  for options in ({'heads': _draft(lm)}, {'heads': _model(lm), 'draft': lm}):
    with pytest.raises(ValueError, match='needs draft=.* or else heads='):
      engine_lib.prepare(lm, drafter='draft model', **options)


def test_costs_that_are_measured_again_are_combined(lm, monkeypatch):
  """A slow moment of the machine leaves the table with the next one."""
  found = iter([[3.0, 6.0], [2.0, 6.0]])
  monkeypatch.setattr(
    engine_lib.cost_table, 'measure', lambda *_, **__: np.array(next(found))
  )
  monkeypatch.setattr(engine_lib, '_COSTS', {})
  engine = engine_lib.prepare(lm, drafter='n-gram')
  where = engine, sampling.GREEDY, 1, 128
  assert engine_lib.measured_costs(*where).tolist() == [3, 6]
  assert engine_lib.measure_costs(*where).tolist() == [2, 6]
  assert engine_lib.measured_costs(*where).tolist() == [2, 5]


@pytest.mark.parametrize('drafter', ['n-gram', 'eagle'])
def test_costs_are_those_of_a_text_that_nobody_read(lm, drafter, monkeypatch):
  """Reading one in every turn would take longer than the rounds."""
  seen = []

  def measure(decoder, weights, state, *, rounds, repeats):
    seen.append(state)
    return np.ones(len(decoder.schedule.lengths))

  monkeypatch.setattr(engine_lib.cost_table, 'measure', measure)
  heads = _draft(lm) if drafter == 'eagle' else None
  engine = engine_lib.prepare(
    lm, drafter=drafter, heads=heads, draft_length=1, stop=False
  )
  engine_lib.measure_costs(engine, sampling.GREEDY, 2, 128)
  (state,) = seen
  own = [state.draft.cache] if drafter == 'eagle' else []
  assert state.length.tolist() == [64, 64]
  assert len(set(state.tokens[0].tolist())) > 20
  for cache in (state.cache, *own):
    # As after a prompt: all but the last token count as read.
    assert cache.length.tolist() == [63, 63]
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(cache.keys))
  # The loop takes it: none of its arrays is given away twice.
  after = engine_lib.run(engine, state, rounds=2)
  assert after.counters.runs.tolist() == [2, 2]
  assert (after.length > 64).all()
