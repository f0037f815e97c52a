"""Configs and tensor names of encoders as Hugging Face writes them."""

import pytest

from efficiency_jax.io import errors
from efficiency_jax.io import hf_encoder
from tests.efficiency_jax.io import tiny_encoders

pytestmark = pytest.mark.short

_MINILM = {
  'architectures': ['BertModel'],
  'hidden_act': 'gelu',
  'hidden_size': 384,
  'intermediate_size': 1536,
  'layer_norm_eps': 1e-12,
  'max_position_embeddings': 512,
  'model_type': 'bert',
  'num_attention_heads': 12,
  'num_hidden_layers': 6,
  'position_embedding_type': 'absolute',
  'type_vocab_size': 2,
  'vocab_size': 30522,
}


@pytest.mark.parametrize('family', hf_encoder.FAMILIES)
def test_reading_undoes_writing(family):
  c = tiny_encoders.config(family)
  assert hf_encoder.read(tiny_encoders.config_values(c)) == c


def test_a_published_config():
  c = hf_encoder.read(_MINILM)
  assert (c.width, c.num_layers, c.head_dim) == (384, 6, 32)
  assert not c.relative_bias
  names = [part.name for slot in hf_encoder.slots(c) for part in slot.parts]
  # Six projections and two norms a layer; three tables and a norm before them.
  assert len(names) == len(set(names)) == 6 * 2 * 8 + 5
  assert 'encoder.layer.5.attention.self.key.weight' in names


@pytest.mark.parametrize(
  ('field', 'value', 'problem'),
  [
    ('model_type', 'roberta', "model_type 'roberta' is not an encoder"),
    ('model_type', None, 'model_type is missing'),
    ('hidden_size', None, 'hidden_size is missing'),
    ('hidden_size', '384', "hidden_size is '384', expected a whole number"),
    ('num_attention_heads', 7, 'num_heads must divide width = 384, got 7'),
    ('hidden_act', 'relu', "hidden_act is 'relu', only 'gelu' is supported"),
    ('position_embedding_type', 'relative_key', "only 'absolute'"),
    ('is_decoder', True, 'is_decoder is not supported'),
    ('relative_attention_num_buckets', 16, 'only 32 are supported'),
    ('layer_norm_eps', 0, 'layer_norm_eps is 0'),
    ('num_hidden_layers', 10**9, 'num_hidden_layers'),
  ],
)
def test_wrong_fields_are_named(field, value, problem):
  with pytest.raises(errors.FileFormatError, match=problem) as caught:
    hf_encoder.read({**_MINILM, field: value}, 'folder/config.json')
  assert str(caught.value).startswith('folder/config.json: ')
  assert '\n' not in str(caught.value)


def test_a_table_too_short_for_mpnet_is_refused():
  values = tiny_encoders.config_values(tiny_encoders.config('mpnet'))
  values['max_position_embeddings'] = 2
  with pytest.raises(errors.FileFormatError, match='max_positions'):
    hf_encoder.read(values)
