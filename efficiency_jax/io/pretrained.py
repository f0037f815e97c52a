"""Loads a language model by name, folder, file or Hub id."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from efficiency_jax import types
from efficiency_jax.io import assets
from efficiency_jax.io import errors
from efficiency_jax.io import gguf_blocks
from efficiency_jax.io import gguf_config
from efficiency_jax.io import gguf_file
from efficiency_jax.io import gguf_tokenizer
from efficiency_jax.io import hf_config
from efficiency_jax.io import json_file
from efficiency_jax.io import tensor_names
from efficiency_jax.io import tokenizer as tokenizers_io
from efficiency_jax.models import config as model_config

_HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
_HUB_FILES = ('*.json', '*.safetensors', '*.jinja')
_FLOATS = ('F64', 'F32', 'F16', 'BF16')
_DTYPES = ('float32', 'bfloat16', 'float16')
_REMEDY = 'download the file again'


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LanguageModel:
  """A model that is ready to run.

  Attributes:
    name: Where it came from, for people.
    config: What `transformer.DecoderLM` is built from.
    params: Its parameters.
    tokenizer: Its tokenizer.
  """

  name: str
  config: model_config.DecoderConfig
  params: types.Params
  tokenizer: tokenizers_io.Tokenizer


def load(
  source: str | os.PathLike[str],
  *,
  dtype: Any = jnp.float32,
  packed: bool = False,
) -> LanguageModel:
  """Loads a model.

  Args:
    source: The name of an asset (`smollm2-135m`), a folder in the layout of
      Hugging Face, a `.gguf` file, or a Hub id (`owner/name`). A path that
      exists is taken as a path.
    dtype: Of the parameters: float32, bfloat16 or float16.
    packed: Keeps matrices that a GGUF file stores in blocks (Q8_0, Q4_0, Q4_1)
      as `QTensor`s of the same values. Matrices that are one parameter but
      lie in blocks of several kinds are dequantized, as are other kinds.

  Raises:
    ValueError: `source` or `dtype` is none of these, or a folder, which has no
      blocks, was to stay `packed`.
    FileFormatError: A file is damaged or of a kind that is not supported.
    FetchError: The model could not be downloaded.
  """
  check_dtype(dtype)
  path = pathlib.Path(source).expanduser()
  name = os.fspath(source)
  if path.is_dir():
    return _load_directory(path, path.resolve().name, dtype, packed)
  if path.is_file():
    return _load_file(path, path.stem, dtype, packed)
  if name in assets.ASSETS:
    return _load_file(assets.fetch(name), name, dtype, packed)
  if is_hub_id(name):
    return _load_directory(snapshot(name), name, dtype, packed)
  models = ', '.join(
    asset.name for asset in assets.ASSETS.values() if _is_model(asset)
  )
  raise ValueError(
    f'{name!r} is neither a file or folder, nor a model asset ({models}), nor'
    ' a Hub id like owner/name.'
  )


def check_dtype(dtype: Any) -> None:
  """Raises ValueError for a dtype that parameters are not loaded in."""
  if jnp.dtype(dtype).name not in _DTYPES:
    raise ValueError(f'dtype must be one of {", ".join(_DTYPES)}, got {dtype}.')


def is_hub_id(name: str) -> bool:
  """Whether `name` has the form of a Hub id, `owner/name`."""
  return _HUB_ID.fullmatch(name) is not None


def read_config(
  directory: pathlib.Path,
) -> tuple[dict[str, Any], pathlib.Path]:
  """The content of the `config.json` of a checkpoint, and where it lies.

  Raises:
    FileFormatError: There is none, or it is damaged.
  """
  path = directory / 'config.json'
  if not path.is_file():
    problem = 'has no config.json'
    remedy = 'pass the folder of a Hugging Face checkpoint'
    raise errors.FileFormatError(directory, problem, remedy)
  return json_file.read_object(path), path


def read_weights(
  directory: pathlib.Path,
  slots: Iterator[tensor_names.Slot],
  *,
  ignored: Callable[[str], bool],
  dtype: Any,
) -> dict[str, Any]:
  """The parameters `slots` of the safetensors files of a checkpoint.

  Raises:
    FileFormatError: A file is damaged, or a tensor is missing, unexpected, of
      the wrong shape or not finite.
  """
  with contextlib.ExitStack() as stack:
    readers = _open_shards(directory, stack)
    return tensor_names.read_params(
      slots,
      readers,
      _converted(directory, lambda tensor: readers[tensor](tensor), dtype),
      directory,
      ignored=ignored,
    )


def _is_model(asset: assets.Asset) -> bool:
  return asset.member.endswith('.gguf')


def _load_file(
  path: pathlib.Path, name: str, dtype: Any, packed: bool
) -> LanguageModel:
  if path.suffix != '.gguf':
    remedy = 'pass a .gguf file or the folder of a checkpoint'
    problem = 'is not a model'
    if path.suffix in ('.bin', '.pt', '.pth', '.pkl'):
      problem = 'is a pickle file, which runs code when it is read'
      remedy = 'convert it to safetensors'
    elif path.suffix == '.safetensors':
      problem = 'holds weights without a configuration'
    raise errors.FileFormatError(path, problem, remedy)
  file = gguf_file.read(path)
  config = gguf_config.read(file)
  slots = list(tensor_names.gguf_slots(config, file.tensors))
  read = _converted(path, file.tensor, dtype)
  params = tensor_names.read_params(
    iter(slots),
    file.tensors,
    _packed(file, slots, read) if packed else read,
    path,
    ignored=tensor_names.gguf_ignored,
    dtype=dtype,
  )
  tokenizer = gguf_tokenizer.read(file)
  return _model(name, config, params, tokenizer)


def _load_directory(
  path: pathlib.Path, name: str, dtype: Any, packed: bool
) -> LanguageModel:
  if packed:
    raise ValueError(
      f'packed is for GGUF files, and {name} is a folder: load it as it is.'
    )
  config = hf_config.read(*read_config(path))
  # The small file first: a damaged one is found before the weights are read.
  tokenizer = tokenizers_io.from_directory(path)
  params = read_weights(
    path,
    tensor_names.hf_slots(config),
    ignored=tensor_names.hf_ignored(config),
    dtype=dtype,
  )
  return _model(name, config, params, tokenizer)


def _model(
  name: str,
  config: model_config.DecoderConfig,
  params: Mapping[str, Any],
  tokenizer: tokenizers_io.Tokenizer,
) -> LanguageModel:
  return LanguageModel(
    name=name, config=config, params=params, tokenizer=tokenizer
  )


def _converted(
  path: pathlib.Path, read: tensor_names.Reader, dtype: Any
) -> tensor_names.Reader:
  """Reads tensors in `dtype` and refuses values that are not numbers."""

  def read_converted(name: str) -> np.ndarray:
    values = read(name)
    with np.errstate(over='ignore', invalid='ignore'):
      values = values.astype(dtype, copy=False)
    if not np.isfinite(values).all():
      problem = f'tensor {name} holds values that are not finite'
      raise errors.FileFormatError(path, problem, _REMEDY)
    return values

  return read_converted


def _packed(
  file: gguf_file.GGUFFile,
  slots: Sequence[tensor_names.Slot],
  read: tensor_names.Reader,
) -> tensor_names.Reader:
  """Reads blocks as they are where a parameter lies in one kind of them."""
  kept = set()
  for slot in slots:
    infos = [file.tensors.get(part.name) for part in slot.parts]
    kinds = {info and info.kind for info in infos}
    if len(kinds) == 1 and kinds <= gguf_blocks.KINDS.keys():
      kept |= {info.name for info in infos if len(info.shape) == 2}

  def read_packed(name: str) -> np.ndarray:
    if name not in kept:
      return read(name)
    blocks = gguf_blocks.view(file.raw(name), file.tensors[name].kind)
    if not gguf_blocks.is_finite(blocks):
      problem = f'tensor {name} holds scales that are not finite'
      raise errors.FileFormatError(file.path, problem, _REMEDY)
    return blocks

  return read_packed


def _open_shards(
  directory: pathlib.Path, stack: contextlib.ExitStack
) -> dict[str, tensor_names.Reader]:
  """Opens the weights of a folder: a reader for every tensor name."""
  readers: dict[str, tensor_names.Reader] = {}
  for shard in _shard_paths(directory):
    with errors.as_format_error(shard, 'reading the header', _REMEDY):
      # The flax framework, because numpy alone has no bfloat16.
      file = stack.enter_context(safetensors.safe_open(shard, 'flax'))
      names = list(file.keys())
    for name in names:
      if name in readers:
        problem = f'tensor {name} is also in another file'
        raise errors.FileFormatError(shard, problem, _REMEDY)
      readers[name] = _shard_reader(shard, file)
  return _text_model(readers)


def _shard_paths(directory: pathlib.Path) -> list[pathlib.Path]:
  """The weight files of a folder, in the order of their names."""
  index = directory / 'model.safetensors.index.json'
  single = directory / 'model.safetensors'
  if single.is_file():
    return [single]
  if not index.is_file():
    problem, remedy = 'has no model.safetensors', 'pass a whole checkpoint'
    if any(directory.glob('*.bin')) or any(directory.glob('*.pt')):
      problem += ', only pickle files, which run code when they are read'
      remedy = 'convert it to safetensors'
    raise errors.FileFormatError(directory, problem, remedy)
  weight_map = json_file.read_object(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    problem = 'weight_map must be a non-empty object'
    raise errors.FileFormatError(index, problem, _REMEDY)
  shards = set()
  for shard in weight_map.values():
    # A name with a folder in it could point at any file of the machine.
    if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
      problem = f'weight_map names {shard!r}, which is not a plain file name'
      raise errors.FileFormatError(index, problem, 'do not use this checkpoint')
    shards.add(shard)
  for shard in sorted(shards):
    if not (directory / shard).is_file():
      problem = f'weight_map names {shard!r}, which does not exist'
      raise errors.FileFormatError(index, problem, 'download the missing file')
  return [directory / shard for shard in sorted(shards)]


def _shard_reader(shard: pathlib.Path, file: Any) -> tensor_names.Reader:

  def read(name: str) -> np.ndarray:
    with errors.as_format_error(shard, f'reading tensor {name}', _REMEDY):
      kind = file.get_slice(name).get_dtype()
      if kind not in _FLOATS:
        problem = f'tensor {name} is stored as {kind}'
        remedy = 'use a checkpoint in F32, F16 or BF16'
        raise errors.FileFormatError(shard, problem, remedy)
      return np.asarray(file.get_tensor(name))

  return read


def _text_model(
  readers: Mapping[str, tensor_names.Reader],
) -> dict[str, tensor_names.Reader]:
  """Keeps the language half of a multimodal checkpoint, by its plain names."""
  for prefix, plain in (
    ('language_model.', ''),
    ('model.language_model.', 'model.'),
  ):
    if any(name.startswith(prefix) for name in readers):
      return {
        plain + name.removeprefix(prefix): _renamed(read, name)
        for name, read in readers.items()
        if name.startswith(prefix)
      }
  return dict(readers)


def _renamed(
  read: Callable[[str], np.ndarray], name: str
) -> tensor_names.Reader:
  return lambda _: read(name)


def snapshot(name: str) -> pathlib.Path:
  """Downloads the safe files of a Hub repository into a folder.

  Raises:
    FetchError: They could not be downloaded.
  """
  advice = (
    f'Could not get {name!r} from the Hub (%s). Download the folder on a'
    ' machine with network and pass its path.'
  )
  try:
    import huggingface_hub
  except ImportError as error:
    raise errors.FetchError(
      advice % 'pip install huggingface_hub is needed'
    ) from error
  try:
    path = huggingface_hub.snapshot_download(
      name, allow_patterns=list(_HUB_FILES)
    )
  except Exception as error:  # Its network errors share no base class.
    reason = ' '.join(str(error).split())[:300]
    raise errors.FetchError(advice % reason) from error
  return pathlib.Path(path)
