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
from efficiency_jax import quantized_drafts
from efficiency_jax import trees
from efficiency_jax.decoding import dynamic_tree
from efficiency_jax.io import arrays
from efficiency_jax.io import errors
from efficiency_jax.models import config as model_config
from tests import fixtures
from tests.efficiency_jax import draft_cases as cases


def _with_config(lm, **fields):
  config = dataclasses.replace(lm.config, **fields)
  return dataclasses.replace(lm, config=config, name='sibling')


def _rounded(draft):
  """What is left of a draft in float16."""
  return dataclasses.replace(
    draft, params=trees.cast(trees.cast(draft.params, jnp.float16), jnp.float32)
  )


@pytest.mark.parametrize('kind', cases.KINDS)
def test_what_is_saved_is_loaded(tmp_path, kind):
  scaling = model_config.RopeScaling(kind='linear', factor=2.0)
  lm = cases.language_model(
    tie_embeddings=False, windows=(3, None), rope_scaling=scaling
  )
  draft = _rounded(cases.KINDS[kind](lm))
  drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)
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
  assert drafts.card(tmp_path / 'x') == cases.CARD


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_parameters_have_the_dtype_of_the_target(tmp_path, dtype):
  lm = cases.language_model()
  draft = _rounded(cases.eagle_draft(lm))
  drafts.save(tmp_path / 'x', draft, lm=lm, card={})
  narrow = dataclasses.replace(lm, params=trees.cast(lm.params, dtype))
  loaded = drafts.load(tmp_path / 'x', narrow)
  expected = trees.cast(draft.params, dtype)
  chex.assert_trees_all_equal(loaded.params, expected, strict=True)


def test_a_narrow_draft_is_saved_as_it_is(tmp_path):
  lm = cases.language_model()
  draft = cases.eagle_draft(lm)
  narrow = trees.cast(draft.params, jnp.bfloat16)
  draft = dataclasses.replace(draft, params=narrow)
  drafts.save(tmp_path / 'x', draft, lm=lm, card={})
  expected = trees.cast(trees.cast(narrow, jnp.float16), jnp.float32)
  chex.assert_trees_all_equal(
    drafts.load(tmp_path / 'x', lm).params, expected, strict=True
  )


def test_matrices_of_8_bits_are_those_of_w8a8(tmp_path):
  lm = cases.language_model()
  # Sides of 64 and 96 beside others of 16.
  wide = dataclasses.replace(lm.config, width=64, ffn_width=96)
  lm = dataclasses.replace(lm, config=wide, params=fixtures.params(wide))
  draft = _rounded(cases.eagle_draft(lm, layers=(1,)))
  drafts.save(tmp_path / '16', draft, lm=lm, card={})
  drafts.save(tmp_path / '8', draft, lm=lm, card={}, bits=8)
  sizes = [(tmp_path / name).stat().st_size for name in ('8', '16')]
  assert sizes[0] < 0.62 * sizes[1]
  loaded = drafts.load(tmp_path / '8', lm)
  rounded = 0
  for (name, got), (_, right) in zip(
    trees.leaves(loaded.params), trees.leaves(draft.params), strict=True
  ):
    if right.ndim == 2 and min(right.shape) >= 64:
      half = np.abs(right).max(0) / 127 / 2
      assert (np.abs(got - right) <= 1.001 * half).all(), name
      assert (got != right).any()
      rounded += 1
    else:
      np.testing.assert_array_equal(got, right)
  assert rounded == 4
  narrow = [
    quantized_drafts.quantize(x, lm, 'W8A8').params['gather']['kernel']
    for x in (draft, loaded)
  ]
  np.testing.assert_array_equal(narrow[0].values, narrow[1].values)
  np.testing.assert_allclose(narrow[0].scales, narrow[1].scales, rtol=1e-6)


def test_other_numbers_of_bits_are_refused(tmp_path):
  lm = cases.language_model()
  with pytest.raises(ValueError, match='bits must be 8 or 16, got 4'):
    drafts.save(tmp_path / 'x', cases.eagle_draft(lm), lm=lm, card={}, bits=4)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('drafter', 'length'), [('eagle', 3), ('medusa', 5), ('draft model', 3)]
)
def test_a_loaded_draft_drafts_as_the_saved_one(tmp_path, drafter, length):
  lm = cases.language_model()
  draft = cases.KINDS[drafter](lm)
  drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)
  loaded = drafts.load(tmp_path / 'x', lm)
  cases.check_alike(
    cases.write(lm, _rounded(draft), drafter, length),
    cases.write(lm, loaded, drafter, length),
  )


@pytest.mark.parametrize('value', [np.nan, -np.inf, 65520.0])
def test_a_draft_that_float16_cannot_hold_is_not_saved(tmp_path, value):
  lm = cases.language_model()
  draft = cases.eagle_draft(lm)
  drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)
  before = (tmp_path / 'x').read_bytes()
  params = {**draft.params, 'fuse': {'kernel': jnp.full((32, 16), value)}}
  broken = dataclasses.replace(draft, params=params)
  for name in ('x', 'new/y'):
    with pytest.raises(ValueError, match='fuse/kernel is not finite in float'):
      drafts.save(tmp_path / name, broken, lm=lm, card=cases.CARD)
  assert (tmp_path / 'x').read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == ['x']


