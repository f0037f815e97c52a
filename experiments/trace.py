"""Shows which draft tokens the target kept, the way the lecture draws it.

One line a run of the target: kept draft tokens in green, a refused one struck
out in red, and the token the target put after them in blue.
"""

import rich.console
import rich.text

from efficiency_jax.generation import Row
from efficiency_jax.io.tokenizer import Tokenizer

_KEPT, _REFUSED, _TARGET = 'green', 'red strike', 'bold blue'


def render(row: Row, tokenizer: Tokenizer) -> rich.text.Text:
  """The trace of one generated text, a line a run."""
  text = rich.text.Text()
  width = len(str(row.run[-1])) if len(row.run) else 1
  previous = 0
  for token, run, kept, refused in zip(
    row.tokens, row.run, row.accepted_draft, row.refused, strict=True
  ):
    if run != previous:
      text.append(f'{chr(10) if previous else ""}{run:>{width}} ', 'dim')
      previous = run
    if refused >= 0:
      text.append(_visible(tokenizer, refused), _REFUSED)
    text.append(_visible(tokenizer, token), _KEPT if kept else _TARGET)
  return text


def show(title: str, row: Row, tokenizer: Tokenizer) -> None:
  """Prints a title, what the colours mean, and the trace."""
  console = rich.console.Console()
  console.print(f'\n{title}', style='bold')
  console.print(legend())
  console.print(render(row, tokenizer))


def legend() -> rich.text.Text:
  """What the colours mean."""
  return rich.text.Text.assemble(
    'run of the target: ',
    ('accepted draft', _KEPT),
    ', ',
    ('refused draft', _REFUSED),
    ', ',
    ('token of the target', _TARGET),
  )


def _visible(tokenizer: Tokenizer, token: int) -> str:
  text = tokenizer.decode([int(token)], skip_special=False)
  return text.replace('\n', '\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}')
