"""Tests of tokenizers read from GGUF metadata and from tokenizer.json."""

import json

import gguf
import hypothesis
from hypothesis import strategies
import numpy as np
import pytest

from efficiency_jax.io import errors
from efficiency_jax.io import gguf_file
from efficiency_jax.io import gguf_tokenizer
from efficiency_jax.io import tokenizer as tokenizers_io
from tests.efficiency_jax.io import tiny_models
from tests.golden import make_tokenizers
from tests.golden import texts

_TINY = tiny_models.tokenizer()
_PIECES = ('<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256)))
_WORDS = ('▁', 'h', 'e', 'l', 'o', 'ell', 'he', 'll', 'hell', '▁hell', '▁hello')


def _sentencepiece(path, scores=None, **settings):
  """A vocabulary in the manner of Llama 2; later words have lower scores."""
  pieces = (*_PIECES, *_WORDS, '<turn>')
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_tokenizer_model('llama')
  writer.add_token_list(list(pieces))
  if scores is None:
    scores = [0.0] * len(_PIECES) + [-float(i) for i in range(len(_WORDS) + 1)]
  writer.add_token_scores(scores)
  writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(_WORDS) + [4])
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_unk_token_id(0)
  for name, value in settings.items():
    getattr(writer, f'add_{name}')(value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return gguf_tokenizer.read(gguf_file.read(path))


def _byte_level(path, pre='smollm', change=None):
  writer = gguf.GGUFWriter(path, 'llama')
  tiny_models.add_vocabulary(writer, pre)
  if change is not None:
    change(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.close()
  return gguf_tokenizer.read(gguf_file.read(path))


def _texts(tokenizer, text, **options):
  ids = tokenizer.encode(text, **options)
  return [tokenizer.backend.id_to_token(token) for token in ids]


@hypothesis.given(strategies.text())
def test_byte_level_decoding_undoes_encoding(text):
  ids = _TINY.encode(text, special=False)
  assert _TINY.decode(ids, skip_special=False) == text


def test_gguf_and_json_give_the_same_tokenizer(tmp_path):
  found = _byte_level(tmp_path / 'a.gguf')
  assert found.fingerprint == _TINY.fingerprint
  assert found.vocab_size == _TINY.vocab_size == len(tiny_models.VOCAB)
  assert found.stop_ids == _TINY.stop_ids == (0, 2)
  text = 'hello world 2024, naïve <|im_end|>\n\n  x'
  assert found.encode(text) == _TINY.encode(text)


def test_special_tokens_in_text():
  assert _texts(_TINY, 'he<|im_end|>') == ['he', '<|im_end|>']
  literal = _TINY.encode('he<|im_end|>', special=False)
  assert 2 not in literal
  assert _TINY.decode(literal) == 'he<|im_end|>'
  assert _TINY.decode([2, 0]) == ''
  assert _TINY.decode([2, 0], skip_special=False) == '<|im_end|><|endoftext|>'


def test_fingerprint_depends_on_merges_and_ids(tmp_path):
  def without_a_merge(writer):
    writer.kv_data[0]['tokenizer.ggml.merges'].value.pop()

  other = _byte_level(tmp_path / 'a.gguf', change=without_a_merge)
  assert other.fingerprint != _TINY.fingerprint


def test_decode_refuses_negative_ids():
  with pytest.raises(ValueError, match='>= 0'):
    _TINY.decode([3, -1])


@pytest.mark.parametrize(
  ('pre', 'pieces'),
  [
    ('gpt-2', ['12345', " x'", 'LL']),
    ('smollm', ['1', '2', '3', '4', '5', " x'", 'LL']),
    ('llama-bpe', ['123', '45', ' x', "'LL"]),
    ('qwen2', ['1', '2', '3', '4', '5', ' x', "'LL"]),
  ],
)
def test_how_words_are_cut(tmp_path, pre, pieces):
  tokenizer = _byte_level(tmp_path / 'a.gguf', pre)
  text = "12345 x'LL"
  cuts = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
  found = [text[start:end] for _, (start, end) in cuts]
  if pre in ('gpt-2', 'smollm'):
    # The rule of GPT-2 knows contractions in lower case only.
    pieces = [*pieces[:-2], ' x', "'", 'LL']
  assert found == pieces


def test_unknown_kinds_name_the_known(tmp_path):
  with pytest.raises(errors.FileFormatError, match='smollm, llama-bpe'):
    _byte_level(tmp_path / 'a.gguf', 'mamba')

  def other_model(writer):
    writer.kv_data[0]['tokenizer.ggml.model'].value = 'bert'

  with pytest.raises(errors.FileFormatError, match='gpt2 or llama'):
    _byte_level(tmp_path / 'b.gguf', change=other_model)


def _best_pairs_first(text, scores):
  """SentencePiece's rule: join the pair of the best union, leftmost first."""
  pieces = list(text)
  while True:
    unions = [a + b for a, b in zip(pieces, pieces[1:])]
    known = [(-scores[u], i) for i, u in enumerate(unions) if u in scores]
    if not known:
      return pieces
    _, place = min(known)
    pieces[place : place + 2] = [unions[place]]


@pytest.mark.parametrize('seed', range(5))
def test_sentencepiece_merges_by_score(tmp_path, seed):
  rng = np.random.default_rng(seed)
  values = rng.permutation(len(_WORDS)).astype(np.float32)
  scores = [0.0] * len(_PIECES) + values.tolist() + [0.0]
  tokenizer = _sentencepiece(tmp_path / 'a.gguf', scores)
  by_word = dict(zip(_WORDS, values.tolist()))
  for _ in range(50):
    text = ''.join(rng.choice(list('helo '), 12))
    expected = _best_pairs_first('▁' + text.replace(' ', '▁'), by_word)
    assert _texts(tokenizer, text) == expected


def test_sentencepiece_spaces_and_bytes(tmp_path):
  tokenizer = _sentencepiece(tmp_path / 'a.gguf')
  assert tokenizer.starts_with_bos
  assert tokenizer.encode('h', add_bos=True)[0] == 1
  assert tokenizer.encode('h')[0] != 1
  for text in ('hello', 'he  llo', ' h', 'naïve 東京\n'):
    assert tokenizer.decode(tokenizer.encode(text)) == text
  assert _texts(tokenizer, 'ï')[-2:] == ['<0xC3>', '<0xAF>']
  plain = _sentencepiece(
    tmp_path / 'b.gguf', add_space_prefix=False, add_bos_token=False
  )
  assert not plain.starts_with_bos
  assert _texts(plain, 'h') == ['h']
  assert plain.decode(plain.encode(' h')) == ' h'
  assert _texts(plain, 'h<turn>h') == ['h', '<turn>', 'h']


@pytest.mark.parametrize(
  'change',
  [
    {'tokens': ['a']},
    {'tokens': ['a'] * len(tiny_models.VOCAB)},
    {'tokens': 'text'},
    {'token_type': [1]},
    {'merges': ['one', 'two three']},
    {'merges': ['no such']},
    {'merges': 7},
    {'eos_token_id': 10**6},
    {'eos_token_id': 'x'},
  ],
)
def test_malformed_metadata(tmp_path, change):
  path = tmp_path / 'a.gguf'
  tiny_models.write_gguf(path, tiny_models.model('llama'))
  file = gguf_file.read(path)
  metadata = dict(file.metadata)
  metadata |= {f'tokenizer.ggml.{k}': v for k, v in change.items()}
  broken = gguf_file.GGUFFile(path, 3, metadata, file.tensors)
  with pytest.raises(errors.FileFormatError):
    gguf_tokenizer.read(broken)


def _directory(path, settings, **files):
  (path / 'tokenizer.json').write_text(_TINY.backend.to_str())
  (path / 'tokenizer_config.json').write_text(json.dumps(settings))
  for name, content in files.items():
    (path / name.replace('__', '.')).write_text(content)
  return tokenizers_io.from_directory(path)


def test_settings_of_a_directory(tmp_path):
  tokenizer = _directory(
    tmp_path,
    {
      'bos_token': {'content': '<|im_start|>'},
      'eos_token': '<|endoftext|>',
      'chat_template': [
        {'name': 'tools', 'template': 'no'},
        {'name': 'default', 'template': tiny_models.TEMPLATE},
      ],
    },
    generation_config__json='{"eos_token_id": [0, 5]}',
    config__json='{"eos_token_id": 4}',
  )
  assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 0)
  # 2 because the chat template ends turns with <|im_end|>.
  assert tokenizer.stop_ids == (0, 2, 4, 5)
  messages = [{'role': 'user', 'content': 'hello'}]
  expected = '<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n'
  assert tokenizer.apply_chat_template(messages) == expected
  shorter = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
  assert expected.startswith(shorter)
  assert 'assistant' not in shorter


def test_a_template_file_wins(tmp_path):
  tokenizer = _directory(
    tmp_path, {'chat_template': 'old'}, chat_template__jinja='new'
  )
  assert tokenizer.apply_chat_template([]) == 'new'


def test_no_template_is_said(tmp_path):
  tokenizer = _directory(tmp_path, {})
  with pytest.raises(ValueError, match='no chat template'):
    tokenizer.apply_chat_template([])


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('tokenizer__json', '{}'),
    ('tokenizer__json', '[' * 100_000),
    ('tokenizer__json', '\x00'),
    ('tokenizer_config__json', '{"eos_token": 3}'),
    ('tokenizer_config__json', '{"chat_template": 3}'),
    ('tokenizer_config__json', '[]'),
    ('tokenizer_config__json', '{"x": NaN}'),
    ('generation_config__json', '{"eos_token_id": "x"}'),
    ('generation_config__json', '{"eos_token_id": [1, -1]}'),
  ],
)
def test_malformed_files(tmp_path, name, content):
  with pytest.raises(errors.FileFormatError):
    _directory(tmp_path, {}, **{name: content})


