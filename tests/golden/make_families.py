"""Writes small models of every family with the logits of transformers.

Run with the peers installed (`make test-peers` does that):

  .venv-peers/bin/python -m tests.golden.make_families

Each file under `tests/golden/families` is one model: its weights under the
names of the checkpoint, `golden.tokens` [1, T], `golden.logits` [1, T, V], and
its `config.json` in the metadata.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from tests.golden import files

DIRECTORY = pathlib.Path(__file__).parent / 'families'
# Longer than the windows, and than one block of the cache (128 slots).
TIME = 150
_SIZES = {
  'vocab_size': 97,
  'hidden_size': 32,
  'intermediate_size': 40,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'max_position_embeddings': 256,
  # Large, so that forgetting it shows; like everything below.
  'rms_norm_eps': 1e-2,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
}
_GEMMA = {'head_dim': 16, 'sliding_window': 24, 'query_pre_attn_scalar': 10}
_LOCAL, _GLOBAL = 'sliding_attention', 'full_attention'
FAMILIES = {
  'llama': ('LlamaConfig', {'tie_word_embeddings': True}),
  'llama3': (
    'LlamaConfig',
    {
      'attention_bias': True,
      'mlp_bias': True,
      # Of the four wavelengths 6, 42, 282 and 1885 the first is kept, the
      # second blended and the others are scaled.
      'rope_parameters': {
        'rope_type': 'llama3',
        'rope_theta': 2000.0,
        'factor': 8.0,
        'low_freq_factor': 1.0,
        'high_freq_factor': 4.0,
        'original_max_position_embeddings': 64,
      },
    },
  ),
  'mistral': ('MistralConfig', {'sliding_window': 24}),
  'qwen2': (
    'Qwen2Config',
    {
      'use_sliding_window': True,
      'sliding_window': 24,
      'max_window_layers': 1,
      'tie_word_embeddings': True,
    },
  ),
  'qwen3': (
    'Qwen3Config',
    {
      'head_dim': 16,
      'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6},
    },
  ),
  'gemma2': (
    'Gemma2Config',
    {**_GEMMA, 'attn_logit_softcapping': 2.0, 'final_logit_softcapping': 3.0},
  ),
  'gemma3_text': (
    'Gemma3TextConfig',
    {
      **_GEMMA,
      'num_hidden_layers': 3,
      'layer_types': [_LOCAL, _GLOBAL, _LOCAL],
      'rope_parameters': {
        _LOCAL: {'rope_type': 'default', 'rope_theta': 1e4},
        _GLOBAL: {'rope_type': 'linear', 'rope_theta': 1e6, 'factor': 8.0},
      },
    },
  ),
  'phi3': ('Phi3Config', {'sliding_window': 24}),
}


class Golden(NamedTuple):
  """A model as its files spell it, and what it says about some tokens."""

  config: dict  # the content of config.json
  weights: dict[str, np.ndarray]
  tokens: np.ndarray  # [1, T] int32
  logits: np.ndarray  # [1, T, V] float32


def build(name: str, seed: int) -> Golden:
  """Runs a random model of the family in transformers, in float32."""
  import torch
  import transformers

  class_name, choices = FAMILIES[name]
  config = getattr(transformers, class_name)(**{**_SIZES, **choices})
  model = transformers.AutoModelForCausalLM.from_config(
    config, dtype=torch.float32, attn_implementation='eager'
  ).eval()
  rng = np.random.default_rng(seed)
  weights = {
    key: _random(rng, key, tuple(parameter.shape), name.startswith('gemma'))
    for key, parameter in model.named_parameters()
  }
  tokens = rng.integers(0, config.vocab_size, (1, TIME), dtype=np.int32)
  with torch.no_grad():
    for key, parameter in model.named_parameters():
      parameter.copy_(torch.from_numpy(weights[key]))
    ids = torch.from_numpy(tokens.astype(np.int64))
    logits = model(ids, use_cache=False).logits.numpy()
  # What save_pretrained writes.
  written = json.loads(config.to_json_string())
  return Golden(written, weights, tokens, logits)


def _random(rng, name: str, shape, norm_plus_one: bool) -> np.ndarray:
  """Values that make every weight matter: no unit norm and no zero bias."""
  noise = rng.standard_normal(shape).astype(np.float32)
  if 'norm' in name:
    return np.float32(not norm_plus_one) + 0.3 * noise
  if name.endswith('bias'):
    return 0.3 * noise
  if 'embed_tokens' in name or 'lm_head' in name:
    return 0.4 * noise
  return (1.2 / np.sqrt(shape[-1]) * noise).astype(np.float32)


def read(path: pathlib.Path) -> Golden:
  """Reads what `write` wrote."""
  config, weights, results = files.read(path)
  return Golden(config, weights, **results)


def write(path: pathlib.Path, golden: Golden) -> None:
  """Writes a model, its texts and its results in one file."""
  results = {name: getattr(golden, name) for name in ('tokens', 'logits')}
  files.write(path, golden.config, golden.weights, results)


def main() -> None:
  DIRECTORY.mkdir(exist_ok=True)
  for seed, name in enumerate(FAMILIES):
    path = DIRECTORY / f'{name}.safetensors'
    golden = build(name, seed)
    write(path, golden)
    spread = golden.logits.std()
    print(f'{name}: {path.stat().st_size} bytes, logits {spread:.2f} wide')


if __name__ == '__main__':
  main()
