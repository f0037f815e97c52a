"""A chat with a model: turns in, answers out as they are written."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.decoding import sampling
from efficiency_jax.io import pretrained


class TooLongError(ValueError):
  """One message alone does not fit the context."""


class Chat:
  """A conversation, and the engine that continues it.

  Every answer runs the same compiled programs: buffers have one size, which is
  the longest conversation. When it is full, the oldest turns are left out.

  Attributes:
    messages: The conversation in the form of chat templates.
    forgotten: Turns that the last answer could not see any more.
  """

  def __init__(
    self,
    lm: pretrained.LanguageModel,
    *,
    drafter: str = 'n-gram',
    max_new_tokens: int = 256,
    context: int = 2048,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
  ):
    """Chooses the engine; compiles nothing yet.

    Raises:
      ValueError: The model cannot chat, or a number is out of range.
    """
    settings = sampling.make(1, temperature=temperature, top_p=top_p)
    self.engine = engine_lib.prepare(
      lm, drafter=drafter, greedy=sampling.is_greedy(settings)
    )
    self.messages = []
    self.forgotten = 0
    context = min(context, lm.config.max_positions)
    self._room = context - max_new_tokens
    if self._room < len(self._encode([{'role': 'user', 'content': 'Hello'}])):
      raise ValueError(
        f'max_new_tokens={max_new_tokens} leaves no room for a message in'
        f' a context of {context} tokens: lower it or raise context.'
      )
    self._options = {
      'max_new_tokens': max_new_tokens,
      'slots': context + self.engine.decoder.slack,
      'temperature': temperature,
      'top_p': top_p,
      'seed': seed,
    }

  def compile(self) -> None:
    """Compiles what answers run, or loads it from the cache."""
    with contextlib.closing(self._stream([0])) as pieces:
      next(pieces)

  def answer(self, message: str) -> Iterator[generation.Generation]:
    """Yields the answer so far; what was yielded last is remembered.

    Raises:
      TooLongError: The message alone is longer than the context.
    """
    messages = [*self.messages, {'role': 'user', 'content': message}]
    turns = len(messages)
    while len(ids := self._encode(messages)) > self._room:
      if len(messages) == 1:
        raise TooLongError(
          f'this message takes {len(ids)} tokens and there is room for'
          f' {self._room}: shorten it, raise context or lower max_new_tokens'
        )
      messages = messages[2:]
    self.forgotten = (turns - len(messages)) // 2
    for piece in self._stream(ids):
      # Before the yield, because the reader may stop there.
      text = {'role': 'assistant', 'content': piece.texts[0]}
      self.messages = [*messages, text]
      yield piece

  def _stream(self, ids: Sequence[int]) -> Iterator[generation.Generation]:
    return generation.stream(self.engine, [ids], **self._options)

  def _encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    tokenizer = self.engine.lm.tokenizer
    return tokenizer.encode(tokenizer.apply_chat_template(messages))
