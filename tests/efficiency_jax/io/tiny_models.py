"""Models of every family that are small enough to write in a test."""

import dataclasses
import pathlib

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers

from efficiency_jax.io import pretrained
from efficiency_jax.io import tensor_names
from efficiency_jax.io import tokenizer as tokenizers_io
from efficiency_jax.models import config as model_config

TEMPLATE = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
  '<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
MERGES = (('h', 'e'), ('l', 'l'), ('he', 'll'), ('hell', 'o'), ('Ġ', 'w'))
VOCAB = (
  *SPECIAL,
  *sorted(pre_tokenizers.ByteLevel.alphabet()),
  *(''.join(pair) for pair in MERGES),
)

_SIZES = {
  'vocab_size': len(VOCAB),
  'width': 32,
  'ffn_width': 64,
  'num_layers': 2,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_dim': 8,
  'max_positions': 64,
}
_GEMMA = {
  'activation': 'gelu_tanh',
  'norm_plus_one': True,
  'post_norms': True,
  'scale_embeddings': True,
  'query_scale': 8**-0.5,
  'norm_epsilon': 1e-6,
}
_LLAMA3 = model_config.RopeScaling(
  kind='llama3', factor=8.0, original_context=8192
)
CONFIGS = {
  'llama': {'rope_theta': 1e5},
  'llama_biased': {
    'family': 'llama',
    'qkv_bias': True,
    'output_bias': True,
    'mlp_bias': True,
    'tie_embeddings': False,
    'rope_scaling': _LLAMA3,
  },
  'mistral': {'windows': (16, 16), 'tie_embeddings': False},
  'qwen2': {'qkv_bias': True, 'windows': (None, 16)},
  'qwen3': {
    'qk_norm': True,
    'rope_scaling': model_config.RopeScaling(kind='linear', factor=2.0),
  },
  'gemma2': {
    **_GEMMA,
    'attention_softcap': 50.0,
    'final_softcap': 30.0,
    'windows': (16, None),
  },
  'gemma3_text': {
    **_GEMMA,
    'qk_norm': True,
    'rope_theta': 1e6,
    'local_rope_theta': 1e4,
    'windows': (16, 16),
  },
  'phi3': {'tie_embeddings': False},
}
"""Variants of `DecoderConfig` by name; the name is the family unless given."""

_ARCHITECTURES = {'gemma3_text': 'gemma3', 'mistral': 'llama'}


def config(name: str) -> model_config.DecoderConfig:
  return model_config.DecoderConfig(
    **({'family': name} | _SIZES | CONFIGS[name])
  )


def params(c: model_config.DecoderConfig, dtype=jnp.float32, seed=0):
  """Random parameters of the shapes that `c` asks for."""
  rng = np.random.default_rng(seed)
  tensors = {
    part.name: rng.normal(size=part.shape).astype(np.float32)
    for slot in tensor_names.hf_slots(c)
    for part in slot.parts
  }
  tree = tensor_names.read_params(
    tensor_names.hf_slots(c),
    tensors,
    tensors.__getitem__,
    'memory',
    ignored=lambda name: False,
  )
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def tokenizer() -> tokenizers_io.Tokenizer:
  """Byte-level BPE with five merges and three special tokens."""
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: number for number, token in enumerate(VOCAB)},
      merges=list(MERGES),
    )
  )
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(list(SPECIAL))
  return tokenizers_io.build(
    pathlib.Path('memory'),
    backend,
    bos_id=1,
    eos_id=0,
    pad_id=0,
    stop_ids=(0,),
    chat_template=TEMPLATE,
  )


def model(name: str, dtype=jnp.float32) -> pretrained.LanguageModel:
  c = config(name)
  return pretrained.LanguageModel(
    name=name, config=c, params=params(c, dtype), tokenizer=tokenizer()
  )


def write_gguf(
  path: pathlib.Path,
  lm: pretrained.LanguageModel,
  kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> pathlib.Path:
  """Writes a model as the converters of llama.cpp do."""
  c = lm.config
  architecture = _ARCHITECTURES.get(c.family, c.family)
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_block_count(c.num_layers)
  writer.add_context_length(c.max_positions)
  writer.add_embedding_length(c.width)
  writer.add_feed_forward_length(c.ffn_width)
  writer.add_head_count(c.num_heads)
  writer.add_head_count_kv(c.num_kv_heads)
  writer.add_key_length(c.head_dim)
  writer.add_value_length(c.head_dim)
  writer.add_rope_freq_base(c.rope_theta)
  writer.add_layer_norm_rms_eps(c.norm_epsilon)
  window = next((size for size in c.windows if size), None)
  if window is not None and c.family != 'mistral':
    writer.add_sliding_window(window)
  if c.attention_softcap is not None:
    writer.add_attn_logit_softcapping(c.attention_softcap)
    writer.add_final_logit_softcapping(c.final_softcap)
  if c.rope_scaling is not None and c.rope_scaling.kind == 'linear':
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(c.rope_scaling.factor)
  add_vocabulary(writer)
  if architecture == 'llama':
    c = dataclasses.replace(c, family='llama')
  names = {f'blk.{i}.attn_qkv.weight' for i in range(c.num_layers)}
  slots = tensor_names.gguf_slots(c, names if c.family == 'phi3' else ())
  for name, value in tensor_names.write_tensors(slots, lm.params):
    _add_tensor(writer, name, np.asarray(value, np.float32), kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def add_vocabulary(writer: gguf.GGUFWriter, pre: str = 'smollm') -> None:
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(list(VOCAB))
  writer.add_token_types([3 if token in SPECIAL else 1 for token in VOCAB])
  writer.add_token_merges([' '.join(pair) for pair in MERGES])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(0)
  writer.add_pad_token_id(0)
  writer.add_add_bos_token(False)
  writer.add_chat_template(TEMPLATE)


def _add_tensor(writer, name, value, kind) -> None:
  # Vectors stay in float32 in every real file.
  if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
    writer.add_tensor(name, value)
    return
  data = gguf.quants.quantize(value, kind)
  writer.add_tensor(name, data, raw_dtype=kind)
