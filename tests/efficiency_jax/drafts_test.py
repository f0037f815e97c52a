"""Tests of trained drafts as files."""

import dataclasses
import functools
import json
import pathlib

import chex
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from efficiency_jax import drafts
from efficiency_jax import generation
from efficiency_jax import trees
from efficiency_jax.decoding import draft_model
from efficiency_jax.decoding import draft_vocabulary
from efficiency_jax.decoding import dynamic_tree
from efficiency_jax.decoding import eagle
from efficiency_jax.decoding import medusa
from efficiency_jax.decoding import token_tree
from efficiency_jax.io import arrays
from efficiency_jax.io import errors
from efficiency_jax.io import untrained
from efficiency_jax.leaves import QTensor
from efficiency_jax.models import config as model_config
from efficiency_jax.quantization import rules
from tests import fixtures

_KEY = jax.random.key(0)
_CARD = {'data': 'nothing at all', 'licence': 'Apache-2.0 – "as is"'}
_VOCABULARY = np.asarray([3, 0, 256, 97, 98, 101, 116, 32], np.int32)
_TREES = tuple(
  token_tree.from_choices(choices)
  for choices in ([(0,), (1,), (0, 0)], [(0,), (1,), (2,), (0, 0), (0, 1)])
)


@functools.cache
def _lm(**fields):
  config = fixtures.config(vocab_size=257, max_positions=256, **fields)
  lm = untrained.language_model()
  return dataclasses.replace(lm, config=config, params=fixtures.params(config))


def _with_config(lm, **fields):
  config = dataclasses.replace(lm.config, **fields)
  return dataclasses.replace(lm, config=config, name='sibling')


def _random(init):
  """Random parameters of the shapes that `init` would give."""
  rng = np.random.default_rng(0)
  one = lambda x: 0.5 * rng.standard_normal(x.shape) + (x.ndim == 1)
  return jax.tree.map(
    lambda x: jnp.asarray(one(x), jnp.float32), jax.eval_shape(init)
  )


def _rounded(draft):
  """What is left of a draft in float16."""
  return dataclasses.replace(
    draft, params=trees.cast(trees.cast(draft.params, jnp.float16), jnp.float32)
  )


def _eagle(lm, *, reduced: bool = True, shapes=_TREES, **form):
  form = eagle.Form(
    target=lm.config, vocabulary=len(_VOCABULARY) if reduced else None, **form
  )
  return eagle.TrainedDraft(
    form=form,
    params=_random(lambda: eagle.init(form, _KEY)),
    vocabulary=_VOCABULARY if reduced else None,
    trees=shapes,
  )


def _medusa(lm, *, reduced: bool = True, **form):
  form = medusa.Heads(
    count=2, vocabulary=len(_VOCABULARY) if reduced else None, **form
  )
  tokens = jnp.asarray(_VOCABULARY) if reduced else None
  table = draft_vocabulary.head(lm.params, tokens)
  width, size = lm.config.width, lm.config.vocab_size
  init = lambda: medusa.init(form, _KEY, width, size, table)
  return medusa.TrainedHeads(
    form=form,
    params=_random(init),
    vocabulary=_VOCABULARY if reduced else None,
    trees=_TREES,
  )


def _model(lm, *, reduced: bool = True, shapes=(), **form):
  form = draft_model.Form(
    target=lm.config,
    vocabulary=len(_VOCABULARY) if reduced else None,
    **{'layers': (1,), **form},
  )
  return draft_model.TrainedDraft(
    form=form,
    params=_random(lambda: draft_model.init(form, lm.params)),
    vocabulary=_VOCABULARY if reduced else None,
    trees=shapes,
  )


_KINDS = {
  'eagle': _eagle,
  'eagle of all tokens': lambda lm: _eagle(
    lm, reduced=False, shapes=(), ffn_width=8
  ),
  'medusa': lambda lm: _medusa(lm, markov=2, rank=3),
  'medusa of all tokens': lambda lm: _medusa(lm, reduced=False, own=True),
  'draft model': lambda lm: _model(lm, shapes=_TREES, ffn_width=8),
  'draft model of all tokens': lambda lm: _model(
    lm, reduced=False, layers=(1, 0)
  ),
}


