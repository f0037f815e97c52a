"""Loads an encoder of texts by name, folder or Hub id."""

from collections.abc import Sequence
import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers

from efficiency_jax import types
from efficiency_jax.io import assets
from efficiency_jax.io import errors
from efficiency_jax.io import fields
from efficiency_jax.io import hf_encoder
from efficiency_jax.io import json_file
from efficiency_jax.io import pretrained
from efficiency_jax.io import tokenizer as tokenizers_io
from efficiency_jax.models.encoder_config import EncoderConfig


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TextEncoder:
  """An encoder of texts that is ready to run.

  Attributes:
    name: Where it came from, for people.
    config: What `encoder.Encoder` is built from.
    params: Its parameters.
    tokenizer: Its tokenizer.
    max_length: Tokens after which a text is cut.
  """

  name: str
  config: EncoderConfig
  params: types.Params
  tokenizer: tokenizers_io.Tokenizer
  max_length: int

  def batch(
    self, texts: Sequence[str], *, multiple: int = 1
  ) -> tuple[np.ndarray, np.ndarray]:
    """Gives texts as token ids and as a mask of them: two [B, T] int32.

    A text stands between the marks that the model was trained with, as in
    `[CLS] a text [SEP]`, and is cut to `max_length` tokens, marks included.
    Rows are filled up to the longest with zeros, where the mask is 0.

    Args:
      texts: One or more.
      multiple: T is rounded up to a multiple of this, but not beyond
        `config.max_positions`: texts of many lengths share a few shapes.

    Raises:
      ValueError: There are no texts.
    """
    if not texts:
      raise ValueError('texts must hold at least one text.')
    rows = [encoded.ids for encoded in self._cutting.encode_batch(list(texts))]
    longest = max(1, *map(len, rows))
    time = min(-(-longest // multiple) * multiple, self.config.max_positions)
    tokens = np.zeros((len(rows), time), np.int32)
    mask = np.zeros_like(tokens)
    for place, row in enumerate(rows):
      tokens[place, : len(row)] = row
      mask[place, : len(row)] = 1
    return tokens, mask

  @functools.cached_property
  def _cutting(self) -> tokenizers.Tokenizer:
    # A copy, because the length is a property of the whole tokenizer.
    backend = tokenizers.Tokenizer.from_str(self.tokenizer.backend.to_str())
    backend.enable_truncation(self.max_length)
    return backend


def load(
  source: str | os.PathLike[str], *, dtype: Any = jnp.float32
) -> TextEncoder:
  """Loads an encoder.

  Args:
    source: The name of an asset (`minilm-l6` or `mpnet-base`), a folder in the
      layout of Hugging Face (a `BertModel` or `MPNetModel`), or a Hub id
      (`owner/name`). A folder that exists is taken as a folder.
    dtype: Of the parameters: float32, bfloat16 or float16.

  Raises:
    ValueError: `source` or `dtype` is none of these.
    FileFormatError: A file is damaged or of a kind that is not supported.
    FetchError: The encoder could not be downloaded.
  """
  pretrained.check_dtype(dtype)
  path = pathlib.Path(source).expanduser()
  name = os.fspath(source)
  if path.is_dir():
    return _load_directory(path, path.resolve().name, dtype)
  encoders = [a.name for a in assets.ASSETS.values() if _is_encoder(a)]
  if name in encoders:
    return _load_directory(assets.fetch(name).parent, name, dtype)
  if pretrained.is_hub_id(name):
    return _load_directory(pretrained.snapshot(name), name, dtype)
  raise ValueError(
    f'{name!r} is neither a folder, nor an encoder asset'
    f' ({", ".join(encoders)}), nor a Hub id like owner/name.'
  )


def _is_encoder(asset: assets.Asset) -> bool:
  return asset.file_name == 'model.safetensors'


def _load_directory(path: pathlib.Path, name: str, dtype: Any) -> TextEncoder:
  config = hf_encoder.read(*pretrained.read_config(path))
  # The small files first: damaged ones are found before the weights are read.
  tokenizer = tokenizers_io.from_directory(path)
  if tokenizer.vocab_size > config.vocab_size:
    raise errors.FileFormatError(
      path / 'tokenizer.json',
      f'knows {tokenizer.vocab_size} tokens, but the model has'
      f' {config.vocab_size}',
      'take the tokenizer that belongs to the model',
    )
  max_length = _max_length(path, config)
  params = pretrained.read_weights(
    path, hf_encoder.slots(config), ignored=hf_encoder.ignored, dtype=dtype
  )
  return TextEncoder(
    name=name,
    config=config,
    params=params,
    tokenizer=tokenizer,
    max_length=max_length,
  )


def _max_length(directory: pathlib.Path, config: EncoderConfig) -> int:
  """Tokens that a text may have, from the settings of sentence-transformers."""
  path = directory / 'sentence_bert_config.json'
  if not path.is_file():
    return config.max_positions
  settings = fields.Fields(path, json_file.read_object(path))
  length = settings.size('max_seq_length', config.max_positions)
  return min(length, config.max_positions)
