"""Which draft a method decodes with."""

import dataclasses

import jax
import pytest

from configs import decode_tiny
from efficiency_jax import drafts
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import dynamic_tree
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import untrained
from efficiency_jax.models import transformer
from experiments import methods


@pytest.fixture(scope='module')
def lm():
  return untrained.language_model()


@pytest.fixture(scope='module')
def draft(lm):
  form = draft_model.Form(target=lm.config, layers=(1,), ffn_width=20)
  return draft_model.TrainedDraft(
    form=form, params=draft_model.init(form, lm.params)
  )


@pytest.fixture(scope='module')
def path(lm, draft, tmp_path_factory):
  path = tmp_path_factory.mktemp('drafts') / 'x.safetensors'
  drafts.save(path, draft, lm=lm, card={})
  return str(path)


def _build(lm, methods_, **trained):
  config = decode_tiny.get_config()
  config.methods = methods_
  config.fixed_lengths = ()
  config.trained.update(trained)
  return methods.build(lm, config)


def test_a_draft_model_is_the_trained_one_if_there_is_one(lm, draft, path):
  _, method = _build(lm, ('draft model, 3',), draft_model=path)
  drafter = method.engine.decoder.drafter
  assert drafter.apply is draft_model.apply_fn(draft.form)
  assert drafter.init_cache(1, 8).keys[0].shape[0] == 1
  assert method.engine.decoder.schedule.lengths == (3,)


def test_shapes_are_chosen_by_name(lm, tmp_path):
  form = eagle.Form(target=lm.config)
  params = eagle.init(form, jax.random.key(0), lm.params)
  tree = token_tree.TokenTree((-1, 0, 0))
  path = tmp_path / 'eagle.safetensors'
  draft = eagle.TrainedDraft(form=form, params=params, trees=(tree,))
  drafts.save(path, draft, lm=lm, card={})
  names = ('eagle, 2', 'eagle chain, 2', 'eagle dynamic, 7')
  _, *chosen = _build(lm, names, eagle=str(path))
  drafters = [method.engine.decoder.drafter for method in chosen]
  assert drafters[0].tree(2) == tree
  assert drafters[1].tree(2).is_chain
  assert drafters[2].tree(7) == dynamic_tree.Growth(nodes=7, expand=4, height=5)


def test_heads_grow_as_high_as_there_are_heads(lm, tmp_path):
  form = medusa.Heads(count=2)
  width, size = lm.config.width, lm.config.vocab_size
  params = medusa.init(form, jax.random.key(0), width, size, {})
  path = tmp_path / 'medusa.safetensors'
  heads = medusa.TrainedHeads(
    form=form, params=params, trees=(token_tree.chain(2),)
  )
  drafts.save(path, heads, lm=lm, card={})
  names = ('medusa chain, 2', 'medusa dynamic, 7')
  _, *chosen = _build(lm, names, medusa=str(path))
  drafters = [method.engine.decoder.drafter for method in chosen]
  assert drafters[0].tree(2).is_chain
  assert drafters[1].tree(7) == dynamic_tree.Growth(nodes=7, expand=8, height=2)


def test_shapes_of_a_draft_model_trained_or_not(lm, draft, path, tmp_path):
  tree = token_tree.TokenTree((-1, 0, 0))
  shaped = tmp_path / 'shaped.safetensors'
  drafts.save(shaped, dataclasses.replace(draft, trees=(tree,)), lm=lm, card={})
  names = (
    'draft model, 2',
    'draft model chain/block, 2',
    'draft model dynamic, 7',
  )
  for trained in ({'draft_model': str(shaped)}, {'draft_model': ''}):
    _, *chosen = _build(lm, names, **trained)
    drafters = [method.engine.decoder.drafter for method in chosen]
    assert (drafters[0].tree(2) == tree) == bool(trained['draft_model'])
    assert drafters[1].tree(2).is_chain
    growth = dynamic_tree.Growth(nodes=7, expand=4, height=5)
    assert drafters[2].tree(7) == growth


def test_or_else_a_cut_of_the_target(lm):
  _, method = _build(lm, ('draft model, 3',))
  shallow = lm.config.truncated(1)  # every second layer of two
  assert method.engine.decoder.drafter.apply is transformer.apply_fn(shallow)
  blocks = method.engine.weights.draft
  assert blocks['layers_0'] is lm.params['layers_0']
  assert 'layers_1' not in blocks


@pytest.mark.parametrize(
  ('method', 'flag', 'name', 'message'),
  [
    ('draft model', 'draft_model', 'no.safetensors', 'there is no such file'),
    ('draft model', 'draft_model', 'nobody', "no draft 'nobody' is shipped"),
    ('eagle', 'eagle', None, "trained.eagle=.*is a draft for 'draft model'"),
    ('eagle', 'draft_model', None, "method 'eagle' needs --config.trained.ea"),
    (
      'n-gram dynamic',
      'draft_model',
      None,
      'of shapes there are medusa chain, medusa dynamic, eagle chain, eagle',
    ),
    (
      'draft model dynamic',
      'draft_model',
      None,
      "'draft model dynamic' needs a length: draft model dynamic, 7",
    ),
    ('eagle chain', 'eagle', None, "is a draft for 'draft model'"),
  ],
)
def test_a_draft_that_does_not_fit(lm, path, method, flag, name, message):
  with pytest.raises(ValueError, match=message):
    _build(lm, (method,), **{flag: name or path})