@pytest.mark.parametrize('kind', _KINDS)
def test_what_is_saved_is_loaded(tmp_path, kind):
  scaling = model_config.RopeScaling(kind='linear', factor=2.0)
  lm = _lm(tie_embeddings=False, windows=(3, None), rope_scaling=scaling)
  draft = _rounded(_KINDS[kind](lm))
  drafts.save(tmp_path / 'x', draft, lm=lm, card=_CARD)
  loaded = drafts.load(tmp_path / 'x', lm)
  assert type(loaded) is type(draft)
  assert loaded.form == draft.form
  assert loaded.trees == draft.trees
  chex.assert_trees_all_equal(loaded.params, draft.params, strict=True)
  if draft.vocabulary is None:
    assert loaded.vocabulary is None
  else:
    np.testing.assert_array_equal(
      np.asarray(loaded.vocabulary), draft.vocabulary, strict=True
    )
  assert drafts.card(tmp_path / 'x') == _CARD


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_parameters_have_the_dtype_of_the_target(tmp_path, dtype):
  lm = _lm()
  draft = _rounded(_eagle(lm))
  drafts.save(tmp_path / 'x', draft, lm=lm, card={})
  narrow = dataclasses.replace(lm, params=trees.cast(lm.params, dtype))
  loaded = drafts.load(tmp_path / 'x', narrow)
  expected = trees.cast(draft.params, dtype)
  chex.assert_trees_all_equal(loaded.params, expected, strict=True)


def test_a_narrow_draft_is_saved_as_it_is(tmp_path):
  lm = _lm()
  draft = _eagle(lm)
  narrow = trees.cast(draft.params, jnp.bfloat16)
  draft = dataclasses.replace(draft, params=narrow)
  drafts.save(tmp_path / 'x', draft, lm=lm, card={})
  expected = trees.cast(trees.cast(narrow, jnp.float16), jnp.float32)
  chex.assert_trees_all_equal(
    drafts.load(tmp_path / 'x', lm).params, expected, strict=True
  )


def _write(lm, draft, drafter, length):
  return generation.generate(
    lm,
    ['to be or not to be', 'x'],
    drafter=drafter,
    heads=draft,
    draft_length=length,
    max_new_tokens=24,
    stop=False,
  ).rows


def _check_alike(rows, others):
  for a, b in zip(rows, others, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.run, b.run)
    np.testing.assert_array_equal(a.refused, b.refused)
    # A text is the target's whatever is drafted: the drafts must be there.
    assert (a.refused >= 0).sum() >= 5


@pytest.mark.parametrize(
  ('drafter', 'length'), [('eagle', 3), ('medusa', 5), ('draft model', 3)]
)
def test_a_loaded_draft_drafts_as_the_saved_one(tmp_path, drafter, length):
  lm = _lm()
  draft = _KINDS[drafter](lm)
  drafts.save(tmp_path / 'x', draft, lm=lm, card=_CARD)
  loaded = drafts.load(tmp_path / 'x', lm)
  _check_alike(
    _write(lm, _rounded(draft), drafter, length),
    _write(lm, loaded, drafter, length),
  )