def test_the_largest_float16_is_saved(tmp_path):
  lm = cases.language_model()
  draft = cases.eagle_draft(lm)
  params = {**draft.params, 'fuse': {'kernel': jnp.full((32, 16), -65504.0)}}
  draft = dataclasses.replace(draft, params=params)
  drafts.save(tmp_path / 'x', draft, lm=lm, card={})
  loaded = drafts.load(tmp_path / 'x', lm)
  assert (loaded.params['fuse']['kernel'] == -65504).all()


def test_a_draft_is_saved_with_its_own_target_and_a_card_of_strings(tmp_path):
  lm = cases.language_model()
  other = _with_config(lm, rope_theta=77.0)
  for draft in (cases.eagle_draft(other), cases.cut_model(other)):
    with pytest.raises(ValueError, match='another config than .*untrained-0'):
      drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)
  for card in ({'tokens a run': 2.5}, {1: 'one'}):
    with pytest.raises(ValueError, match='card must map strings to strings'):
      drafts.save(tmp_path / 'x', cases.eagle_draft(lm), lm=lm, card=card)
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
  lm = cases.language_model()
  draft = cases.KINDS[kind](lm)
  changed = traverse_util.flatten_dict(draft.params, sep='/')
  changed[leaf] = change(changed[leaf])
  changed = {k: v for k, v in changed.items() if v is not None}
  changed = traverse_util.unflatten_dict(changed, sep='/')
  broken = dataclasses.replace(draft, params=changed)
  with pytest.raises(ValueError, match=f'^parameter {leaf} {problem}: save'):
    drafts.save(tmp_path / 'x', broken, lm=lm, card=cases.CARD)
  assert list(tmp_path.iterdir()) == []
  drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)
  _rewritten(tmp_path / 'x', changed)
  message = f'x: parameter {leaf} {problem}; update efficiency_jax.*file$'
  with pytest.raises(errors.FileFormatError, match=message) as caught:
    drafts.load(tmp_path / 'x', lm)
  assert '\n' not in str(caught.value)


def test_parameters_that_no_form_has(tmp_path):
  lm = cases.language_model()
  draft = cases.cut_model(lm)
  params = {**draft.params, 'layers_1': draft.params['layers_0']}
  draft = dataclasses.replace(draft, params=params)
  message = 'parameter layers_1/attention/output/kernel is not one of its form'
  with pytest.raises(ValueError, match=message):
    drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)


def test_trees_that_grow_are_not_saved(tmp_path):
  growth = dynamic_tree.Growth(nodes=4, expand=2, height=2)
  draft = cases.eagle_draft(cases.language_model(), shapes=(growth,))
  with pytest.raises(ValueError, match='trees that grow are not saved'):
    drafts.save(tmp_path / 'x', draft, lm=cases.language_model(), card={})
  assert not list(tmp_path.iterdir())


def test_heads_are_saved_with_a_target_of_their_width(tmp_path):
  lm = cases.language_model()
  config = dataclasses.replace(lm.config, width=32)
  wide = dataclasses.replace(lm, config=config, params=fixtures.params(config))
  with pytest.raises(ValueError, match=r'parameter head_0/block_0/kernel has'):
    drafts.save(
      tmp_path / 'x', cases.medusa_heads(lm), lm=wide, card=cases.CARD
    )


def test_heads_are_saved_with_a_target_that_has_the_blocks_they_see(tmp_path):
  lm = cases.language_model()
  heads = cases.medusa_heads(lm, layers=(99,))
  with pytest.raises(ValueError, match=r'layers must be in 0\.\.1, got 99'):
    drafts.save(tmp_path / 'x', heads, lm=lm, card=cases.CARD)
  assert not list(tmp_path.iterdir())


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
  lm = cases.language_model()
  other = other(lm)
  drafts.save(tmp_path / 'x', cases.KINDS[kind](lm), lm=lm, card=cases.CARD)
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
    lambda x: x + 0.2 * jnp.std(x) * jax.random.normal(cases.KEY, x.shape),
  ],
  ids=['bfloat16', 'float16', '4 bits', 'tuned'],
)
def test_the_target_is_known_however_it_was_rounded(tmp_path, change):
  lm = cases.language_model()
  draft = cases.eagle_draft(lm)
  drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)
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
  lm = cases.language_model()
  drafts.save(path, cases.eagle_draft(lm), lm=lm, card=cases.CARD)
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
  lm = cases.language_model()
  drafts.save(tmp_path / 'x', cases.eagle_draft(lm), lm=lm, card=cases.CARD)
  _rewritten(tmp_path / 'x')
  drafts.load(tmp_path / 'x', lm)
  _rewritten(tmp_path / 'x', **facts)
  message = f'x: {problem}.*; update efficiency_jax, or take another file$'
  with pytest.raises(errors.FileFormatError, match=message):
    drafts.load(tmp_path / 'x', lm)


def test_a_config_may_get_new_fields(tmp_path):
  lm = cases.language_model()
  draft = cases.eagle_draft(lm)
  drafts.save(tmp_path / 'x', draft, lm=lm, card=cases.CARD)
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
  lm = cases.language_model()
  for name in ('b.2-eagle', 'a'):
    path = tmp_path / 'shipped' / f'{name}.safetensors'
    drafts.save(path, cases.eagle_draft(lm), lm=lm, card={'name': name})
    assert drafts.shipped(name) == path
  assert drafts.card(drafts.shipped('b.2-eagle')) == {'name': 'b.2-eagle'}
  for unknown in ('x', 'a.safetensors', '../shipped/a', ''):
    with pytest.raises(ValueError, match='is shipped: there are a, b.2-eagle'):
      drafts.shipped(unknown)
