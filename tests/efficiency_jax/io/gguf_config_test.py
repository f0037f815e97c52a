"""Tests of reading a configuration from GGUF metadata."""

import dataclasses

import gguf
import numpy as np
import pytest

from efficiency_jax.io import errors
from efficiency_jax.io import gguf_config
from efficiency_jax.io import gguf_file
from efficiency_jax.models import config as model_config

_F32 = gguf.GGMLQuantizationType.F32
_SIZES = {
  'block_count': 12,
  'context_length': 128,
  'embedding_length': 64,
  'feed_forward_length': 96,
  'attention.head_count': 4,
  'attention.layer_norm_rms_epsilon': float(np.float32(1e-5)),
}


def _file(architecture='llama', tensors=(), metadata=None, **settings):
  """A header with an embedding of 50 rows and nothing on disk."""
  names = ('token_embd.weight', *tensors)
  values = {'general.architecture': architecture}
  values |= {f'{architecture}.{k}': v for k, v in _SIZES.items()}
  for name, value in settings.items():
    values[f'{architecture}.{name.replace("__", ".")}'] = value
  return gguf_file.GGUFFile(
    'a.gguf',
    3,
    values | (metadata or {}),
    {n: gguf_file.TensorInfo(n, (50, 64), _F32, 0, 12800) for n in names},
  )


def test_llama():
  config = gguf_config.read(_file(rope__freq_base=float(np.float32(1e5))))
  assert config == model_config.DecoderConfig(
    vocab_size=50,
    width=64,
    ffn_width=96,
    num_layers=12,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_positions=128,
    rope_theta=1e5,
  )


def test_choices_follow_from_the_tensors():
  tensors = ('output.weight', 'blk.0.attn_q.bias')
  config = gguf_config.read(_file('qwen2', tensors))
  assert not config.tie_embeddings
  assert config.qkv_bias
  assert not config.output_bias


def test_gemma():
  config = gguf_config.read(_file('gemma2', attention__sliding_window=8))
  assert config.windows == (8, None) * 6
  assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
  config = gguf_config.read(
    _file('gemma3', attention__sliding_window=8, attention__key_length=32)
  )
  assert config.windows == ((8,) * 5 + (None,)) * 2
  assert config.attention_softcap is None
  assert (config.rope_theta, config.local_rope_theta) == (1e6, 1e4)
  assert config.query_scale == 32**-0.5
  # The largest model scales by width / heads, which no field says.
  large = _file('gemma3', block_count=62, attention__key_length=32)
  assert gguf_config.read(large).query_scale == 16**-0.5


def test_linear_scaling():
  config = gguf_config.read(
    _file(rope__scaling__type='linear', rope__scaling__factor=4.0)
  )
  expected = model_config.RopeScaling(kind='linear', factor=4.0)
  assert config.rope_scaling == expected


@pytest.mark.parametrize(
  ('settings', 'problem'),
  [
    ({'architecture': 'mamba'}, "'mamba' is not supported"),
    ({'block_count': 10**6}, 'block_count'),
    ({'block_count': None}, 'block_count is missing'),
    ({'embedding_length': 'x'}, 'embedding_length'),
    ({'attention__head_count': -4}, 'head_count'),
    ({'attention__head_count': [4, 4]}, 'head_count'),
    ({'attention__head_count_kv': 3}, 'num_kv_heads'),
    ({'attention__value_length': 8}, 'value_length'),
    ({'rope__dimension_count': 8}, 'whole heads'),
    ({'rope__freq_base': float('nan')}, 'freq_base'),
    ({'rope__scaling__type': 'yarn'}, 'yarn'),
    ({'rope__scaling__type': 'linear'}, 'factor is missing'),
    ({'tensors': ('rope_factors_long.weight',)}, 'longrope'),
    ({'metadata': {'split.count': 3}}, 'one part of several'),
    ({'metadata': {'general.architecture': 5}}, 'architecture'),
  ],
)
def test_wrong_values_are_named(settings, problem):
  with pytest.raises(errors.FileFormatError, match=problem):
    gguf_config.read(_file(**settings))


def test_a_file_without_a_model():
  empty = dataclasses.replace(_file(), tensors={})
  with pytest.raises(errors.FileFormatError, match='token_embd'):
    gguf_config.read(empty)
