"""Saves a language model as one GGUF file, which llama.cpp loads."""

from collections.abc import Mapping
import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
from typing import Any

import gguf
import jax
import numpy as np

from efficiency_jax.io import errors
from efficiency_jax.io import gguf_blocks
from efficiency_jax.io import gguf_config
from efficiency_jax.io import gguf_file
from efficiency_jax.io import gguf_tokenizer
from efficiency_jax.io import pretrained
from efficiency_jax.io import tensor_names
from efficiency_jax.leaves import QTensor
from efficiency_jax.models import config as model_config
from efficiency_jax.models import rope

# Families that GGUF files call otherwise.
_ARCHITECTURES = {'gemma3_text': 'gemma3', 'mistral': 'llama'}
_FILE_TYPES = {
  gguf_blocks.Kind.F32: gguf.LlamaFileType.ALL_F32,
  gguf_blocks.Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
  gguf_blocks.Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
  gguf_blocks.Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
  gguf_blocks.Kind.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
  gguf_blocks.Kind.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
}


def save(
  model: pretrained.LanguageModel, path: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes configuration, tokenizer and tensors, each as its leaf stores it.

  Arrays become F32, F16 or BF16. A `QTensor` becomes Q8_0, Q4_0 or Q4_1 and
  loses nothing: `pretrained.load` gives its values back bit for bit, with
  `packed=True` in as few bits. Vectors are written in float32, which is what
  llama.cpp computes with. The file is written beside the target, read again,
  and moved into place, so the target is whole or absent.

  Args:
    model: Of a family that GGUF has a name for; its matrices are arrays or
      `QTensor`s that fit into blocks (`gguf_blocks.from_qtensor`).
    path: Must not exist.

  Returns:
    The path.

  Raises:
    ValueError: The path exists; or a leaf, the configuration or the tokenizer
      has no form in GGUF.
  """
  target = pathlib.Path(path)
  if target.exists():
    raise ValueError(f'{target} exists: choose another name.')
  family = model.config.family
  architecture = _ARCHITECTURES.get(family, family)
  if architecture not in gguf_config.ARCHITECTURES:
    names = ', '.join(gguf_config.ARCHITECTURES)
    raise ValueError(f'GGUF export knows {names}, got family {family!r}.')
  _check_leaves(model.params)
  tensors = _tensors(model)
  metadata = {'general.type': 'model', 'general.name': model.name}
  metadata |= _file_settings(tensors)
  for name, value in _settings(model.config).items():
    metadata[f'{architecture}.{name}'] = value
  metadata |= gguf_tokenizer.write(model.tokenizer, model.config.vocab_size)

  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(
    prefix='.partial-', dir=target.parent
  ) as scratch:
    written = pathlib.Path(scratch) / 'model.gguf'
    _write(written, architecture, metadata, tensors)
    _check_config(written, architecture, model.config)
    os.replace(written, target)
  return target


def _check_leaves(params: Mapping[str, Any]) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    params, is_leaf=lambda node: not isinstance(node, Mapping)
  ):
    if not isinstance(leaf, (jax.Array, np.ndarray, QTensor)):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
        f'Parameter {name} is a {type(leaf).__name__}, which GGUF has no form'
        ' for: merge or dequantize it before saving.'
      )


def _tensors(model: pretrained.LanguageModel) -> dict[str, np.ndarray]:
  """The tensors of the file by name, as blocks or floats."""
  config, names = model.config, set()
  if _ARCHITECTURES.get(config.family) == 'llama':
    # Its queries and keys lie as those of Llama do.
    config = dataclasses.replace(config, family='llama')
  if config.family == 'phi3':
    names = {f'blk.{i}.attn_qkv.weight' for i in range(config.num_layers)}
  slots = tensor_names.gguf_slots(config, names)
  tensors = dict(tensor_names.write_tensors(slots, model.params))
  scaling = config.rope_scaling
  if scaling is not None and scaling.kind == 'llama3':
    plain = rope.frequencies(config.head_dim, config.rope_theta)
    scaled = rope.frequencies(config.head_dim, config.rope_theta, scaling)
    tensors['rope_freqs.weight'] = plain / scaled
  return {
    name: value.astype(np.float32) if value.ndim == 1 else value
    for name, value in tensors.items()
  }


def _file_settings(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """What the file says of itself: the kind that most of its numbers have."""
  sizes: dict[gguf_blocks.Kind, int] = {}
  for value in tensors.values():
    _, kind = gguf_blocks.stored(value)
    size = math.prod(gguf_blocks.shape(value))
    sizes[kind] = sizes.get(kind, 0) + size
  settings = {'general.file_type': int(_FILE_TYPES[max(sizes, key=sizes.get)])}
  if sizes.keys() & gguf_blocks.KINDS.keys():
    settings['general.quantization_version'] = gguf.GGML_QUANT_VERSION
  return settings


def _settings(c: model_config.DecoderConfig) -> dict[str, Any]:
  """The configuration in the words of GGUF, without its architecture."""
  linear = c.rope_scaling is not None and c.rope_scaling.kind == 'linear'
  values = {
    'vocab_size': c.vocab_size,
    'context_length': c.max_positions,
    'embedding_length': c.width,
    'block_count': c.num_layers,
    'feed_forward_length': c.ffn_width,
    'attention.head_count': c.num_heads,
    'attention.head_count_kv': c.num_kv_heads,
    'attention.key_length': c.head_dim,
    'attention.value_length': c.head_dim,
    'attention.layer_norm_rms_epsilon': c.norm_epsilon,
    'attention.sliding_window': next(filter(None, c.windows), None),
    'attn_logit_softcapping': c.attention_softcap,
    'final_logit_softcapping': c.final_softcap,
    'rope.dimension_count': c.head_dim,
    'rope.freq_base': float(c.rope_theta),
    'rope.freq_base_swa': c.local_rope_theta,
    'rope.scaling.type': 'linear' if linear else None,
    'rope.scaling.factor': float(c.rope_scaling.factor) if linear else None,
  }
  return {name: value for name, value in values.items() if value is not None}


def _write(
  path: pathlib.Path,
  architecture: str,
  metadata: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
) -> None:
  with contextlib.closing(gguf.GGUFWriter(path, architecture)) as writer:
    # A boolean is an integer, so it comes first.
    adders = (
      (bool, writer.add_bool),
      (int, writer.add_uint32),
      (float, writer.add_float32),
      (str, writer.add_string),
      (list, writer.add_array),
      (np.ndarray, lambda key, array: writer.add_array(key, array.tolist())),
    )
    for key, value in metadata.items():
      add = next(add for kind, add in adders if isinstance(value, kind))
      add(key, value)
    for name, value in tensors.items():
      data, kind = gguf_blocks.stored(value)
      writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def _check_config(
  path: pathlib.Path, architecture: str, config: model_config.DecoderConfig
) -> None:
  """Refuses a model of which the file does not say everything."""
  try:
    found = gguf_config.read(gguf_file.read(path))
  except errors.FileFormatError as error:
    raise ValueError(
      f'A GGUF file of {architecture} cannot describe this model: {error}'
    ) from error
  found, wanted = _plainly(found), _plainly(config)
  names = found.keys() | wanted.keys()
  lost = sorted(n for n in names if not _same(found.get(n), wanted.get(n)))
  if lost:
    raise ValueError(
      f'A GGUF file of {architecture} has no place for the {", ".join(lost)}'
      ' of this model: save it as a folder.'
    )


def _plainly(config: model_config.DecoderConfig) -> dict[str, Any]:
  """The fields of a configuration, where equal models have equal ones."""
  values = dataclasses.asdict(config)
  del values['family']  # llama for mistral
  values['query_scale'] = config.query_scale or config.head_dim**-0.5
  values['windows'] = [config.window(i) for i in range(config.num_layers)]
  scaling = values.pop('rope_scaling') or {}
  values |= {f'rope_scaling.{name}': value for name, value in scaling.items()}
  return values


def _same(found: Any, wanted: Any) -> bool:
  if isinstance(found, float) and isinstance(wanted, (int, float)):
    return math.isclose(found, wanted, rel_tol=1e-6)  # the file has float32
  return found == wanted
