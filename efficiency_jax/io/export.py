"""Saves a language model as a folder that transformers loads."""

from collections.abc import Mapping
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
import safetensors.flax

from efficiency_jax.io import hf_config
from efficiency_jax.io import pretrained
from efficiency_jax.io import tensor_names
from efficiency_jax.io import tokenizer as tokenizers_io


def save(
  model: pretrained.LanguageModel, directory: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes config.json, model.safetensors and the tokenizer's files.

  `pretrained.load` gives the same parameters back, bit for bit, and
  `AutoModelForCausalLM.from_pretrained` takes the folder as it is. Everything
  is written beside the target and moved into place at the end, so the target
  is whole or absent.

  Args:
    model: Its parameters must be plain arrays of one dtype; merge or
      dequantize typed leaves first.
    directory: Must not exist, or be empty.

  Returns:
    The directory.

  Raises:
    ValueError: The directory is not empty, or the family cannot express the
      configuration, or the parameters do not fit it.
  """
  target = pathlib.Path(directory)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ValueError(
      f'{target} exists and is not an empty folder: choose another one.'
    )
  _check_leaves(model.params)
  config = hf_config.write(model.config)
  tensors = dict(
    tensor_names.write_tensors(
      tensor_names.hf_slots(model.config), model.params
    )
  )
  names = {value.dtype.name for value in tensors.values()}
  # Both spellings: the older one is the one that old releases know.
  config |= {'torch_dtype': min(names), 'dtype': min(names)}
  config |= _token_ids(model.tokenizer)

  target.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(
    tempfile.mkdtemp(prefix='.partial-', dir=target.parent)
  )
  try:
    _write_json(scratch / 'config.json', config)
    _write_tokenizer(model.tokenizer, scratch)
    safetensors.flax.save_file(
      {name: jax.numpy.asarray(value) for name, value in tensors.items()},
      scratch / 'model.safetensors',
      metadata={'format': 'pt'},
    )
    # A private folder is what mkdtemp makes; a model is not a secret.
    scratch.chmod(0o755)
    os.replace(scratch, target)
  except BaseException:
    shutil.rmtree(scratch, ignore_errors=True)
    raise
  return target


def _check_leaves(params: Mapping[str, Any]) -> None:
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    params, is_leaf=lambda node: not isinstance(node, Mapping)
  ):
    if not isinstance(leaf, (jax.Array, np.ndarray)):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
        f'Parameter {name} is a {type(leaf).__name__}, not an array:'
        ' dequantize or merge it before saving.'
      )


def _write_tokenizer(
  tokenizer: tokenizers_io.Tokenizer, directory: pathlib.Path
) -> None:
  backend = tokenizer.backend
  settings: dict[str, Any] = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
  }
  for name, token in (
    ('bos_token', tokenizer.bos_id),
    ('eos_token', tokenizer.eos_id),
    ('pad_token', tokenizer.pad_id),
  ):
    if token is not None:
      settings[name] = backend.id_to_token(token)
  if tokenizer.chat_template is not None:
    settings['chat_template'] = tokenizer.chat_template
  _write_json(directory / 'tokenizer_config.json', settings)
  (directory / 'tokenizer.json').write_text(
    backend.to_str(pretty=True), encoding='utf-8'
  )
  generation = _token_ids(tokenizer)
  if tokenizer.stop_ids:
    generation['eos_token_id'] = list(tokenizer.stop_ids)
  _write_json(directory / 'generation_config.json', generation)


def _token_ids(tokenizer: tokenizers_io.Tokenizer) -> dict[str, Any]:
  ids = {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
  }
  return {name: token for name, token in ids.items() if token is not None}


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  text = json.dumps(values, indent=2, ensure_ascii=False)
  path.write_text(text + '\n', encoding='utf-8')
