"""Writes two small tokenizers with what transformers says about `texts.TEXTS`.

Run with the peers installed (`make test-peers` does that):

  .venv-peers/bin/python -m tests.golden.make_tokenizers

Each folder under `tests/golden/tokenizers` holds the files of a checkpoint's
tokenizer and `expected.json`. `byte_level` is of the kind of SmolLM2,
`sentencepiece` of the kind of Llama 2.
"""

import json
import pathlib

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import pre_tokenizers
from tokenizers import processors
from tokenizers import trainers

from tests.golden import texts

DIRECTORY = pathlib.Path(__file__).parent / 'tokenizers'
_LICENCE = pathlib.Path(__file__).parent.parent.parent / 'LICENSE'
_SPACE = '\u2581'
_BYTES = [f'<0x{byte:02X}>' for byte in range(256)]
_CHATML = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] !="
  " 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}"
  "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
  " + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_INSTRUCT = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
  {%- set messages = messages[1:] %}
{%- endif %}
{% for message in messages -%}
  {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('roles must alternate') }}
  {% endif %}
  {% if message['role'] == 'user' %}
{{- '[INST] ' ~ (system | default('')) ~ message['content'] | trim }} [/INST]
  {%- set system = '' %}
  {% else %}
{{- ' ' + message['content'] | trim + ' ' + eos_token }}
  {%- endif %}
{% endfor %}"""


def _corpus() -> list[str]:
  return _LICENCE.read_text(encoding='utf-8').splitlines() + list(texts.TEXTS)


def byte_level() -> tuple[tokenizers.Tokenizer, dict]:
  """Byte-level BPE that cuts digits apart, and its settings."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=859,
    special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'],
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_corpus(), trainer)
  return tokenizer, {
    'bos_token': '<|im_start|>',
    'eos_token': '<|im_end|>',
    'pad_token': '<|im_end|>',
    'unk_token': '<|endoftext|>',
    'chat_template': _CHATML,
  }


def sentencepiece() -> tuple[tokenizers.Tokenizer, dict]:
  """SentencePiece BPE with bytes for unknown characters, and its settings.

  The score of a piece is minus its id, and the merges follow from the scores
  by the rule of transformers.
  """
  from transformers import convert_slow_tokenizer

  # Pieces in the order in which they were learned, then the alphabet.
  trained = tokenizers.Tokenizer(models.BPE())
  trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='always')
  trainer = trainers.BpeTrainer(
    vocab_size=560, limit_alphabet=120, show_progress=False
  )
  trained.train_from_iterator(_corpus(), trainer)
  learned = sorted(trained.get_vocab(), key=trained.get_vocab().get)
  learned.sort(key=lambda piece: len(piece) == 1)
  pieces = ['<unk>', '<s>', '</s>', *_BYTES, *learned, '<turn>']
  vocab = {piece: number for number, piece in enumerate(pieces)}
  scores = {piece: -float(vocab[piece]) for piece in learned}
  merges = convert_slow_tokenizer.generate_merges(
    {piece: vocab[piece] for piece in learned}, scores
  )
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True
    )
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend(_SPACE), normalizers.Replace(' ', _SPACE)]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  plain = {'normalized': False}
  tokenizer.add_special_tokens(
    [tokenizers.AddedToken(token, **plain) for token in pieces[:3]]
  )
  tokenizer.add_tokens([tokenizers.AddedToken('<turn>', **plain)])
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', pair='<s> $A <s>:1 $B:1', special_tokens=[('<s>', 1)]
  )
  return tokenizer, {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'chat_template': _INSTRUCT,
  }


def expectations(tokenizer) -> dict:
  """What a tokenizer of transformers says.

  `ids`, `decoded` (without special tokens) and `spelled` (with them) are in
  the order of `TEXTS`. `literal` has the ids of those texts that have others
  when special tokens count as text.
  """
  ids = [tokenizer.encode(t, add_special_tokens=False) for t in texts.TEXTS]
  literal = {}
  for place, text in enumerate(texts.TEXTS):
    other = tokenizer.encode(
      text, add_special_tokens=False, split_special_tokens=True
    )
    if other != ids[place]:
      literal[place] = other
  return {
    'ids': ids,
    'decoded': [tokenizer.decode(i, skip_special_tokens=True) for i in ids],
    'spelled': [tokenizer.decode(i, skip_special_tokens=False) for i in ids],
    'literal': literal,
    'document': tokenizer.encode('Hello'),
    'chats': [
      [
        tokenizer.apply_chat_template(
          messages, tokenize=False, add_generation_prompt=prompt
        )
        for prompt in (False, True)
      ]
      for messages in texts.CONVERSATIONS
    ],
  }


def main() -> None:
  import transformers

  for make in (byte_level, sentencepiece):
    directory = DIRECTORY / make.__name__
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer, settings = make()
    (directory / 'tokenizer.json').write_text(tokenizer.to_str())
    settings = {
      'tokenizer_class': 'PreTrainedTokenizerFast',
      'clean_up_tokenization_spaces': False,
      **settings,
    }
    _write(directory / 'tokenizer_config.json', settings)
    peer = transformers.AutoTokenizer.from_pretrained(directory)
    _write(directory / 'expected.json', expectations(peer))


def _write(path: pathlib.Path, values: dict) -> None:
  # ASCII, because the texts turn writing around and hide characters.
  path.write_text(json.dumps(values) + '\n', encoding='ascii')


if __name__ == '__main__':
  main()
