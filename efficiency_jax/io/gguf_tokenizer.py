"""Builds the tokenizer that the metadata of a GGUF file describes, and back.

Two kinds are common: byte-level BPE in the manner of GPT-2 ("gpt2"), where
merges are listed, and SentencePiece BPE in the manner of Llama 2 and Gemma
("llama"), where pieces have scores and the merges follow from them.
"""

from collections.abc import Mapping
import json
import re
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors

from efficiency_jax.io import errors
from efficiency_jax.io import fields
from efficiency_jax.io import gguf_file
from efficiency_jax.io import tokenizer as tokenizers_io

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = '\u2581'
_MAX_PIECE_CHARS = 256
_BYTE_PIECE = re.compile('<0x[0-9A-F]{2}>')
_REMEDY = 'download the file again'

# How words are cut before merging. Contractions, then words, numbers,
# punctuation and white space, each with at most one leading space or mark.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
  r'|[^\r\n\p{L}\p{N}]?\p{L}+'
  r'|\p{N}%s'
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*'
  r'|\s*[\r\n]+'
  r'|\s+(?!\S)'
  r'|\s+'
)
_GPT2, _SINGLE_DIGITS, _LLAMA3, _QWEN2 = 'gpt2', 'digits', 'llama3', 'qwen2'
_CUTS: Mapping[str, str] = {
  'default': _GPT2,
  'gpt-2': _GPT2,
  'smollm': _SINGLE_DIGITS,
  'llama-bpe': _LLAMA3,
  'llama3': _LLAMA3,
  'llama-v3': _LLAMA3,
  'qwen2': _QWEN2,
  'deepseek-r1-qwen': _QWEN2,
}
# What files call a cut that we write.
_NAMES: Mapping[str, str] = {
  'gpt-2': _GPT2,
  'smollm': _SINGLE_DIGITS,
  'llama-bpe': _LLAMA3,
  'qwen2': _QWEN2,
}


def read(file: gguf_file.GGUFFile) -> tokenizers_io.Tokenizer:
  """Builds the tokenizer of a GGUF file.

  Raises:
    FileFormatError: The kind is not supported or the metadata is malformed.
  """
  source = fields.Fields(file.path, file.metadata, 'tokenizer.ggml.')
  kind = source.text('model')
  tokens, types = _tokens(source)
  byte_level = kind == 'gpt2'
  with errors.as_format_error(file.path, 'building the tokenizer', _REMEDY):
    if byte_level:
      backend = _byte_level(source, tokens)
    elif kind == 'llama':
      backend = _sentencepiece(source, tokens, types)
    else:
      raise source.error(
        'model', f'{kind!r} is not supported', 'use a gpt2 or llama tokenizer'
      )
    _add_tokens(backend, tokens, types)
  ids = {
    name: source.index(f'{name}_token_id')
    for name in ('bos', 'eos', 'padding', 'eot', 'eom')
  }
  for name, number in ids.items():
    if number is not None and number >= len(tokens):
      raise source.error(f'{name}_token_id', f'{number} is not a token')
  cut = _CUTS.get(source.text('pre', 'default')) if byte_level else None
  starts = source.flag('add_bos_token', not byte_level or cut == _LLAMA3)
  if starts and ids['bos'] is not None:
    bos = tokens[ids['bos']]
    backend.post_processor = processors.TemplateProcessing(
      single=f'{bos} $A',
      pair=f'{bos} $A {bos}:1 $B:1',
      special_tokens=[(bos, ids['bos'])],
    )
  template = fields.Fields(file.path, file.metadata, 'tokenizer.')
  return tokenizers_io.build(
    file.path,
    backend,
    bos_id=ids['bos'],
    eos_id=ids['eos'],
    pad_id=ids['padding'],
    stop_ids=(ids['eos'], ids['eot'], ids['eom']),
    chat_template=template.text('chat_template', None),
  )


def write(
  tokenizer: tokenizers_io.Tokenizer, vocab_size: int
) -> dict[str, Any]:
  """Metadata from which `read` and llama.cpp make the same tokenizer.

  Args:
    tokenizer: BPE of one of the kinds that `read` knows.
    vocab_size: Rows of the model's table. Rows without a token get an unused
      one, since llama.cpp wants a token for each.

  Raises:
    ValueError: The metadata has no words for the tokenizer.
  """
  backend = _json(tokenizer.backend)
  model = backend['model']
  if model['type'] != 'BPE':
    raise ValueError(f'GGUF export needs a BPE tokenizer, got {model["type"]}.')
  merges = [
    tuple(merge.split(' ', 1) if isinstance(merge, str) else merge)
    for merge in model['merges']
  ]
  tokens, types = _token_list(tokenizer, backend, vocab_size)
  if model['byte_fallback']:
    values = _sentencepiece_values(backend, tokens, types, merges)
  else:
    values = _byte_level_values(backend, merges)
  values |= {
    'tokens': tokens,
    'token_type': types,
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'padding_token_id': tokenizer.pad_id,
    'add_bos_token': tokenizer.starts_with_bos,
  }
  more = [token for token in tokenizer.stop_ids if token != tokenizer.eos_id]
  if len(more) > 2:
    raise ValueError(
      f'GGUF has three tokens that stop, this tokenizer {len(more) + 1}: drop'
      ' some of stop_ids.'
    )
  values |= dict(zip(('eot_token_id', 'eom_token_id'), more, strict=False))
  metadata = {f'tokenizer.ggml.{name}': value for name, value in values.items()}
  metadata['tokenizer.chat_template'] = tokenizer.chat_template
  return {key: value for key, value in metadata.items() if value is not None}


