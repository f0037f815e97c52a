"""Talks with a model in the terminal; speculation makes it answer sooner.

    python -m experiments.chat --model=smollm2-135m

An answer appears as it is written. /reset forgets the conversation, /quit
leaves, and Ctrl-C stops an answer. Lines may also come from a pipe.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import io
import sys

from absl import flags
import rich.console

from efficiency_jax import engine as engine_lib
from efficiency_jax import generation
from efficiency_jax.decoding import sampling
from efficiency_jax.io import pretrained
from experiments import launch
from experiments import trace
from experiments import workdir as workdirs

HELP = '/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer.'
DRAFTERS = ('plain', 'n-gram', 'early exit')


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
        f'--max_new_tokens={max_new_tokens} leaves no room for a message in'
        f' a context of {context} tokens: lower it or raise --context.'
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
          f' {self._room}: shorten it, raise --context or lower'
          ' --max_new_tokens'
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


def talk(
  chat: Chat, console: rich.console.Console, show_tokens: bool = False
) -> None:
  """Reads lines and answers them until they end."""
  interactive = sys.stdin.isatty()
  if interactive:
    with contextlib.suppress(ImportError):
      import readline  # noqa: F401 (gives `input` its editing keys)
    _note(console, HELP)
  while True:
    try:
      message = input('> ' if interactive else '').strip()
    except (EOFError, KeyboardInterrupt):
      if interactive:
        console.print()
      return
    if message == '/quit':
      return
    if message == '/reset':
      chat.messages = []
      _note(console, 'the conversation is forgotten')
    elif message.startswith('/'):
      _note(console, HELP)
    elif message:
      answer(chat, message, console, show_tokens)


def answer(
  chat: Chat,
  message: str,
  console: rich.console.Console,
  show_tokens: bool = False,
) -> None:
  """Prints an answer while it is written, then what it took."""
  shown, last, end = '', None, ''
  try:
    with contextlib.closing(chat.answer(message)) as pieces:
      for place, last in enumerate(pieces):
        if place == 0 and chat.forgotten:
          _note(
            console,
            f'the context is full: {chat.forgotten} of the oldest turns are'
            ' left out; /reset starts afresh',
          )
        text = last.texts[0]
        _print(console, text[len(shown) :])
        shown = text
  except KeyboardInterrupt:
    end = 'stopped'
  except TooLongError as error:
    _note(console, str(error))
    return
  console.print()
  if last is None:
    _note(console, end)
    return
  if show_tokens:
    console.print(trace.legend())
    console.print(trace.render(last.rows[0], chat.engine.lm.tokenizer))
  if not end and last.rows[0].finish == 'length':
    end = 'cut at --max_new_tokens'
  _note(console, facts(last) + (f', {end}' if end else ''))


def facts(result: generation.Generation) -> str:
  """Speed and speculation of one answer, in a line."""
  counts = result.statistics[0]
  parts = [
    f'{counts.generated} tokens',
    f'{result.tokens_per_second:.1f} tokens/s',
    f'prompt read in {result.prefill_seconds:.1f} s',
    f'{counts.tokens_per_run:.2f} tokens/run',
  ]
  if counts.drafted:
    parts.append(f'{counts.acceptance_rate:.0%} of drafts accepted')
  return ', '.join(parts)


def _note(console: rich.console.Console, text: str) -> None:
  console.print(
    f'[{text}]', style='dim', markup=False, highlight=False, soft_wrap=True
  )


def _print(console: rich.console.Console, text: str) -> None:
  """Prints text as it is, apart from what would steer the terminal."""
  control = {*range(32), *range(127, 160)} - {ord('\n'), ord('\t')}
  console.file.write(text.translate(dict.fromkeys(control)))
  console.file.flush()


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    flags.Error: A flag is unknown or wrong.
    ValueError: Something on the line is not a flag.
  """
  values = flags.FlagValues()
  text = functools.partial(flags.DEFINE_string, flag_values=values)
  number = functools.partial(flags.DEFINE_float, flag_values=values)
  whole = functools.partial(flags.DEFINE_integer, flag_values=values)
  switch = functools.partial(flags.DEFINE_boolean, flag_values=values)
  text('model', 'smollm2-135m', 'an asset, a folder, a .gguf file or a Hub id')
  text('drafter', 'n-gram', f'what drafts: {", ".join(DRAFTERS)}')
  number('temperature', 0.0, '0 always takes the likeliest token')
  number('top_p', 1.0, 'samples from the likeliest tokens of this probability')
  whole('max_new_tokens', 256, 'tokens of an answer', 1)
  whole('context', 2048, 'tokens of the conversation', 1)
  whole('seed', 0, 'of all random choices')
  switch('show_tokens', False, 'show after each answer which drafts were kept')
  switch('compilation_cache', True, 'keep compiled programs between runs')
  switch('help', False, 'show this and stop')
  rest = values(list(argv))[1:]
  if rest:
    raise ValueError(f'{rest[0]!r} is not a flag.')
  if values.drafter not in DRAFTERS:
    raise ValueError(
      f'--drafter={values.drafter} is unknown; there are {", ".join(DRAFTERS)}.'
    )
  return values


def main(argv: Sequence[str]) -> None:
  """Talks until the lines end.

  Raises:
    SystemExit: With code 1 after a wrong flag or file, 130 after Ctrl-C before
      the first message.
  """
  try:
    values = parse(argv)
    if values.help:
      print(_usage(values))
      return
    options = {
      name: values[name].value
      for name in (
        'drafter',
        'temperature',
        'top_p',
        'max_new_tokens',
        'context',
        'seed',
      )
    }
    sampling.make(1, temperature=values.temperature, top_p=values.top_p)
    if values.compilation_cache:
      launch.keep_programs()
    for stream in (sys.stdin, sys.stdout):
      if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors='replace')
    console = rich.console.Console()
    status = rich.console.Console(stderr=True)
    with status.status(f'loading {values.model}'):
      chat = Chat(pretrained.load(values.model), **options)
    with status.status('compiling: up to a minute, seconds the next time'):
      chat.compile()
    talk(chat, console, values.show_tokens)
  except KeyboardInterrupt:
    raise SystemExit(130) from None
  except (ValueError, OSError, flags.Error) as error:
    print(f'error: {workdirs.describe(error)}', file=sys.stderr)
    raise SystemExit(1) from None


def _usage(values: flags.FlagValues) -> str:
  lines = ['python -m experiments.chat [--FLAG=VALUE ...]', '', HELP, '']
  lines += [
    f'  --{name}={values[name].default}: {values[name].help}'
    for name in values
    if name != 'help'
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  main(sys.argv)
