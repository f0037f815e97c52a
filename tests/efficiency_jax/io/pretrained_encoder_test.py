"""Encoders are read from folders; what is wrong with one is said in a line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from efficiency_jax.io import assets
from efficiency_jax.io import errors
from efficiency_jax.io import hf_encoder
from efficiency_jax.io import pretrained_encoder
from tests.efficiency_jax.io import tiny_encoders

_FAMILIES = hf_encoder.FAMILIES


@pytest.fixture
def saved(tmp_path):
  c = tiny_encoders.config()
  return tiny_encoders.save(tmp_path / 'saved', c, tiny_encoders.params(c))


@pytest.mark.short
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('family', _FAMILIES)
def test_loading_undoes_saving(tmp_path, family, dtype):
  c = tiny_encoders.config(family)
  params = tiny_encoders.params(c)
  path = tiny_encoders.save(tmp_path / 'toy', c, params)
  found = pretrained_encoder.load(path, dtype=dtype)
  assert (found.name, found.config) == ('toy', c)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)),
    found.params,
    params,
  )


def test_texts_become_a_batch(tmp_path):
  model = tiny_encoders.text_encoder(tmp_path)
  tokens, mask = model.batch(['Good films', '', 'a bad film'])
  assert tokens.dtype == mask.dtype == np.int32
  np.testing.assert_array_equal(
    tokens, [[2, 4, 6, 8, 3], [2, 3, 0, 0, 0], [2, 7, 5, 6, 3]]
  )
  np.testing.assert_array_equal(
    mask, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
  )
  wide, _ = model.batch(['good'], multiple=16)
  assert wide.shape == (1, 16)
  # A multiple does not lead beyond the last position.
  long, mask = model.batch(['good ' * 20], multiple=16)
  assert long.shape == (1, 24)
  assert mask.sum() == 22
  with pytest.raises(ValueError, match='at least one text'):
    model.batch([])


@pytest.mark.parametrize(('setting', 'length'), [(None, 24), (6, 6), (99, 24)])
def test_long_texts_are_cut(saved, setting, length):
  if setting:
    settings = json.dumps({'max_seq_length': setting})
    (saved / 'sentence_bert_config.json').write_text(settings)
  model = pretrained_encoder.load(saved)
  tokens, mask = model.batch(['bad ' * 40])
  assert model.max_length == length
  assert mask.sum() == length
  assert tokens[0, -1] == 3  # [SEP] is kept


@pytest.mark.parametrize(
  ('value', 'problem'),
  [
    (np.full(16, np.nan, np.float32), 'not finite'),
    (np.zeros(16, np.int32), 'stored as I32'),
    (np.zeros(15, np.float32), r'\(15,\)'),
    (None, 'has no tensor embeddings.LayerNorm.bias'),
  ],
)
def test_bad_tensors_are_named(saved, value, problem):
  path = saved / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  del tensors['embeddings.LayerNorm.bias']
  if value is not None:
    tensors['embeddings.LayerNorm.bias'] = value
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.FileFormatError, match=problem) as caught:
    pretrained_encoder.load(saved)
  assert 'embeddings.LayerNorm.bias' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_unknown_tensors_are_refused_and_old_buffers_are_not(saved):
  path = saved / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors['embeddings.position_ids'] = np.arange(24)[None]
  safetensors.numpy.save_file(tensors, path)
  pretrained_encoder.load(saved)
  tensors['classifier.weight'] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(errors.FileFormatError, match='classifier.weight'):
    pretrained_encoder.load(saved)


@pytest.mark.parametrize(
  ('name', 'problem'),
  [
    ('config.json', 'has no config.json'),
    ('tokenizer.json', 'does not exist'),
    ('model.safetensors', 'has no model.safetensors'),
  ],
)
def test_missing_files_are_named(saved, name, problem):
  (saved / name).unlink()
  with pytest.raises(errors.FileFormatError, match=problem):
    pretrained_encoder.load(saved)


def test_pickles_are_refused(saved):
  (saved / 'model.safetensors').rename(saved / 'pytorch_model.bin')
  with pytest.raises(errors.FileFormatError, match='run code'):
    pretrained_encoder.load(saved)


def test_a_tokenizer_of_another_model_is_refused(saved):
  backend = tiny_encoders.tokenizer()
  backend.add_tokens(['x1', 'x2', 'x3', 'x4'])
  (saved / 'tokenizer.json').write_text(backend.to_str())
  with pytest.raises(errors.FileFormatError, match='13 tokens, but the model'):
    pretrained_encoder.load(saved)


def test_unknown_sources_and_dtypes():
  with pytest.raises(ValueError, match='minilm-l6, mpnet-base'):
    pretrained_encoder.load('no such encoder')
  with pytest.raises(ValueError, match='dtype must be one of'):
    pretrained_encoder.load('minilm-l6', dtype=jnp.int8)


def test_an_asset_is_a_folder(saved, monkeypatch):
  monkeypatch.setattr(assets, 'fetch', lambda name: saved / 'model.safetensors')
  model = pretrained_encoder.load('minilm-l6')
  assert model.name == 'minilm-l6'
  assert model.config == tiny_encoders.config()
