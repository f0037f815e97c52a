"""Talks with a model in the terminal; speculation makes it answer sooner.

    python -m experiments.chat --model=smollm2-135m

An answer appears as it is written. /reset forgets the conversation, /quit
leaves, and Ctrl-C stops an answer. Lines may also come from a pipe.
"""

from collections.abc import Sequence
import functools
import io
import sys

from absl import flags
import rich.console

from efficiency_jax.conversation import Chat
from efficiency_jax.decoding import sampling
from efficiency_jax.io import pretrained
from experiments import inputs
from experiments import launch
from experiments import terminal
from experiments import workdir as workdirs

DRAFTERS = ('plain', 'n-gram', 'early exit')


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
      lm = inputs.for_decoding(pretrained.load(values.model))
      chat = Chat(lm, **options)
    with status.status('compiling: up to a minute, seconds the next time'):
      chat.compile()
    terminal.talk(chat, console, values.show_tokens)
  except KeyboardInterrupt:
    raise SystemExit(130) from None
  except (ValueError, OSError, flags.Error) as error:
    print(f'error: {workdirs.describe(error)}', file=sys.stderr)
    raise SystemExit(1) from None


def _usage(values: flags.FlagValues) -> str:
  lines = [
    'python -m experiments.chat [--FLAG=VALUE ...]',
    '',
    terminal.HELP,
    '',
  ]
  lines += [
    f'  --{name}={values[name].default}: {values[name].help}'
    for name in values
    if name != 'help'
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  main(sys.argv)
