"""Text to token ids and back, and conversations to prompts."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import tokenizers

from efficiency_jax.io import chat_template as chat_templates
from efficiency_jax.io import errors
from efficiency_jax.io import fields
from efficiency_jax.io import json_file

# Tokens that end a turn although many files only name the end of a document;
# they count when the model's own chat template writes them.
_END_OF_TURN = ('<|im_end|>', '<|eot_id|>', '<end_of_turn>', '<|end|>')
_REMEDY = 'download the tokenizer again'


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
  """A tokenizer with the model's settings for special tokens and chats.

  Attributes:
    backend: The `tokenizers` object that does the work.
    bos_id: The token that starts a document, if there is one.
    eos_id: The token that ends a document or a turn, if there is one.
    pad_id: The padding token, if there is one.
    stop_ids: Tokens after which generation is over, in increasing order.
    chat_template: Jinja source, or None for models that do not chat.
  """

  backend: tokenizers.Tokenizer
  bos_id: int | None = None
  eos_id: int | None = None
  pad_id: int | None = None
  stop_ids: tuple[int, ...] = ()
  chat_template: str | None = None

  def encode(
    self, text: str, *, special: bool = True, add_bos: bool = False
  ) -> list[int]:
    """Gives the token ids of `text`.

    Args:
      text: Any string.
      special: Whether text that spells a special token becomes that token.
        Pass False for text that a stranger wrote.
      add_bos: Puts `bos_id` in front, if the model was trained with one there
        (`starts_with_bos`). Chat templates write it themselves.
    """
    backend = self.backend if special else self._literal_backend
    ids = backend.encode(text, add_special_tokens=False).ids
    return [self.bos_id, *ids] if add_bos and self.starts_with_bos else ids

  def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Gives the text of token ids; `skip_special` leaves out special tokens."""
    ids = [int(token) for token in ids]
    # Ids beyond the vocabulary are padding rows of the model: no text.
    if ids and not 0 <= min(ids) <= max(ids) < 2**32:
      raise ValueError(f'Token ids must be >= 0, got {min(ids)}..{max(ids)}.')
    return self.backend.decode(ids, skip_special_tokens=skip_special)

  def apply_chat_template(
    self,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
  ) -> str:
    """Writes a conversation the way the model was trained to read it.

    Args:
      messages: Mappings with at least `role` and `content`.
      add_generation_prompt: Ends with the opening of the assistant's turn.

    Raises:
      ValueError: The model has no chat template, or it fails (see
        `chat_template.render`).
    """
    if self.chat_template is None:
      raise ValueError(
        'This model has no chat template: encode plain text instead.'
      )
    variables = {
      'messages': [dict(message) for message in messages],
      'add_generation_prompt': add_generation_prompt,
      'tools': None,
      'documents': None,
    }
    for name, token in (
      ('bos_token', self.bos_id),
      ('eos_token', self.eos_id),
      ('pad_token', self.pad_id),
    ):
      if token is not None:
        variables[name] = self.backend.id_to_token(token)
    return chat_templates.render(self.chat_template, variables)

  @functools.cached_property
  def starts_with_bos(self) -> bool:
    """Whether the model was trained on documents that start with `bos_id`."""
    ids = self.backend.encode('a', add_special_tokens=True).ids
    return self.bos_id is not None and ids[:1] == [self.bos_id]

  @functools.cached_property
  def vocab_size(self) -> int:
    """One more than the largest token id."""
    return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def fingerprint(self) -> str:
    """Equal for tokenizers with the same tokens, ids and merges.

    Speculative decoding needs a draft and a target that agree on this.
    """
    digest = hashlib.sha256()
    vocab = self.backend.get_vocab(with_added_tokens=True)
    for token, number in sorted(vocab.items()):
      digest.update(f'{number}\0{token}\0'.encode('utf-8', 'surrogatepass'))
    model = json.loads(self.backend.to_str())['model']
    for merge in model.get('merges', ()):
      pair = merge.split(' ', 1) if isinstance(merge, str) else merge
      digest.update('\0'.join((*pair, '')).encode('utf-8', 'surrogatepass'))
    return digest.hexdigest()

  @functools.cached_property
  def _literal_backend(self) -> tokenizers.Tokenizer:
    # A copy, because the switch is a property of the whole tokenizer.
    copy = tokenizers.Tokenizer.from_str(self.backend.to_str())
    copy.encode_special_tokens = True
    return copy


