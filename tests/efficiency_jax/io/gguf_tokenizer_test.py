"""Tests that a tokenizer survives the way through GGUF metadata.

The tokenizers and what transformers says about them are those of tests/golden;
llama.cpp reads the same files (marked `peers`).
"""

import dataclasses
import json

import gguf
import numpy as np
import pytest
import tokenizers

from efficiency_jax.io import assets
from efficiency_jax.io import errors
from efficiency_jax.io import gguf_file
from efficiency_jax.io import gguf_tokenizer
from efficiency_jax.io import tokenizer as tokenizers_io
from tests.golden import make_tokenizers
from tests.golden import texts

_KINDS = ('byte_level', 'sentencepiece')


def _type(token, added):
  if token == '<unk>':
    return gguf.TokenType.UNKNOWN
  if token in added:
    special = added[token]
    return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
  if token.startswith('<0x'):
    return gguf.TokenType.BYTE
  return gguf.TokenType.NORMAL


def _write(path, kind):
  """Writes a golden tokenizer as the converters of llama.cpp do."""
  directory = make_tokenizers.DIRECTORY / kind
  source = json.loads((directory / 'tokenizer.json').read_text())
  settings = json.loads((directory / 'tokenizer_config.json').read_text())
  vocab = source['model']['vocab']
  tokens = sorted(vocab, key=vocab.get)
  added = {
    token['content']: token['special'] for token in source['added_tokens']
  }
  writer = gguf.GGUFWriter(path, 'llama')
  # The sizes of a model, without which llama.cpp does not look further.
  writer.add_context_length(64)
  writer.add_embedding_length(32)
  writer.add_block_count(1)
  writer.add_feed_forward_length(32)
  writer.add_head_count(4)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(len(tokens))
  types = [_type(token, added) for token in tokens]
  if kind == 'byte_level':
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('smollm')
    writer.add_token_merges([' '.join(m) for m in source['model']['merges']])
    writer.add_add_bos_token(False)
  else:
    writer.add_tokenizer_model('llama')
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_unk_token_id(0)
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_bos_token_id(vocab[settings['bos_token']])
  writer.add_eos_token_id(vocab[settings['eos_token']])
  writer.add_chat_template(settings['chat_template'])
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.short
@pytest.mark.parametrize('kind', _KINDS)
def test_a_gguf_tokenizer_is_the_one_it_was_made_from(tmp_path, kind):
  found = gguf_tokenizer.read(gguf_file.read(_write(tmp_path / 'a.gguf', kind)))
  directory = make_tokenizers.DIRECTORY / kind
  original = tokenizers_io.from_directory(directory)
  assert found.bos_id == original.bos_id
  assert found.eos_id == original.eos_id
  assert found.chat_template == original.chat_template
  assert found.starts_with_bos == original.starts_with_bos
  assert found.fingerprint == original.fingerprint
  expected = json.loads((directory / 'expected.json').read_text())
  for place, text in enumerate(texts.TEXTS):
    ids = expected['ids'][place]
    assert found.encode(text) == ids, text
    assert found.decode(ids) == expected['decoded'][place]
    spelled = found.decode(ids, skip_special=False)
    assert spelled == expected['spelled'][place]
    literal = expected['literal'].get(str(place), ids)
    assert found.encode(text, special=False) == literal, text


@pytest.mark.short
@pytest.mark.parametrize('kind', _KINDS)
def test_writing_gives_the_metadata_back(tmp_path, kind):
  file = gguf_file.read(_write(tmp_path / 'a.gguf', kind))
  expected = [name for name in file.metadata if name.startswith('tokenizer.')]
  # Tokenizers of folders and of GGUF files are described alike.
  directory = make_tokenizers.DIRECTORY / kind
  for tokenizer in (
    gguf_tokenizer.read(file),
    tokenizers_io.from_directory(directory),
  ):
    written = gguf_tokenizer.write(tokenizer, tokenizer.vocab_size)
    again = gguf_tokenizer.read(dataclasses.replace(file, metadata=written))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.starts_with_bos == tokenizer.starts_with_bos
    assert written.keys() >= set(expected)
    for name in expected:
      # Only the order of scores matters.
      if name != 'tokenizer.ggml.scores':
        np.testing.assert_array_equal(written[name], file.metadata[name])


@pytest.mark.parametrize('kind', _KINDS)
def test_rows_without_a_token_get_an_unused_one(tmp_path, kind):
  file = gguf_file.read(_write(tmp_path / 'a.gguf', kind))
  tokenizer = gguf_tokenizer.read(file)
  size = tokenizer.vocab_size
  written = gguf_tokenizer.write(tokenizer, size + 2)
  tokens = written['tokenizer.ggml.tokens']
  assert tokens[size:] == [f'[PAD{size}]', f'[PAD{size + 1}]']
  types = written['tokenizer.ggml.token_type']
  assert types[size:].tolist() == [5, 5]
  again = gguf_tokenizer.read(dataclasses.replace(file, metadata=written))
  for text in texts.TEXTS:
    assert again.encode(text) == tokenizer.encode(text)
  with pytest.raises(ValueError, match='give the model its own'):
    gguf_tokenizer.write(tokenizer, size - 1)


