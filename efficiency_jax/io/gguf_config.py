"""Translates GGUF metadata to a `DecoderConfig`."""

from typing import Any

import numpy as np

from efficiency_jax.io import errors
from efficiency_jax.io import fields
from efficiency_jax.io import gguf_file
from efficiency_jax.models import config as model_config

_FAMILIES = {
  'llama': 'llama',
  'qwen2': 'qwen2',
  'qwen3': 'qwen3',
  'gemma2': 'gemma2',
  'gemma3': 'gemma3_text',
  'phi3': 'phi3',
}
ARCHITECTURES = tuple(_FAMILIES)
# The largest members scale queries by the width of a head as if heads shared
# the residual width; the metadata has no field for it.
_WIDE_QUERY_LAYERS = {'gemma2': 46, 'gemma3': 62}
_ROPE_FACTORS = 'rope_freqs.weight'


def read(file: gguf_file.GGUFFile) -> model_config.DecoderConfig:
  """Reads the configuration of the model in a GGUF file.

  Raises:
    FileFormatError: The architecture is not supported, or a field is missing,
      of the wrong type or out of range.
  """
  general = fields.Fields(file.path, file.metadata, 'general.')
  architecture = general.text('architecture')
  if architecture not in _FAMILIES:
    raise general.error(
      'architecture',
      f'{architecture!r} is not supported',
      f'use a model of one of {", ".join(ARCHITECTURES)}',
    )
  split = fields.Fields(file.path, file.metadata, 'split.')
  if split.index('count', 1) > 1:
    remedy = 'merge the parts with gguf-split and load the result'
    raise split.error('count', 'says that this is one part of several', remedy)
  source = fields.Fields(file.path, file.metadata, f'{architecture}.')
  try:
    return model_config.DecoderConfig(
      **_arguments(architecture, source, file),
    )
  except errors.FileFormatError:
    raise
  except ValueError as error:
    problem = str(error)
    raise errors.FileFormatError(
      file.path, problem, 'check the file'
    ) from error