def test_missing_tokenizer(tmp_path):
  with pytest.raises(errors.FileFormatError, match='does not exist'):
    tokenizers_io.from_directory(tmp_path)


@pytest.fixture(params=['byte_level', 'sentencepiece'])
def golden(request):
  """A tokenizer of a checkpoint, and what transformers says about it."""
  directory = make_tokenizers.DIRECTORY / request.param
  expected = json.loads((directory / 'expected.json').read_text())
  assert len(texts.TEXTS) == len(expected['ids']) == 200
  return tokenizers_io.from_directory(directory), expected


@pytest.mark.short
def test_ids_and_texts_are_those_of_transformers(golden):
  tokenizer, expected = golden
  for place, text in enumerate(texts.TEXTS):
    ids = expected['ids'][place]
    assert tokenizer.encode(text) == ids, text
    assert tokenizer.decode(ids) == expected['decoded'][place]
    spelled = tokenizer.decode(ids, skip_special=False)
    assert spelled == expected['spelled'][place]
    literal = expected['literal'].get(str(place), ids)
    assert tokenizer.encode(text, special=False) == literal, text
  assert tokenizer.encode('Hello', add_bos=True) == expected['document']


@pytest.mark.short
def test_chats_are_those_of_transformers(golden):
  tokenizer, expected = golden
  for messages, rendered in zip(texts.CONVERSATIONS, expected['chats']):
    found = [
      tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)
      for prompt in (False, True)
    ]
    assert found == rendered