def test_tokens_that_stop_are_kept(tmp_path):
  file = gguf_file.read(_write(tmp_path / 'a.gguf', 'byte_level'))
  tokenizer = gguf_tokenizer.read(file)
  for stops in ((2, 5), (2, 5, 7), (5,)):
    changed = dataclasses.replace(tokenizer, stop_ids=stops, eos_id=2)
    written = gguf_tokenizer.write(changed, changed.vocab_size)
    again = gguf_tokenizer.read(dataclasses.replace(file, metadata=written))
    assert again.stop_ids == tuple(sorted({2, *stops}))
  changed = dataclasses.replace(tokenizer, stop_ids=(2, 5, 6, 7), eos_id=2)
  with pytest.raises(ValueError, match='three tokens that stop'):
    gguf_tokenizer.write(changed, changed.vocab_size)


@pytest.mark.parametrize('pre', sorted(gguf_tokenizer._CUTS))
def test_the_way_of_cutting_keeps_its_meaning(tmp_path, pre):
  file = gguf_file.read(_write(tmp_path / 'a.gguf', 'byte_level'))
  name = 'tokenizer.ggml.pre'
  file = dataclasses.replace(file, metadata={**file.metadata, name: pre})
  tokenizer = gguf_tokenizer.read(file)
  written = gguf_tokenizer.write(tokenizer, tokenizer.vocab_size)
  found = gguf_tokenizer._CUTS[written[name]]
  assert found == gguf_tokenizer._CUTS[pre]


def _changed(kind, change):
  """A golden tokenizer with another description."""
  directory = make_tokenizers.DIRECTORY / kind
  source = json.loads((directory / 'tokenizer.json').read_text())
  change(source)
  return tokenizers_io.Tokenizer(
    backend=tokenizers.Tokenizer.from_str(json.dumps(source))
  )


@pytest.mark.parametrize(
  ('kind', 'change', 'problem'),
  [
    (
      'byte_level',
      lambda s: s['pre_tokenizer']['pretokenizers'].pop(),
      'cuts words in a way',
    ),
    (
      'byte_level',
      lambda s: s.update(normalizer={'type': 'Lowercase'}),
      'cuts words in a way',
    ),
    (
      'byte_level',
      lambda s: s['model'].update(ignore_merges=True),
      'cuts words in a way',
    ),
    (
      'byte_level',
      lambda s: s['model'].update(merges=[]),
      'without merges',
    ),
    (
      'sentencepiece',
      lambda s: s.update(normalizer=None),
      'not the SentencePiece BPE',
    ),
    # This order of merges has no scores.
    (
      'sentencepiece',
      lambda s: s['model']['merges'].insert(0, s['model']['merges'].pop(16)),
      'not the SentencePiece BPE',
    ),
    (
      'byte_level',
      lambda s: s.update(
        model={'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'},
        added_tokens=[],
      ),
      'needs a BPE tokenizer, got WordLevel',
    ),
  ],
)
def test_tokenizers_without_words_in_gguf_are_refused(kind, change, problem):
  tokenizer = _changed(kind, change)
  with pytest.raises(ValueError, match=problem):
    gguf_tokenizer.write(tokenizer, tokenizer.vocab_size)


@pytest.mark.peers
@pytest.mark.parametrize('kind', _KINDS)
def test_llama_cpp_gives_the_same_tokens(tmp_path, kind):
  llama_cpp = pytest.importorskip('llama_cpp')
  path = _write(tmp_path / 'a.gguf', kind)
  peer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
  ours = gguf_tokenizer.read(gguf_file.read(path))
  for text in texts.TEXTS:
    ids = peer.tokenize(text.encode(), add_bos=False, special=True)
    assert ours.encode(text) == ids, text


@pytest.mark.model
@pytest.mark.peers
def test_llama_cpp_gives_the_tokens_of_the_released_model():
  llama_cpp = pytest.importorskip('llama_cpp')
  try:
    path = assets.fetch('smollm2-135m')
  except errors.FetchError as error:
    pytest.skip(f'the released model cannot be had: {error}')
  peer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
  ours = gguf_tokenizer.read(gguf_file.read(path))
  for text in texts.TEXTS:
    ids = peer.tokenize(text.encode(), add_bos=False, special=True)
    assert ours.encode(text) == ids, text