def _arguments(
  architecture: str, source: fields.Fields, file: gguf_file.GGUFFile
) -> dict[str, Any]:
  """Keyword arguments of `DecoderConfig`."""
  gemma = architecture in ('gemma2', 'gemma3')
  width = source.size('embedding_length')
  layers = source.size('block_count', maximum=fields.MAX_LAYERS)
  heads = source.size('attention.head_count')
  head_dim = source.size('attention.key_length', max(1, width // heads))
  if source.size('attention.value_length', head_dim) != head_dim:
    raise source.error('attention.value_length', f'differs from {head_dim}')
  if source.size('rope.dimension_count', head_dim) != head_dim:
    raise source.error(
      'rope.dimension_count',
      f'differs from the head width {head_dim}',
      'use a model that rotates whole heads',
    )
  scale_width = head_dim
  if layers == _WIDE_QUERY_LAYERS.get(architecture):
    scale_width = width // heads
  theta = source.positive(
    'rope.freq_base', 1e6 if architecture == 'gemma3' else 10_000.0
  )
  local_theta = None
  if architecture == 'gemma3':
    local_theta = source.positive('rope.freq_base_swa', 10_000.0)
  return {
    'vocab_size': _vocab_size(source, file),
    'width': width,
    'ffn_width': source.size('feed_forward_length'),
    'num_layers': layers,
    'num_heads': heads,
    'num_kv_heads': source.size('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'max_positions': source.size('context_length'),
    'activation': 'gelu_tanh' if gemma else 'silu',
    'norm_epsilon': _as_written(
      source.positive('attention.layer_norm_rms_epsilon')
    ),
    'norm_plus_one': gemma,
    'post_norms': gemma,
    'qk_norm': architecture in ('qwen3', 'gemma3'),
    'qkv_bias': 'blk.0.attn_q.bias' in file.tensors,
    'output_bias': 'blk.0.attn_output.bias' in file.tensors,
    'mlp_bias': 'blk.0.ffn_down.bias' in file.tensors,
    'tie_embeddings': 'output.weight' not in file.tensors,
    'scale_embeddings': gemma,
    'query_scale': scale_width**-0.5 if gemma else None,
    'attention_softcap': _softcap(architecture, source, 'attn', 50.0),
    'final_softcap': _softcap(architecture, source, 'final', 30.0),
    'rope_theta': _as_written(theta),
    'local_rope_theta': local_theta,
    'rope_scaling': _scaling(source, file, theta, head_dim),
    'windows': _windows(architecture, source, layers),
    'family': _FAMILIES[architecture],
  }


def _vocab_size(source: fields.Fields, file: gguf_file.GGUFFile) -> int:
  # The table's own rows: the metadata field is optional, and some writers put
  # the number of known tokens in it instead of the padded one.
  info = file.tensors.get('token_embd.weight')
  if info is None:
    problem = 'has no tensor token_embd.weight'
    raise errors.FileFormatError(source.path, problem, 'use a language model')
  return info.shape[0]


def _as_written(value: float) -> float:
  """The short decimal behind a float32: 9.99999974e-06 is 1e-5."""
  return float(str(np.float32(value)))


def _softcap(
  architecture: str, source: fields.Fields, which: str, default: float
) -> float | None:
  if architecture not in ('gemma2', 'gemma3'):
    return None
  return source.positive(
    f'{which}_logit_softcapping',
    default if architecture == 'gemma2' else None,
  )


def _windows(
  architecture: str, source: fields.Fields, layers: int
) -> tuple[int | None, ...]:
  """The sliding window of every layer; empty when there is none."""
  default = 4096 if architecture == 'gemma2' else None
  size = source.index('attention.sliding_window', default)
  if not size or architecture not in ('gemma2', 'gemma3', 'phi3'):
    return ()
  period = {'gemma2': 2, 'gemma3': 6}.get(architecture)
  return tuple(
    None if period and (layer + 1) % period == 0 else size
    for layer in range(layers)
  )


def _scaling(
  source: fields.Fields,
  file: gguf_file.GGUFFile,
  theta: float,
  head_dim: int,
) -> model_config.RopeScaling | None:
  if _ROPE_FACTORS in file.tensors:
    return _llama3_scaling(source, file, theta, head_dim)
  if any(name.startswith('rope_factors_') for name in file.tensors):
    raise errors.FileFormatError(
      file.path,
      'has longrope factors, which are not supported',
      'use the short-context variant of the model',
    )
  kind = source.text('rope.scaling.type', 'none')
  if kind == 'none':
    return None
  if kind != 'linear':
    raise source.error(
      'rope.scaling.type',
      f'{kind!r} is not supported (linear is)',
      'use the short-context variant of the model',
    )
  factor = source.positive('rope.scaling.factor')
  return model_config.RopeScaling(kind='linear', factor=factor)


def _llama3_scaling(
  source: fields.Fields,
  file: gguf_file.GGUFFile,
  theta: float,
  head_dim: int,
) -> model_config.RopeScaling:
  """Recovers the scaling of Llama 3 from the divisors that it was baked into.

  GGUF keeps one divisor a frequency and none of the settings, so the published
  settings are tried, and believed only if they give the same divisors.
  """
  divisors = file.tensor(_ROPE_FACTORS).reshape(-1)
  if divisors.size == head_dim // 2 and np.isfinite(divisors).all():
    factor = max(1.0, _as_written(divisors.max()))
    scaling = model_config.RopeScaling(kind='llama3', factor=factor)
    expected = _llama3_divisors(scaling, theta, head_dim)
    if np.allclose(divisors, expected, rtol=1e-3):
      return scaling
  raise errors.FileFormatError(
    file.path,
    f'tensor {_ROPE_FACTORS} is not the scaling of Llama 3',
    'use a model with llama3 or no rotary scaling',
  )


def _llama3_divisors(
  scaling: model_config.RopeScaling, theta: float, head_dim: int
) -> np.ndarray:
  """What each rotary frequency is divided by: [head_dim / 2]."""
  exponents = np.arange(0, head_dim, 2) / head_dim
  turns = scaling.original_context / (2 * np.pi * theta**exponents)
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return 1.0 / ((1.0 - blend) / scaling.factor + blend)