@pytest.mark.parametrize(('drafter', 'length'), [('eagle', 3), ('medusa', 5)])
def test_a_quantized_draft_drafts_what_its_weights_stand_for(drafter, length):
  lm = _lm()
  draft = _KINDS[drafter](lm)
  small = drafts.quantized(draft, lm, 'int8')
  table = draft_vocabulary.table(small.head)
  assert isinstance(table, QTensor)
  assert trees.count_bytes(small.params) < 0.6 * trees.count_bytes(draft.params)
  meant = dataclasses.replace(
    draft,
    params=rules.dequantize(small.params),
    head=rules.dequantize(small.head),
  )
  rows = _write(lm, small, drafter, length)
  _check_alike(rows, _write(lm, meant, drafter, length))
  # Another head drafts something else, and no text changes.
  backwards = jax.tree.map(lambda x: x[::-1], meant.head)
  other = _write(
    lm, dataclasses.replace(meant, head=backwards), drafter, length
  )
  for a, b in zip(rows, other, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
  assert any(
    not np.array_equal(a.refused, b.refused)
    for a, b in zip(rows, other, strict=True)
  )


def test_drafts_without_a_head_of_their_own_are_quantized_too():
  lm = _lm()
  for kind in ('eagle of all tokens', 'draft model'):
    draft = _KINDS[kind](lm)
    small = drafts.quantized(draft, lm, 'W8A8')
    assert getattr(small, 'head', None) is None
    size = trees.count_bytes(draft.params)
    assert trees.count_bytes(small.params) < 0.6 * size


def test_recipes_that_need_text_are_refused():
  lm = _lm()
  with pytest.raises(ValueError, match="'GPTQ int4' needs calibration text"):
    drafts.quantized(_eagle(lm), lm, 'GPTQ int4')


@pytest.mark.parametrize('value', [np.nan, -np.inf, 65520.0])
def test_a_draft_that_float16_cannot_hold_is_not_saved(tmp_path, value):
  lm = _lm()
  draft = _eagle(lm)
  drafts.save(tmp_path / 'x', draft, lm=lm, card=_CARD)
  before = (tmp_path / 'x').read_bytes()
  params = {**draft.params, 'fuse': {'kernel': jnp.full((32, 16), value)}}
  broken = dataclasses.replace(draft, params=params)
  for name in ('x', 'new/y'):
    with pytest.raises(ValueError, match='fuse/kernel is not finite in float'):
      drafts.save(tmp_path / name, broken, lm=lm, card=_CARD)
  assert (tmp_path / 'x').read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ['x']


def test_the_largest_float16_is_saved(tmp_path):
  lm = _lm()
  draft = _eagle(lm)
  params = {**draft.params, 'fuse': {'kernel': jnp.full((32, 16), -65504.0)}}
  draft = dataclasses.replace(draft, params=params)
  drafts.save(tmp_path / 'x', draft, lm=lm, card={})
  loaded = drafts.load(tmp_path / 'x', lm)
  assert (loaded.params['fuse']['kernel'] == -65504).all()


def test_a_draft_is_saved_with_its_own_target_and_a_card_of_strings(tmp_path):
  lm = _lm()
  other = _with_config(lm, rope_theta=77.0)
  for draft in (_eagle(other), _model(other)):
    with pytest.raises(ValueError, match='another config than .*untrained-0'):
      drafts.save(tmp_path / 'x', draft, lm=lm, card=_CARD)
  for card in ({'tokens a run': 2.5}, {1: 'one'}):
    with pytest.raises(ValueError, match='card must map strings to strings'):
      drafts.save(tmp_path / 'x', _eagle(lm), lm=lm, card=card)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
  ('kind', 'leaf'),
  [
    ('eagle', 'layers_0/ffn/down/kernel'),
    ('medusa', 'markov/down/kernel'),
    ('medusa of all tokens', 'head_1/output/embedding/table'),
    ('draft model', 'layers_0/attention/qkv/kernel'),
  ],
)
@pytest.mark.parametrize(
  ('change', 'problem'),
  [
    (lambda x: x[:-1], r'has shape \(\d+, \d+\), its form needs \(\d+, \d+\)'),
    (lambda x: None, 'is missing'),
  ],
  ids=['shape', 'missing'],
)
def test_other_parameters_than_those_of_the_form(
  tmp_path, kind, leaf, change, problem
):
  """They are not saved, and not loaded from what another version saved."""
  lm = _lm()
  draft = _KINDS[kind](lm)
  changed = traverse_util.flatten_dict(draft.params, sep='/')
  changed[leaf] = change(changed[leaf])
  changed = {k: v for k, v in changed.items() if v is not None}
  changed = traverse_util.unflatten_dict(changed, sep='/')
  broken = dataclasses.replace(draft, params=changed)
  with pytest.raises(ValueError, match=f'^parameter {leaf} {problem}: save'):
    drafts.save(tmp_path / 'x', broken, lm=lm, card=_CARD)
  assert list(tmp_path.iterdir()) == []
  drafts.save(tmp_path / 'x', draft, lm=lm, card=_CARD)
  _rewritten(tmp_path / 'x', changed)
  message = f'x: parameter {leaf} {problem}; update efficiency_jax.*file$'
  with pytest.raises(errors.FileFormatError, match=message) as caught:
    drafts.load(tmp_path / 'x', lm)
  assert '\n' not in str(caught.value)