def _tokens(source: fields.Fields) -> tuple[list[str], np.ndarray]:
  """The text and the type of every token."""
  tokens = source.get('tokens')
  if not isinstance(tokens, list) or not tokens:
    raise source.error('tokens', 'must be a list of strings')
  types = source.get('token_type')
  if types is None:
    types = np.full(len(tokens), _NORMAL)
  if not isinstance(types, np.ndarray) or types.shape != (len(tokens),):
    raise source.error('token_type', f'must hold {len(tokens)} numbers')
  if len(set(tokens)) != len(tokens):
    raise source.error('tokens', 'holds a token twice')
  return tokens, types


def _byte_level(
  source: fields.Fields, tokens: list[str]
) -> tokenizers.Tokenizer:
  name = source.text('pre', 'default')
  if name not in _CUTS:
    raise source.error(
      'pre', f'{name!r} is not supported', f'use one of {", ".join(_CUTS)}'
    )
  cut = _CUTS[name]
  merges = source.get('merges')
  if not isinstance(merges, list):
    raise source.error('merges', 'must be a list of strings')
  pairs = [tuple(merge.split(' ')) for merge in merges]
  wrong = next((pair for pair in pairs if len(pair) != 2), None)
  if wrong is not None:
    raise source.error('merges', f'holds {wrong!r}, expected two pieces')
  vocab = {token: number for number, token in enumerate(tokens)}
  return _cutting(cut, vocab, pairs)


def _cutting(
  cut: str, vocab: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
  """Byte-level BPE that cuts words in one of the known ways."""
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab=vocab,
      merges=merges,
      # Llama 3 takes a word that is a token whole, whatever merges say.
      ignore_merges=cut == _LLAMA3,
    )
  )
  if cut == _QWEN2:
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = pre_tokenizers.Sequence(_cutters(cut))
  backend.decoder = decoders.ByteLevel()
  return backend


