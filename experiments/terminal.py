"""Reads messages from a terminal or a pipe, and prints answers."""

import contextlib
import sys

import rich.console

from efficiency_jax import generation
from efficiency_jax.conversation import Chat
from efficiency_jax.conversation import TooLongError
from experiments import trace

HELP = '/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer.'


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
