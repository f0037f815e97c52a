"""The two ways in which reading something from outside can fail."""

from collections.abc import Iterator
import contextlib
import os


class FileFormatError(ValueError):
  """A file is not what it claims to be, or is something we do not read.

  The message is one line: the file, what is wrong, and what to do about it.
  """

  def __init__(self, path: str | os.PathLike[str], problem: str, remedy: str):
    # Only the middle is cut: a remedy that is cut off helps nobody.
    super().__init__(
      _one_line(f'{os.fspath(path)}: ', 300)
      + _one_line(problem, 400)
      + f'; {remedy}'
    )


class FetchError(OSError):
  """Something could not be downloaded; the message says what to do instead."""

  def __init__(self, message: str):
    super().__init__(_one_line(message, 2000))


@contextlib.contextmanager
def as_format_error(
  path: str | os.PathLike[str], activity: str, remedy: str
) -> Iterator[None]:
  """Turns whatever a parsing library raises into a `FileFormatError`.

  The libraries written in Rust raise plain `Exception`, and a Rust panic is a
  `BaseException`, so catching narrow types would let hostile files through.
  """
  try:
    yield
  except FileFormatError:
    raise
  except (KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:
    reason = f'{activity} failed ({type(error).__name__}: {error})'
    raise FileFormatError(path, reason, remedy) from error


def _one_line(text: str, limit: int) -> str:
  # Names in files may hold line ends, terminal control codes and worse.
  line = ''.join(c if c.isprintable() else ' ' for c in text)
  return line if len(line) <= limit else line[: limit - 3] + '...'
