"""Translates a Hugging Face `config.json` to a `DecoderConfig` and back.

Families are told apart by `model_type`. Defaults are those that the published
configurations rely on by leaving fields out. Both layouts of the rotary
settings are read: `rope_theta` and `rope_scaling`, and `rope_parameters`.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
from typing import Any

from efficiency_jax.io import errors
from efficiency_jax.io import fields
from efficiency_jax.models import config as model_config

_ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'mistral': 'MistralForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
  'gemma2': 'Gemma2ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
  'phi3': 'Phi3ForCausalLM',
}
FAMILIES = tuple(_ARCHITECTURES)
_GEMMA = ('gemma2', 'gemma3_text')
_ACTIVATIONS = {
  'silu': 'silu',
  'swish': 'silu',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
_SLIDING, _FULL = 'sliding_attention', 'full_attention'

# What a family's files may leave out. Fields that are not here either have a
# rule of their own below or must be present.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
  'llama': {'max_position_embeddings': 2048},
  'mistral': {
    'num_key_value_heads': 8,
    'max_position_embeddings': 131072,
    'sliding_window': 4096,
  },
  'qwen2': {'max_position_embeddings': 32768, 'sliding_window': 4096},
  'qwen3': {
    'head_dim': 128,
    'max_position_embeddings': 32768,
    'sliding_window': 4096,
  },
  'gemma2': {
    'head_dim': 256,
    'num_key_value_heads': 4,
    'max_position_embeddings': 8192,
    'tie_word_embeddings': True,
    'query_pre_attn_scalar': 256,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
    'sliding_window': 4096,
  },
  'gemma3_text': {
    'vocab_size': 262_208,
    'hidden_size': 2304,
    'intermediate_size': 9216,
    'num_hidden_layers': 26,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'max_position_embeddings': 131072,
    'tie_word_embeddings': True,
    'query_pre_attn_scalar': 256,
    'sliding_window': 4096,
    'rope_theta': 1e6,
  },
  'phi3': {'max_position_embeddings': 4096, 'rms_norm_eps': 1e-5},
}
# Elsewhere null is another way to leave a field out; here it means "none".
_NULL_MEANS_NONE = (
  'attn_logit_softcapping',
  'final_logit_softcapping',
  'sliding_window',
)


def read(
  values: Mapping[str, Any], path: str | os.PathLike[str] = 'config.json'
) -> model_config.DecoderConfig:
  """Reads the parsed content of a `config.json`.

  Args:
    values: The JSON object.
    path: Named in errors.

  Raises:
    FileFormatError: A field is missing, of the wrong type or out of range, or
      asks for something that the model does not have.
  """
  family = fields.Fields(path, values).text('model_type')
  if family == 'gemma3':
    # The multimodal wrapper; its text half is the decoder.
    inner = fields.Fields(path, values).object('text_config')
    if inner is None:
      raise fields.Fields(path, values).error('text_config', 'is missing')
    outer = {k: values[k] for k in ('quantization_config',) if k in values}
    values, family = {**inner.values, **outer}, 'gemma3_text'
  if family not in FAMILIES:
    raise errors.FileFormatError(
      path,
      f'model_type {family!r} is not supported',
      f'use a model of one of {", ".join(FAMILIES)}',
    )
  present = {
    name: value
    for name, value in values.items()
    if value is not None or name in _NULL_MEANS_NONE
  }
  source = fields.Fields(path, {**_DEFAULTS[family], **present})
  _refuse_unsupported(source)
  try:
    return model_config.DecoderConfig(**_arguments(family, source))
  except errors.FileFormatError:
    raise
  except ValueError as error:
    raise errors.FileFormatError(path, str(error), 'check the file') from error


def write(config: model_config.DecoderConfig) -> dict[str, Any]:
  """Gives the `config.json` content from which `read` gives `config` again.

  The layout is the one with `rope_theta` and `rope_scaling` at the top, which
  every release of transformers reads.

  Raises:
    ValueError: The configuration is not one of its family's.
  """
  if config.family not in FAMILIES:
    raise ValueError(
      f'family {config.family!r} cannot be exported: {", ".join(FAMILIES)} can.'
    )
  values = _sizes(config) | _family_choices(config)
  found = read(values)
  if found != config:
    wrong = [
      f'{field.name}={getattr(config, field.name)!r}'
      for field in dataclasses.fields(config)
      if getattr(config, field.name) != getattr(found, field.name)
    ]
    raise ValueError(
      f'A {config.family} checkpoint cannot express {", ".join(wrong)}.'
    )
  return values


def _arguments(family: str, source: fields.Fields) -> dict[str, Any]:
  """Keyword arguments of `DecoderConfig`."""
  gemma = family in _GEMMA
  width = source.size('hidden_size')
  heads = source.size('num_attention_heads')
  layers = source.size('num_hidden_layers', maximum=fields.MAX_LAYERS)
  attention_bias = family not in ('mistral', 'qwen2', 'phi3') and source.flag(
    'attention_bias'
  )
  query_scale = None
  if gemma:
    query_scale = source.positive('query_pre_attn_scalar') ** -0.5
  return {
    'vocab_size': source.size('vocab_size'),
    'width': width,
    'ffn_width': source.size('intermediate_size'),
    'num_layers': layers,
    'num_heads': heads,
    'num_kv_heads': source.size('num_key_value_heads', heads),
    'head_dim': source.size('head_dim', max(1, width // heads)),
    'max_positions': source.size('max_position_embeddings'),
    'activation': _activation(family, source),
    'norm_epsilon': source.positive('rms_norm_eps', 1e-6),
    'norm_plus_one': gemma,
    'post_norms': gemma,
    'qk_norm': family in ('qwen3', 'gemma3_text'),
    'qkv_bias': family == 'qwen2' or attention_bias,
    'output_bias': attention_bias,
    'mlp_bias': family == 'llama' and source.flag('mlp_bias'),
    'tie_embeddings': source.flag('tie_word_embeddings', False),
    'scale_embeddings': gemma,
    'query_scale': query_scale,
    'attention_softcap': _softcap(gemma, source, 'attn_logit_softcapping'),
    'final_softcap': _softcap(gemma, source, 'final_logit_softcapping'),
    **_rotary(family, source),
    'windows': _windows(family, source, layers),
    'family': family,
  }


def _refuse_unsupported(source: fields.Fields) -> None:
  if source.get('quantization_config') is not None:
    raise source.error(
      'quantization_config',
      'is present: its packed weights are not read',
      'load the unquantized checkpoint or a GGUF file',
    )
  if source.get('use_bidirectional_attention'):
    raise source.error(
      'use_bidirectional_attention', 'is not supported', 'use another model'
    )


def _softcap(gemma: bool, source: fields.Fields, name: str) -> float | None:
  return source.positive(name, None) if gemma else None


def _activation(family: str, source: fields.Fields) -> str:
  # Gemma files also have a hidden_act, which their model does not read.
  field, default = 'hidden_act', 'silu'
  if family in _GEMMA:
    field, default = 'hidden_activation', 'gelu_pytorch_tanh'
  name = source.text(field, default)
  if name not in _ACTIVATIONS:
    raise source.error(
      field,
      f'is {name!r}, which is not supported',
      f'use a model with one of {", ".join(_ACTIVATIONS)}',
    )
  return _ACTIVATIONS[name]


def _rotary(family: str, source: fields.Fields) -> dict[str, Any]:
  """Rotary bases and scaling, from either layout."""
  local_theta = None
  if family == 'gemma3_text':
    local_theta = source.positive('rope_local_base_freq', 10_000.0)
  theta = source.positive('rope_theta', 10_000.0)
  scaling = source.object('rope_scaling')
  rotary = source.object('rope_parameters')
  if rotary is not None:
    nested = rotary.object(_FULL)
    if nested is not None:
      local = rotary.object(_SLIDING)
      if local is not None:
        local_theta = local.positive('rope_theta', local_theta)
        if _scaling(local) is not None:
          raise local.error('rope_type', 'of sliding layers must be default')
      rotary = nested
    theta = rotary.positive('rope_theta', theta)
    scaling = rotary
  for place in filter(None, (source, scaling)):
    if place.positive('partial_rotary_factor', 1.0) != 1.0:
      raise place.error(
        'partial_rotary_factor',
        'other than 1 is not supported',
        'use another model',
      )
  return {
    'rope_theta': theta,
    'local_rope_theta': local_theta,
    'rope_scaling': _scaling(scaling) if scaling is not None else None,
  }


def _scaling(source: fields.Fields) -> model_config.RopeScaling | None:
  old_name = source.text('type', 'default')
  kind = source.text('rope_type', old_name)
  if kind == 'default':
    return None
  if kind == 'linear':
    factor = source.positive('factor')
    return model_config.RopeScaling(kind='linear', factor=factor)
  if kind == 'llama3':
    return model_config.RopeScaling(
      kind='llama3',
      factor=source.positive('factor'),
      low_frequency_factor=source.positive('low_freq_factor'),
      high_frequency_factor=source.positive('high_freq_factor'),
      original_context=source.size('original_max_position_embeddings'),
    )
  raise source.error(
    'rope_type',
    f'{kind!r} is not supported (default, linear and llama3 are)',
    'use the short-context variant of the model',
  )


def _windows(
  family: str, source: fields.Fields, layers: int
) -> tuple[int | None, ...]:
  """The sliding window of every layer; empty when there is none."""
  if family == 'llama':
    return ()
  if family in ('qwen2', 'qwen3') and not source.flag('use_sliding_window'):
    return ()
  size = source.size('sliding_window', None)
  if size is None:
    return ()
  types = source.get('layer_types')
  if types is None or family in ('mistral', 'phi3'):
    sliding = [_slides(family, source, layer) for layer in range(layers)]
  else:
    if not isinstance(types, list) or len(types) != layers:
      raise source.error('layer_types', f'must be a list of {layers} strings')
    for name in types:
      if name not in (_SLIDING, _FULL):
        raise source.error('layer_types', f'holds {name!r}, not {_SLIDING!r}')
    sliding = [name == _SLIDING for name in types]
  if not any(sliding):
    return ()
  return tuple(size if slides else None for slides in sliding)


def _slides(family: str, source: fields.Fields, layer: int) -> bool:
  if family == 'gemma2':
    return layer % 2 == 0
  if family == 'gemma3_text':
    return (layer + 1) % source.size('sliding_window_pattern', 6) != 0
  if family in ('qwen2', 'qwen3'):
    return layer >= source.index('max_window_layers', 28)
  return True


def _sizes(config: model_config.DecoderConfig) -> dict[str, Any]:
  return {
    'architectures': [_ARCHITECTURES[config.family]],
    'model_type': config.family,
    'vocab_size': config.vocab_size,
    'hidden_size': config.width,
    'intermediate_size': config.ffn_width,
    'num_hidden_layers': config.num_layers,
    'num_attention_heads': config.num_heads,
    'num_key_value_heads': config.num_kv_heads,
    'head_dim': config.head_dim,
    'max_position_embeddings': config.max_positions,
    'rms_norm_eps': config.norm_epsilon,
    'tie_word_embeddings': config.tie_embeddings,
    'rope_theta': config.rope_theta,
    'rope_scaling': _scaling_values(config.rope_scaling),
    'use_cache': True,
  }


def _scaling_values(
  scaling: model_config.RopeScaling | None,
) -> dict[str, Any] | None:
  if scaling is None:
    return None
  values: dict[str, Any] = {'rope_type': scaling.kind, 'factor': scaling.factor}
  if scaling.kind == 'llama3':
    values |= {
      'low_freq_factor': scaling.low_frequency_factor,
      'high_freq_factor': scaling.high_frequency_factor,
      'original_max_position_embeddings': scaling.original_context,
    }
  return values


def _family_choices(config: model_config.DecoderConfig) -> dict[str, Any]:
  """Fields that only some families have."""
  family = config.family
  window = next((size for size in config.windows if size is not None), None)
  layer_types = [
    _FULL if config.window(layer) is None else _SLIDING
    for layer in range(config.num_layers)
  ]
  values: dict[str, Any] = {}
  if family in _GEMMA:
    scale = config.query_scale or config.head_dim**-0.5
    values |= {
      'hidden_activation': 'gelu_pytorch_tanh',
      'query_pre_attn_scalar': _square(1 / scale),
      'attn_logit_softcapping': config.attention_softcap,
      'final_logit_softcapping': config.final_softcap,
      'attention_bias': config.qkv_bias,
      'sliding_window': window or _DEFAULTS[family]['sliding_window'],
      'layer_types': layer_types,
    }
  else:
    values['hidden_act'] = 'silu'
  if family == 'gemma3_text':
    values['rope_local_base_freq'] = config.local_rope_theta
  if family == 'llama':
    values['mlp_bias'] = config.mlp_bias
  if family in ('llama', 'qwen3'):
    values['attention_bias'] = config.qkv_bias
  if family in ('mistral', 'phi3'):
    values['sliding_window'] = window
  if family in ('qwen2', 'qwen3'):
    values['use_sliding_window'] = window is not None
    values['sliding_window'] = window
    values['layer_types'] = layer_types
  return values


def _square(root: float) -> float | int:
  """root ** 2, as the whole number that it is in every published model."""
  square = root * root
  whole = round(square)
  return whole if math.isclose(square, whole, rel_tol=1e-9) else square