def _cutters(cut: str) -> list[pre_tokenizers.PreTokenizer]:
  if cut in (_LLAMA3, _QWEN2):
    pattern = tokenizers.Regex(_WORDS % ('{1,3}' if cut == _LLAMA3 else ''))
    return [
      pre_tokenizers.Split(pattern, 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  if cut == _SINGLE_DIGITS:
    return [pre_tokenizers.Digits(individual_digits=True), byte_level]
  return [byte_level]


def _sentencepiece(
  source: fields.Fields, tokens: list[str], types: np.ndarray
) -> tokenizers.Tokenizer:
  scores = source.get('scores')
  if not isinstance(scores, np.ndarray) or scores.shape != (len(tokens),):
    raise source.error('scores', f'must hold {len(tokens)} numbers')
  if not np.isfinite(scores).all():
    raise source.error('scores', 'holds a number that is not finite')
  unknown = source.index('unknown_token_id', None)
  if unknown is None:
    known = np.flatnonzero(types == _UNKNOWN)
    unknown = int(known[0]) if known.size else None
  if unknown is not None and unknown >= len(tokens):
    raise source.error('unknown_token_id', f'{unknown} is not a token')
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab={token: number for number, token in enumerate(tokens)},
      merges=_merges_from_scores(tokens, types, scores),
      unk_token=None if unknown is None else tokens[unknown],
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  _mark_spaces(backend, source.flag('add_space_prefix', True))
  return backend


def _mark_spaces(backend: tokenizers.Tokenizer, prefix: bool) -> None:
  """Spaces are a mark before merging; with `prefix` a text begins with one."""
  steps: list[Any] = [normalizers.Replace(' ', _SPACE)]
  undo: list[Any] = [
    decoders.Replace(_SPACE, ' '),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if prefix:
    steps.insert(0, normalizers.Prepend(_SPACE))
    undo.append(decoders.Strip(' ', 1, 0))
  backend.normalizer = normalizers.Sequence(steps)
  backend.decoder = decoders.Sequence(undo)


def _merges_from_scores(
  tokens: list[str], types: np.ndarray, scores: np.ndarray
) -> list[tuple[str, str]]:
  """Lists the merges that SentencePiece would do, best piece first.

  SentencePiece joins the two neighbours whose union has the highest score, so
  every way to cut a piece in two known pieces is a merge with its score. Among
  equals the order is that of the converters of transformers, so that a model
  has the same merges whichever file it comes from.
  """
  mergeable = {
    token: number
    for number, token in enumerate(tokens)
    if types[number] in (_NORMAL, _USER_DEFINED)
  }
  merges = []
  for token, number in mergeable.items():
    # Real pieces have a few dozen characters; a hostile one would cost the
    # square of its length.
    if len(token) > _MAX_PIECE_CHARS:
      continue
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in mergeable and right in mergeable:
        key = (-scores[number], -len(left), -len(right), number)
        merges.append((key, (left, right)))
  return [pair for _, pair in sorted(merges)]


def _add_tokens(
  backend: tokenizers.Tokenizer, tokens: list[str], types: np.ndarray
) -> None:
  """Marks control and user-defined tokens, which are never cut."""
  for kind, add in (
    (_CONTROL, backend.add_special_tokens),
    (_UNKNOWN, backend.add_special_tokens),
    (_USER_DEFINED, backend.add_tokens),
  ):
    chosen = [tokens[number] for number in np.flatnonzero(types == kind)]
    add(
      [
        tokenizers.AddedToken(
          token, special=kind != _USER_DEFINED, normalized=False
        )
        for token in chosen
        if token
      ]
    )


def _token_list(
  tokenizer: tokenizers_io.Tokenizer,
  backend: Mapping[str, Any],
  vocab_size: int,
) -> tuple[list[str], np.ndarray]:
  """The text and the type of a token for every row of the table."""
  if tokenizer.vocab_size > vocab_size:
    raise ValueError(
      f'The tokenizer has {tokenizer.vocab_size} tokens and the model'
      f' {vocab_size}: give the model its own tokenizer.'
    )
  tokens = [f'[PAD{number}]' for number in range(vocab_size)]
  types = np.full(vocab_size, _UNUSED, np.int32)
  special = {t['content']: t['special'] for t in backend['added_tokens']}
  vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
  for token, number in vocab.items():
    tokens[number], types[number] = token, _NORMAL
    if token in special:
      types[number] = _CONTROL if special[token] else _USER_DEFINED
  return tokens, types


def _byte_level_values(
  backend: Mapping[str, Any], merges: list[tuple[str, str]]
) -> dict[str, Any]:
  if not merges:
    raise ValueError(
      'llama.cpp reads no tokenizer without merges: save the model as a folder.'
    )
  for name, cut in _NAMES.items():
    if _preparation(backend) == _preparation(_json(_cutting(cut, {}, []))):
      return {
        'model': 'gpt2',
        'pre': name,
        'merges': [' '.join(pair) for pair in merges],
      }
  raise ValueError(
    'The tokenizer cuts words in a way that has no name in GGUF files (named'
    f' are {", ".join(_NAMES)}): save the model as a folder.'
  )


def _sentencepiece_values(
  backend: Mapping[str, Any],
  tokens: list[str],
  types: np.ndarray,
  merges: list[tuple[str, str]],
) -> dict[str, Any]:
  """Finds the scores behind the merges; gives their types to special pieces.

  A merge has the score of the piece it makes, so the order in which pieces are
  first made is that of their scores.
  """
  unknown = backend['model']['unk_token']
  for number, token in enumerate(tokens):
    if token == unknown:
      types[number] = _UNKNOWN
    elif _BYTE_PIECE.fullmatch(token):
      types[number] = _BYTE
  ranks: dict[str, int] = {}
  for pair in merges:
    ranks.setdefault(''.join(pair), len(ranks))
  scores = -np.asarray([ranks.get(t, len(ranks)) for t in tokens], np.float32)
  found = _merges_from_scores(tokens, types, scores)
  for prefix in (True, False):
    known = tokenizers.Tokenizer(models.BPE())
    _mark_spaces(known, prefix)
    if found == merges and _preparation(backend) == _preparation(_json(known)):
      return {
        'model': 'llama',
        'scores': scores,
        'add_space_prefix': prefix,
        'unknown_token_id': None if unknown is None else tokens.index(unknown),
      }
  raise ValueError(
    'The tokenizer is not the SentencePiece BPE that GGUF files describe: save'
    ' the model as a folder.'
  )


def _preparation(backend: Mapping[str, Any]) -> tuple[Any, ...]:
  """What a tokenizer does to a text before it merges pieces."""
  steps = []
  for part, several in (
    ('normalizer', 'normalizers'),
    ('pre_tokenizer', 'pretokenizers'),
  ):
    step = backend[part] or {several: []}
    for one in step.get(several, [step]):
      # Offsets are not tokens.
      steps.append({k: v for k, v in one.items() if k != 'trim_offsets'})
  return steps, backend['model']['ignore_merges']


def _json(backend: tokenizers.Tokenizer) -> dict[str, Any]:
  return json.loads(backend.to_str())
