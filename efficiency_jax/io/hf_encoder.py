"""Text encoders of Hugging Face: their `config.json` and tensor names.

Read are `BertModel` and `MPNetModel`, as sentence-transformers save them.
"""

from collections.abc import Iterator, Mapping
import os
from typing import Any

from efficiency_jax.io import errors
from efficiency_jax.io import fields
from efficiency_jax.io.tensor_names import Part
from efficiency_jax.io.tensor_names import Slot
from efficiency_jax.models.encoder_config import RELATIVE_BUCKETS
from efficiency_jax.models.encoder_config import EncoderConfig

FAMILIES = ('bert', 'mpnet')
# MPNet numbers positions from the one behind its padding token on.
_MPNET_FIRST = 2
# Names of a layer's parts: those of the projections, then of the two norms.
_LAYER = {
  'bert': (
    ('attention.self.query', 'attention.self.key', 'attention.self.value'),
    'attention.output.dense',
    'attention.output.LayerNorm',
  ),
  'mpnet': (
    ('attention.attn.q', 'attention.attn.k', 'attention.attn.v'),
    'attention.attn.o',
    'attention.LayerNorm',
  ),
}


def read(
  values: Mapping[str, Any], path: str | os.PathLike[str] = 'config.json'
) -> EncoderConfig:
  """Reads the parsed content of a `config.json`.

  Args:
    values: The JSON object.
    path: Named in errors.

  Raises:
    FileFormatError: A field is missing, of the wrong type or out of range, or
      asks for something that the encoder does not have.
  """
  source = fields.Fields(path, values)
  family = source.text('model_type')
  if family not in FAMILIES:
    raise errors.FileFormatError(
      path,
      f'model_type {family!r} is not an encoder that can be read',
      f'use a model of one of {", ".join(FAMILIES)}',
    )
  _refuse_unsupported(source)
  mpnet = family == 'mpnet'
  first = _MPNET_FIRST if mpnet else 0
  rows = source.size('max_position_embeddings', 512)
  try:
    return EncoderConfig(
      vocab_size=source.size('vocab_size'),
      width=source.size('hidden_size'),
      ffn_width=source.size('intermediate_size'),
      num_layers=source.size('num_hidden_layers', maximum=fields.MAX_LAYERS),
      num_heads=source.size('num_attention_heads'),
      max_positions=rows - first,
      first_position=first,
      token_types=0 if mpnet else source.size('type_vocab_size', 2),
      relative_bias=mpnet,
      norm_epsilon=source.positive('layer_norm_eps', 1e-12),
      family=family,
    )
  except errors.FileFormatError:
    raise
  except ValueError as error:
    raise errors.FileFormatError(path, str(error), 'check the file') from error


def slots(config: EncoderConfig) -> Iterator[Slot]:
  """The parameters of a checkpoint, in the order of the layers."""
  c = config
  rows = c.first_position + c.max_positions
  tables = [
    ('embedding', 'embeddings.word_embeddings', (c.vocab_size, c.width)),
    ('positions', 'embeddings.position_embeddings', (rows, c.width)),
  ]
  if c.token_types:
    name = 'embeddings.token_type_embeddings'
    tables.append(('token_types', name, (c.token_types, c.width)))
  if c.relative_bias:
    name = 'encoder.relative_attention_bias'
    tables.append(('relative_bias', name, (RELATIVE_BUCKETS, c.num_heads)))
  for path, name, shape in tables:
    yield Slot((path, 'table'), (Part(f'{name}.weight', shape),))
  yield from _norm(('embedding_norm',), 'embeddings.LayerNorm', c.width)
  for layer in range(c.num_layers):
    yield from _layer(c, f'layers_{layer}', f'encoder.layer.{layer}.')


def ignored(name: str) -> bool:
  """Whether a tensor is not used: the pooler, and buffers of old releases."""
  return name.startswith('pooler.') or name == 'embeddings.position_ids'


def _refuse_unsupported(source: fields.Fields) -> None:
  for name, supported in (
    ('hidden_act', 'gelu'),
    ('position_embedding_type', 'absolute'),
  ):
    value = source.text(name, supported)
    if value != supported:
      raise source.error(
        name,
        f'is {value!r}, only {supported!r} is supported',
        'use another model',
      )
  for name in ('is_decoder', 'add_cross_attention'):
    if source.flag(name):
      raise source.error(name, 'is not supported', 'use another model')
  buckets = source.size('relative_attention_num_buckets', RELATIVE_BUCKETS)
  if buckets != RELATIVE_BUCKETS:
    raise source.error(
      'relative_attention_num_buckets',
      f'is {buckets}, only {RELATIVE_BUCKETS} are supported',
      'use another model',
    )


def _layer(c: EncoderConfig, path: str, prefix: str) -> Iterator[Slot]:
  qkv, output, norm = _LAYER[c.family]
  up, down, ffn_norm = 'intermediate.dense', 'output.dense', 'output.LayerNorm'
  for place, names, rows, inputs in (
    (('attention', 'qkv'), qkv, c.width, c.width),
    (('attention', 'output'), (output,), c.width, c.width),
    (('ffn', 'up'), (up,), c.ffn_width, c.width),
    (('ffn', 'down'), (down,), c.width, c.ffn_width),
  ):
    yield from _dense(
      (path, *place), [prefix + name for name in names], rows, inputs
    )
  yield from _norm((path, 'attention_norm'), prefix + norm, c.width)
  yield from _norm((path, 'ffn_norm'), prefix + ffn_norm, c.width)


def _dense(
  path: tuple[str, ...], names: list[str], rows: int, inputs: int
) -> Iterator[Slot]:
  """A projection of several parts with `rows` outputs each."""
  weights = tuple(Part(f'{name}.weight', (rows, inputs)) for name in names)
  biases = tuple(Part(f'{name}.bias', (rows,)) for name in names)
  yield Slot((*path, 'kernel'), weights, transposed=True)
  yield Slot((*path, 'bias'), biases)


def _norm(path: tuple[str, ...], name: str, width: int) -> Iterator[Slot]:
  yield Slot((*path, 'scale'), (Part(f'{name}.weight', (width,)),))
  yield Slot((*path, 'bias'), (Part(f'{name}.bias', (width,)),))