def test_parameters_that_no_form_has(tmp_path):
  lm = _lm()
  draft = _model(lm)
  params = {**draft.params, 'layers_1': draft.params['layers_0']}
  draft = dataclasses.replace(draft, params=params)
  message = 'parameter layers_1/attention/output/kernel is not one of its form'
  with pytest.raises(ValueError, match=message):
    drafts.save(tmp_path / 'x', draft, lm=lm, card=_CARD)


def test_trees_that_grow_are_not_saved(tmp_path):
  growth = dynamic_tree.Growth(nodes=4, expand=2, height=2)
  draft = _eagle(_lm(), shapes=(growth,))
  with pytest.raises(ValueError, match='trees that grow are not saved'):
    drafts.save(tmp_path / 'x', draft, lm=_lm(), card={})
  assert not list(tmp_path.iterdir())


def test_heads_are_saved_with_a_target_of_their_width(tmp_path):
  lm = _lm()
  config = dataclasses.replace(lm.config, width=32)
  wide = dataclasses.replace(lm, config=config, params=fixtures.params(config))
  with pytest.raises(ValueError, match=r'parameter head_0/block_0/kernel has'):
    drafts.save(tmp_path / 'x', _medusa(lm), lm=wide, card=_CARD)


def _from_another_beginning(lm):
  params = jax.tree.map(lambda x: x[::-1], lm.params)
  return dataclasses.replace(lm, params=params, name='stranger')


def _with_another_token(lm):
  backend = tokenizers.Tokenizer.from_str(lm.tokenizer.backend.to_str())
  backend.add_special_tokens(['<|more|>'])
  tokenizer = dataclasses.replace(lm.tokenizer, backend=backend)
  return dataclasses.replace(lm, tokenizer=tokenizer, name='talkative')


@pytest.mark.parametrize('kind', ['eagle', 'medusa', 'draft model'])
@pytest.mark.parametrize(
  ('other', 'why'),
  [
    (_with_another_token, 'their tokenizers differ'),
    (lambda lm: _with_config(lm, width=32), 'width is 16 there, 32 here'),
    (
      lambda lm: _with_config(lm, windows=(3, 5)),
      r'windows is \[\] there, \[3, 5\] here',
    ),
    (_from_another_beginning, 'their weights have nothing in common'),
  ],
  ids=['tokenizer', 'width', 'windows', 'weights'],
)
def test_another_target_is_refused(tmp_path, kind, other, why):
  lm = _lm()
  other = other(lm)
  drafts.save(tmp_path / 'x', _KINDS[kind](lm), lm=lm, card=_CARD)
  message = (
    rf'^\S*x is a draft for {lm.name!r}, not for {other.name!r} \({why}\):'
    rf' take one that was trained for {other.name!r}\.$'
  )
  with pytest.raises(ValueError, match=message):
    drafts.load(tmp_path / 'x', other)


def _in_4_bits(x):
  """The worst of all roundings: 15 levels for 16 weights."""
  blocks = np.asarray(x).reshape(-1, 16)
  scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
  return jnp.asarray((np.round(blocks / scale) * scale).reshape(x.shape))


@pytest.mark.parametrize(
  'change',
  [
    lambda x: x.astype(jnp.bfloat16),
    lambda x: x.astype(jnp.float16),
    _in_4_bits,
    lambda x: x + 0.2 * jnp.std(x) * jax.random.normal(_KEY, x.shape),
  ],
  ids=['bfloat16', 'float16', '4 bits', 'tuned'],
)
def test_the_target_is_known_however_it_was_rounded(tmp_path, change):
  lm = _lm()
  draft = _eagle(lm)
  drafts.save(tmp_path / 'x', draft, lm=lm, card=_CARD)
  params = jax.tree.map(change, lm.params)
  loaded = drafts.load(tmp_path / 'x', dataclasses.replace(lm, params=params))
  dtype = jax.tree.leaves(params)[0].dtype
  chex.assert_trees_all_equal(
    loaded.params, trees.cast(_rounded(draft).params, dtype)
  )


def _flip_a_parameter(data: bytes) -> bytes:
  return data[:-200] + bytes([data[-200] ^ 1]) + data[-199:]


