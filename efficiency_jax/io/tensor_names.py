"""Which checkpoint tensors make which parameters, for every family.

One table serves both directions: a `Slot` is one parameter, its `Part`s are the
checkpoint tensors that are stacked along their output axis to make it. Nothing
here reads or writes files.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficiency_jax.io import errors
from efficiency_jax.io import gguf_blocks
from efficiency_jax.leaves import QTensor
from efficiency_jax.models import config as model_config

_GEMMA = ('gemma2', 'gemma3_text')
Reader = Callable[[str], np.ndarray]
"""Reads one checkpoint tensor by its name."""


@dataclasses.dataclass(frozen=True)
class Part:
  """One tensor of a checkpoint.

  Attributes:
    name: As the checkpoint spells it.
    shape: As the checkpoint stores it, [out, in] for kernels.
    interleaved_heads: Not zero where llama.cpp reordered the rows of so many
      heads from "rotate half" to pairs of neighbours.
  """

  name: str
  shape: tuple[int, ...]
  interleaved_heads: int = 0


@dataclasses.dataclass(frozen=True)
class Slot:
  """One parameter and where it comes from.

  Attributes:
    path: Keys into the parameter tree.
    parts: Stacked along their first axis, in this order.
    transposed: The stack is [out, in] and the parameter is [in, out].
    offset: The file stores the parameter plus this number.
  """

  path: tuple[str, ...]
  parts: tuple[Part, ...]
  transposed: bool = False
  offset: float = 0.0


def hf_slots(config: model_config.DecoderConfig) -> Iterator[Slot]:
  """The parameters of a Hugging Face checkpoint, in the order of the layers."""
  c = config
  yield Slot(
    ('embedding', 'table'),
    (Part('model.embed_tokens.weight', (c.vocab_size, c.width)),),
  )
  for layer in range(c.num_layers):
    yield from _hf_layer(c, f'layers_{layer}', f'model.layers.{layer}.')
  yield _norm(('final_norm',), 'model.norm.weight', c.width)
  if not c.tie_embeddings:
    yield Slot(
      ('head', 'table'), (Part('lm_head.weight', (c.vocab_size, c.width)),)
    )


def gguf_slots(
  config: model_config.DecoderConfig, names: Collection[str]
) -> Iterator[Slot]:
  """The parameters of a GGUF file that holds tensors called `names`."""
  c = config
  offset = 1.0 if c.norm_plus_one else 0.0
  yield Slot(
    ('embedding', 'table'),
    (Part('token_embd.weight', (c.vocab_size, c.width)),),
  )
  for layer in range(c.num_layers):
    yield from _gguf_layer(c, f'layers_{layer}', f'blk.{layer}.', names)
  yield _norm(('final_norm',), 'output_norm.weight', c.width, offset)
  if not c.tie_embeddings:
    yield Slot(
      ('head', 'table'), (Part('output.weight', (c.vocab_size, c.width)),)
    )


def read_params(
  slots: Iterator[Slot],
  names: Collection[str],
  read: Reader,
  path: str | os.PathLike[str],
  *,
  ignored: Callable[[str], bool],
  dtype: Any = np.float32,
) -> dict[str, Any]:
  """Builds the parameter tree, of arrays on the default device.

  Args:
    slots: What the configuration asks for.
    names: The tensors that the checkpoint holds.
    read: Gives a tensor: its numbers, or its blocks (`gguf_blocks`), which
      become a `QTensor`.
    path: The checkpoint, named in errors.
    ignored: Tensors that may be present and are not used.
    dtype: What a `QTensor` dequantizes to.

  Raises:
    FileFormatError: A tensor is missing, unexpected or of the wrong shape.
  """
  params: dict[str, Any] = {}
  used: set[str] = set()
  for slot in slots:
    pieces = []
    for part in slot.parts:
      used.add(part.name)
      pieces.append(_read_part(part, names, read, path))
    value = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    if gguf_blocks.is_blocks(value):
      value = gguf_blocks.to_qtensor(
        value, dtype=dtype, transposed=not slot.transposed
      )
    elif slot.transposed:
      value = np.ascontiguousarray(value.T)
    if slot.offset:
      value = value - np.asarray(slot.offset, value.dtype)
    # Right away, and NumPy's array is free: there are never two copies of all.
    value = jax.block_until_ready(jax.tree.map(jnp.asarray, value))
    _insert(params, slot.path, value)
  unexpected = sorted(n for n in names if n not in used and not ignored(n))
  if unexpected:
    raise errors.FileFormatError(
      path,
      f'holds {len(unexpected)} tensors that the configuration has no place'
      f' for, the first is {unexpected[0]}',
      'check that the configuration belongs to these weights',
    )
  return params


def write_tensors(
  slots: Iterator[Slot], params: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
  """Takes the parameter tree apart into checkpoint tensors.

  A `QTensor` gives tensors of blocks (`gguf_blocks`).

  Raises:
    ValueError: A parameter is missing, has another shape than the configuration
      says, or is a `QTensor` that no blocks can hold.
  """
  for slot in slots:
    value = _rows(params, slot)
    if slot.offset:
      # Vectors are float32 in the only files that have an offset.
      value = value.astype(np.float32) + np.float32(slot.offset)
    rows = sum(part.shape[0] for part in slot.parts)
    expected = (rows, *slot.parts[0].shape[1:])
    shape = gguf_blocks.shape(value)
    if shape != expected:
      raise ValueError(
        f'Parameter {"/".join(slot.path)} gives {shape}, but the configuration'
        f' says {expected}.'
      )
    start = 0
    for part in slot.parts:
      piece = value[start : start + part.shape[0]]
      start += part.shape[0]
      if part.interleaved_heads:
        piece = interleave_heads(piece, part.interleaved_heads)
      yield part.name, np.ascontiguousarray(piece)


def interleave_heads(rows: np.ndarray, heads: int) -> np.ndarray:
  """Puts row `i` of each half of a head next to its partner: 0 h 1 h+1 ...

  This is the order that llama.cpp stores query and key projections of Llama
  in, so that a rotation acts on neighbours.
  """
  halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)


def split_heads(rows: np.ndarray, heads: int) -> np.ndarray:
  """Undoes `interleave_heads`: first halves first, as Hugging Face stores."""
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def hf_ignored(config: model_config.DecoderConfig) -> Callable[[str], bool]:
  """Which Hugging Face tensors carry nothing: old buffers and a tied head."""

  def ignored(name: str) -> bool:
    tied_head = config.tie_embeddings and name == 'lm_head.weight'
    return tied_head or name.endswith('.rotary_emb.inv_freq')

  return ignored


def gguf_ignored(name: str) -> bool:
  """Whether a GGUF tensor is accounted for by the configuration."""
  return name == 'rope_freqs.weight' or name.endswith('.attn_rot_embd')


def _hf_layer(
  c: model_config.DecoderConfig, path: str, prefix: str
) -> Iterator[Slot]:
  """One block of a Hugging Face checkpoint."""
  query, key, hidden = _widths(c)
  fused = c.family == 'phi3'
  qkv = ('q_proj', query), ('k_proj', key), ('v_proj', key)
  gate_up = ('gate_proj', hidden), ('up_proj', hidden)
  if fused:
    qkv = (('qkv_proj', query + 2 * key),)
    gate_up = (('gate_up_proj', 2 * hidden),)
  attention, ffn = f'{prefix}self_attn.', f'{prefix}mlp.'
  output = (('o_proj', c.width),)
  down = (('down_proj', c.width),)

  yield _norm(
    (path, 'attention_norm'), f'{prefix}input_layernorm.weight', c.width
  )
  yield from _dense(
    (path, 'attention', 'qkv'), attention, qkv, c.width, c.qkv_bias
  )
  yield from _dense(
    (path, 'attention', 'output'), attention, output, query, c.output_bias
  )
  if c.qk_norm:
    for name, short in (('query_norm', 'q_norm'), ('key_norm', 'k_norm')):
      yield _norm(
        (path, 'attention', name), f'{attention}{short}.weight', c.head_dim
      )
  ffn_norm = 'post_attention_layernorm'
  if c.post_norms:
    ffn_norm = 'pre_feedforward_layernorm'
    for name, long in (
      ('attention_post_norm', 'post_attention_layernorm'),
      ('ffn_post_norm', 'post_feedforward_layernorm'),
    ):
      yield _norm((path, name), f'{prefix}{long}.weight', c.width)
  yield _norm((path, 'ffn_norm'), f'{prefix}{ffn_norm}.weight', c.width)
  yield from _dense((path, 'ffn', 'gate_up'), ffn, gate_up, c.width, c.mlp_bias)
  yield from _dense((path, 'ffn', 'down'), ffn, down, hidden, c.mlp_bias)


def _gguf_layer(
  c: model_config.DecoderConfig,
  path: str,
  prefix: str,
  names: Collection[str],
) -> Iterator[Slot]:
  """One block of a GGUF file."""
  query, key, hidden = _widths(c)
  offset = 1.0 if c.norm_plus_one else 0.0
  permuted = c.family == 'llama'
  qkv = (
    ('attn_q', query, c.num_heads if permuted else 0),
    ('attn_k', key, c.num_kv_heads if permuted else 0),
    ('attn_v', key),
  )
  if f'{prefix}attn_qkv.weight' in names:
    qkv = (('attn_qkv', query + 2 * key),)
  gate_up = ('ffn_gate', hidden), ('ffn_up', hidden)
  if c.family == 'phi3' and f'{prefix}ffn_gate.weight' not in names:
    gate_up = (('ffn_up', 2 * hidden),)
  output = (('attn_output', c.width),)
  down = (('ffn_down', c.width),)

  norms = [
    (('attention_norm',), 'attn_norm', c.width),
    (('ffn_norm',), 'ffn_norm', c.width),
  ]
  if c.qk_norm:
    norms += [
      (('attention', 'query_norm'), 'attn_q_norm', c.head_dim),
      (('attention', 'key_norm'), 'attn_k_norm', c.head_dim),
    ]
  if c.post_norms:
    norms += [
      (('attention_post_norm',), 'post_attention_norm', c.width),
      (('ffn_post_norm',), 'post_ffw_norm', c.width),
    ]
  for place, name, width in norms:
    yield _norm((path, *place), f'{prefix}{name}.weight', width, offset)
  yield from _dense(
    (path, 'attention', 'qkv'), prefix, qkv, c.width, c.qkv_bias
  )
  yield from _dense(
    (path, 'attention', 'output'), prefix, output, query, c.output_bias
  )
  yield from _dense(
    (path, 'ffn', 'gate_up'), prefix, gate_up, c.width, c.mlp_bias
  )
  yield from _dense((path, 'ffn', 'down'), prefix, down, hidden, c.mlp_bias)


def _widths(c: model_config.DecoderConfig) -> tuple[int, int, int]:
  return c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.ffn_width


def _norm(
  path: tuple[str, ...], name: str, width: int, offset: float = 0.0
) -> Slot:
  return Slot((*path, 'scale'), (Part(name, (width,)),), offset=offset)


def _dense(
  path: tuple[str, ...],
  prefix: str,
  outputs: tuple[tuple[Any, ...], ...],
  inputs: int,
  bias: bool,
) -> Iterator[Slot]:
  """A projection made of (name, rows[, interleaved heads]) pieces."""
  yield Slot(
    (*path, 'kernel'),
    tuple(
      Part(f'{prefix}{name}.weight', (rows, inputs), *heads)
      for name, rows, *heads in outputs
    ),
    transposed=True,
  )
  if bias:
    yield Slot(
      (*path, 'bias'),
      tuple(
        Part(f'{prefix}{name}.bias', (rows,), *heads)
        for name, rows, *heads in outputs
      ),
    )


def _read_part(
  part: Part,
  names: Collection[str],
  read: Reader,
  path: str | os.PathLike[str],
) -> np.ndarray:
  remedy = 'check that the configuration belongs to these weights'
  if part.name not in names:
    problem = f'has no tensor {part.name} (expected shape {part.shape})'
    raise errors.FileFormatError(path, problem, remedy)
  value = read(part.name)
  shape = gguf_blocks.shape(value)
  if shape != part.shape:
    problem = (
      f'tensor {part.name} has shape {tuple(shape)}, expected {part.shape}'
    )
    raise errors.FileFormatError(path, problem, remedy)
  if part.interleaved_heads:
    value = split_heads(value, part.interleaved_heads)
  return value


def _insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def _rows(params: Mapping[str, Any], slot: Slot) -> np.ndarray:
  """A parameter as the stack of its checkpoint tensors: rows are outputs."""
  value = _find(params, slot.path)
  if not isinstance(value, QTensor):
    value = np.asarray(value)
    return value.T if slot.transposed else value
  try:
    return gguf_blocks.from_qtensor(value)
  except ValueError as error:
    name = '/'.join(slot.path)
    raise ValueError(f'Parameter {name}: {error}') from error


def _find(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  value: Any = tree
  for key in path:
    if not isinstance(value, Mapping) or key not in value:
      raise ValueError(f'The parameters have no {"/".join(path)}.')
    value = value[key]
  return value