def from_directory(directory: pathlib.Path) -> Tokenizer:
  """Reads `tokenizer.json` and the settings that lie next to it.

  Raises:
    FileFormatError: A file is missing or malformed.
  """
  path = directory / 'tokenizer.json'
  if not path.is_file():
    raise errors.FileFormatError(
      path,
      'does not exist',
      'convert the tokenizer to the fast format with transformers',
    )
  text = json_file.read_text(path)
  with errors.as_format_error(path, 'reading the tokenizer', _REMEDY):
    backend = tokenizers.Tokenizer.from_str(text)
    # A file may ask for cut or padded output; here the caller decides.
    backend.no_truncation()
    backend.no_padding()
  settings = _optional(directory / 'tokenizer_config.json')
  template = _chat_template(directory, settings)
  tokens = {
    name: _token_id(backend, settings, name)
    for name in ('bos_token', 'eos_token', 'pad_token')
  }
  stops = [tokens['eos_token']]
  for name in ('generation_config.json', 'config.json'):
    stops += _ids(_optional(directory / name), 'eos_token_id')
  return build(
    path,
    backend,
    bos_id=tokens['bos_token'],
    eos_id=tokens['eos_token'],
    pad_id=tokens['pad_token'],
    stop_ids=stops,
    chat_template=template,
  )


def build(
  path: pathlib.Path,
  backend: tokenizers.Tokenizer,
  *,
  bos_id: int | None,
  eos_id: int | None,
  pad_id: int | None,
  stop_ids: Sequence[int | None],
  chat_template: str | None,
) -> Tokenizer:
  """Puts a tokenizer together and tries it once.

  Raises:
    FileFormatError: The backend cannot encode and decode a word.
  """
  stops = {token for token in stop_ids if token is not None}
  with errors.as_format_error(path, 'trying the tokenizer', _REMEDY):
    for token in _END_OF_TURN:
      number = backend.token_to_id(token)
      if number is not None and token in (chat_template or ''):
        stops.add(number)
    tokenizer = Tokenizer(
      backend=backend,
      bos_id=bos_id,
      eos_id=eos_id,
      pad_id=pad_id,
      stop_ids=tuple(sorted(stops)),
      chat_template=chat_template,
    )
    tokenizer.decode(tokenizer.encode('a word', add_bos=True))
    if tokenizer.vocab_size < 1:
      raise ValueError('the vocabulary is empty')
  return tokenizer


def _optional(path: pathlib.Path) -> fields.Fields:
  values = json_file.read_object(path) if path.is_file() else {}
  return fields.Fields(path, values)


def _token_id(
  backend: tokenizers.Tokenizer, settings: fields.Fields, name: str
) -> int | None:
  """The id of a special token that is named by its text."""
  value = settings.get(name)
  if isinstance(value, Mapping):
    value = value.get('content')
  if value is None:
    return None
  if not isinstance(value, str):
    raise settings.error(name, f'is {value!r}, expected a string')
  return backend.token_to_id(value)


def _ids(settings: fields.Fields, name: str) -> list[int]:
  """A token id, a list of them, or nothing."""
  value = settings.get(name)
  ids = value if isinstance(value, list) else [value]
  ids = [token for token in ids if token is not None]
  for token in ids:
    if type(token) is not int or not 0 <= token < fields.MAX_SIZE:
      raise settings.error(name, f'is {value!r}, expected token ids')
  return ids


def _chat_template(
  directory: pathlib.Path, settings: fields.Fields
) -> str | None:
  """The template in its own file, or in the tokenizer's settings."""
  path = directory / 'chat_template.jinja'
  if path.is_file():
    return json_file.read_text(path, max_bytes=2**20)
  value = settings.get('chat_template')
  if isinstance(value, list):
    named = {
      entry.get('name'): entry.get('template')
      for entry in value
      if isinstance(entry, Mapping) and isinstance(entry.get('name'), str)
    }
    value = named.get('default')
  if value is not None and not isinstance(value, str):
    raise settings.error('chat_template', 'must be a string or named strings')
  return value
