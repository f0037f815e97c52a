"""Tests of reading and writing `config.json`."""

import dataclasses
import math

import pytest

from efficiency_jax.io import errors
from efficiency_jax.io import hf_config
from efficiency_jax.models import config as model_config
from tests.efficiency_jax.io import tiny_models

_LLAMA = {
  'model_type': 'llama',
  'vocab_size': 100,
  'hidden_size': 64,
  'intermediate_size': 128,
  'num_hidden_layers': 12,
  'num_attention_heads': 4,
}


@pytest.mark.parametrize('name', sorted(tiny_models.CONFIGS))
def test_reading_undoes_writing(name):
  config = tiny_models.config(name)
  assert hf_config.read(hf_config.write(config)) == config


def test_defaults_of_a_sparse_file():
  config = hf_config.read(_LLAMA)
  assert config.num_kv_heads == 4
  assert config.head_dim == 16
  assert config.rope_theta == 10_000.0
  assert config.norm_epsilon == 1e-6
  assert not config.tie_embeddings
  assert config.windows == ()


def test_both_rotary_layouts_mean_the_same():
  scaling = {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
  }
  old = {'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'llama3', **scaling}}
  new = {
    'rope_parameters': {
      'rope_theta': 5e5,
      'rope_type': 'llama3',
      **scaling,
    }
  }
  first, second = hf_config.read(_LLAMA | old), hf_config.read(_LLAMA | new)
  assert first == second
  assert first.rope_scaling.kind == 'llama3'
  oldest = {'rope_scaling': {'type': 'linear', 'factor': 2.0}}
  assert hf_config.read(_LLAMA | oldest).rope_scaling.factor == 2.0


def test_gemma3_layouts():
  sparse = {'model_type': 'gemma3_text', 'sliding_window': 7}
  config = hf_config.read(sparse)
  assert config.windows[:7] == (7, 7, 7, 7, 7, None, 7)
  assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
  assert config.query_scale == 256**-0.5
  nested = {
    'rope_parameters': {
      'full_attention': {
        'rope_type': 'linear',
        'factor': 8.0,
        'rope_theta': 2e6,
      },
      'sliding_attention': {'rope_type': 'default', 'rope_theta': 3e4},
    }
  }
  config = hf_config.read(sparse | nested)
  assert (config.rope_theta, config.local_rope_theta) == (2e6, 3e4)
  assert config.rope_scaling == model_config.RopeScaling(
    kind='linear', factor=8.0
  )
  wrapped = {'model_type': 'gemma3', 'text_config': sparse}
  assert hf_config.read(wrapped) == hf_config.read(sparse)


def test_gemma2_null_is_not_absent():
  sparse = _LLAMA | {'model_type': 'gemma2'}
  assert hf_config.read(sparse).attention_softcap == 50.0
  sparse['attn_logit_softcapping'] = None
  assert hf_config.read(sparse).attention_softcap is None
  assert hf_config.read(sparse).windows[:3] == (4096, None, 4096)


@pytest.mark.parametrize(
  ('changes', 'windows'),
  [
    ({'model_type': 'mistral', 'sliding_window': None}, ()),
    ({'model_type': 'mistral', 'sliding_window': 9}, (9,) * 12),
    ({'model_type': 'qwen2', 'sliding_window': 9}, ()),
    (
      {
        'model_type': 'qwen2',
        'use_sliding_window': True,
        'sliding_window': 9,
        'max_window_layers': 10,
      },
      (None,) * 10 + (9,) * 2,
    ),
    (
      {
        'model_type': 'qwen3',
        'head_dim': 16,
        'use_sliding_window': True,
        'sliding_window': 9,
        'layer_types': ['full_attention', 'sliding_attention'] * 6,
      },
      (None, 9) * 6,
    ),
  ],
)
def test_windows(changes, windows):
  values = _LLAMA | {'num_key_value_heads': 2} | changes
  assert hf_config.read(values).windows == windows


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('model_type', 'mamba'),
    ('model_type', 7),
    ('model_type', None),
    ('vocab_size', '100'),
    ('vocab_size', -1),
    ('vocab_size', 1.5),
    ('vocab_size', True),
    ('hidden_size', 10**30),
    ('hidden_size', None),
    ('num_hidden_layers', 10**6),
    ('num_attention_heads', 0),
    ('num_key_value_heads', 3),
    ('head_dim', 15),
    ('rms_norm_eps', math.nan),
    ('rms_norm_eps', 'small'),
    ('rms_norm_eps', 10**400),
    ('rope_theta', -1.0),
    ('rope_theta', [1.0]),
    ('rope_scaling', 'linear'),
    ('rope_scaling', {'rope_type': 'yarn', 'factor': 4.0}),
    ('rope_scaling', {'type': 'longrope'}),
    ('rope_scaling', {'rope_type': 'linear', 'factor': math.inf}),
    ('rope_parameters', {'rope_type': 'llama3'}),
    ('partial_rotary_factor', 0.5),
    ('rope_parameters', {'partial_rotary_factor': 0.5}),
    ('hidden_act', 'relu'),
    ('tie_word_embeddings', 'yes'),
    ('attention_bias', 1),
    ('quantization_config', {'bits': 4}),
  ],
)
def test_wrong_values_name_the_field(field, value):
  with pytest.raises(errors.FileFormatError) as caught:
    hf_config.read(_LLAMA | {field: value}, 'x/config.json')
  message = str(caught.value)
  assert message.startswith('x/config.json: ')
  names = {
    'rope_scaling': ('rope_scaling', 'rope_type', 'factor'),
    'rope_parameters': ('factor', 'partial_rotary_factor'),
    'num_key_value_heads': ('num_kv_heads',),
  }.get(field, (field,))
  assert any(name in message for name in names)
  assert len(message) < 700


def test_layer_types_are_checked():
  values = _LLAMA | {
    'model_type': 'qwen3',
    'head_dim': 16,
    'num_key_value_heads': 2,
    'use_sliding_window': True,
  }
  for wrong in (['full_attention'], 'full', ['other'] * 12, [[]] * 12):
    with pytest.raises(errors.FileFormatError, match='layer_types'):
      hf_config.read(values | {'layer_types': wrong})


def test_a_family_refuses_what_it_cannot_express():
  config = dataclasses.replace(tiny_models.config('llama'), qk_norm=True)
  with pytest.raises(ValueError, match='qk_norm=True'):
    hf_config.write(config)
  with pytest.raises(ValueError, match="'mamba'"):
    hf_config.write(dataclasses.replace(config, family='mamba'))