@pytest.mark.parametrize(
  'harm',
  [
    lambda data: data[:-1],
    lambda data: data[:100],
    _flip_a_parameter,
    lambda data: data.replace(b'nothing at all', b'everything yet'),
    lambda data: data.replace(b'ffn_width', b'ffn_wiDth'),
    lambda data: data.replace(b'params/fuse', b'params/fusE'),
    lambda data: data.replace(b'"sha256"', b'"sha257"'),
  ],
  ids=['cut', 'header cut', 'bit', 'card', 'form', 'name', 'seal'],
)
def test_a_damaged_file_is_refused(tmp_path, harm):
  path = tmp_path / 'x.safetensors'
  lm = _lm()
  drafts.save(path, _eagle(lm), lm=lm, card=_CARD)
  whole = path.read_bytes()
  path.write_bytes(harm(whole))
  assert path.read_bytes() != whole
  for read in (functools.partial(drafts.load, lm=lm), drafts.card):
    with pytest.raises(errors.FileFormatError) as caught:
      read(path)
    assert str(caught.value).startswith(f'{path}: is ')
    assert 'again' in str(caught.value) or 'pass a file' in str(caught.value)


def _rewritten(path: pathlib.Path, params=None, **facts) -> None:
  """The file with other parameters or facts, sealed as by another version."""
  values, metadata = arrays.load(path)
  if params is not None:
    values = {k: v for k, v in values.items() if not k.startswith('params/')}
    for name, leaf in trees.leaves(params):
      values[f'params/{name}'] = np.asarray(leaf, np.float16)
  del metadata['sha256']
  metadata |= {name: json.dumps(fact) for name, fact in facts.items()}
  seal = drafts._digest(values, metadata)
  arrays.save(path, values, {**metadata, 'sha256': seal})


@pytest.mark.parametrize(
  ('facts', 'problem'),
  [
    ({'kind': 'crystal ball'}, "holds a draft of kind 'crystal ball'"),
    ({'form': {'colour': 3}}, 'making the draft failed .*colour'),
    ({'form': {}}, 'making the draft failed .*vocabulary must have None'),
    ({'form': [1]}, 'making the draft failed'),
    ({'trees': [[0, 1]]}, 'making the draft failed .*node 0'),
  ],
)
def test_a_file_of_another_version_is_refused(tmp_path, facts, problem):
  lm = _lm()
  drafts.save(tmp_path / 'x', _eagle(lm), lm=lm, card=_CARD)
  _rewritten(tmp_path / 'x')
  drafts.load(tmp_path / 'x', lm)
  _rewritten(tmp_path / 'x', **facts)
  message = f'x: {problem}.*; update efficiency_jax, or take another file$'
  with pytest.raises(errors.FileFormatError, match=message):
    drafts.load(tmp_path / 'x', lm)


def test_a_config_may_get_new_fields(tmp_path):
  lm = _lm()
  draft = _eagle(lm)
  drafts.save(tmp_path / 'x', draft, lm=lm, card=_CARD)
  target = json.loads(arrays.load(tmp_path / 'x')[1]['target'])
  del target['config']['final_softcap']
  _rewritten(tmp_path / 'x', target=target)
  loaded = drafts.load(tmp_path / 'x', lm)
  chex.assert_trees_all_equal(loaded.params, _rounded(draft).params)


@pytest.mark.parametrize('metadata', [{}, {'card': '{}', 'sha256': 'x'}])
def test_other_files_are_no_drafts(tmp_path, metadata):
  arrays.save(tmp_path / 'x', {'a': np.ones(3)}, metadata)
  with pytest.raises(errors.FileFormatError, match='x: is not a draft; pass a'):
    drafts.card(tmp_path / 'x')


def test_shipped_drafts_are_found_by_name(tmp_path, monkeypatch):
  monkeypatch.setattr(drafts, '_SHIPPED', tmp_path / 'shipped')
  with pytest.raises(ValueError, match="no draft 'x' is shipped: none is"):
    drafts.shipped('x')
  lm = _lm()
  for name in ('b.2-eagle', 'a'):
    path = tmp_path / 'shipped' / f'{name}.safetensors'
    drafts.save(path, _eagle(lm), lm=lm, card={'name': name})
    assert drafts.shipped(name) == path
  assert drafts.card(drafts.shipped('b.2-eagle')) == {'name': 'b.2-eagle'}
  for unknown in ('x', 'a.safetensors', '../shipped/a', ''):
    with pytest.raises(ValueError, match='is shipped: there are a, b.2-eagle'):
      drafts.shipped(unknown)
