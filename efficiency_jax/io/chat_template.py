"""Renders chat templates, which are programs that come with a checkpoint.

A template is Jinja code written by whoever made the model. Jinja's sandbox
keeps it away from Python, but not from the processor or the memory: two nested
loops over `range` run for hours. So the sandbox runs in a process of its own,
under limits on time, memory and output; the process is started at the first
template and then kept, because starting it costs more than rendering.

This file is also the program of that process, so it imports nothing of the
package at the top.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
from typing import Any

MAX_TEMPLATE_CHARS = 2**18
MAX_OUTPUT_CHARS = 2**23
SECONDS = 5.0
_MEMORY_BYTES = 2**30

_lock = threading.Lock()
_worker: 'tuple[int, subprocess.Popen] | None' = None


def render(template: str, variables: dict[str, Any]) -> str:
  """Renders a Jinja template as transformers does, in bounded time and memory.

  Blocks are trimmed; `tojson` leaves non-ASCII text alone; `raise_exception`,
  `break`, `continue` and `generation` blocks exist. `strftime_now` does not, so
  that a prompt does not depend on the day: templates fall back to a fixed date.
  The memory limit needs a Unix; the time limit holds everywhere.

  Args:
    template: At most `MAX_TEMPLATE_CHARS` long.
    variables: What the template sees; must be expressible in JSON.

  Raises:
    ValueError: The template is not valid, refuses the variables, tries to
      leave the sandbox, or does not finish within the limits.
  """
  if len(template) > MAX_TEMPLATE_CHARS:
    raise ValueError(
      f'The chat template has {len(template)} characters, over the limit of'
      f' {MAX_TEMPLATE_CHARS}.'
    )
  try:
    request = json.dumps({'template': template, 'variables': variables})
  except (TypeError, ValueError, RecursionError) as error:
    raise ValueError(f'Chat messages must be plain JSON: {error}.') from error
  reply = _ask(request)
  if reply is None:
    raise ValueError(
      'The chat template did not finish within'
      f' {SECONDS:g} s and {_MEMORY_BYTES >> 20} MiB; use another template.'
    )
  if 'error' in reply:
    raise ValueError(f'The chat template failed: {reply["error"]}')
  return reply['text']


def _ask(request: str) -> dict[str, str] | None:
  """Sends a request to the worker; None if it had to be killed, or died."""
  with _lock:
    worker = _start()
    timer = threading.Timer(SECONDS, worker.kill)
    timer.start()
    try:
      worker.stdin.write(request.encode('ascii') + b'\n')
      worker.stdin.flush()
      line = worker.stdout.readline()
    except BrokenPipeError:
      line = b''
    except BaseException:
      # An interrupt between question and answer would leave the answer for
      # whoever asks next.
      _stop()
      raise
    finally:
      timer.cancel()
    if not line.endswith(b'\n'):
      _stop()
      return None
    return json.loads(line)


def _start() -> subprocess.Popen:
  """The running worker of this process, started if there is none."""
  global _worker
  # A forked child must not share the pipes of its parent.
  if (
    _worker is None
    or _worker[0] != os.getpid()
    or _worker[1].poll() is not None
  ):
    # -P: the folder of this file must not shadow the standard library.
    command = [sys.executable, '-P', __file__]
    process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
    )
    _worker = os.getpid(), process
    # Starting takes time that is not the template's.
    process.stdout.readline()
  return _worker[1]


@atexit.register
def _stop() -> None:
  global _worker
  if _worker is not None and _worker[0] == os.getpid():
    _worker[1].kill()
    _worker[1].wait()
    _worker[1].stdin.close()
    _worker[1].stdout.close()
  _worker = None


def _serve() -> None:
  """The worker: one JSON request a line, one JSON reply a line."""
  try:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  except (ImportError, OSError, ValueError):
    pass
  _environment()
  print(flush=True)
  for line in sys.stdin.buffer:
    request = json.loads(line)
    try:
      reply = {'text': _render(request['template'], request['variables'])}
    except Exception as error:  # The template may raise anything at all.
      reply = {'error': f'{type(error).__name__}: {error}'[:1000]}
    print(json.dumps(reply), flush=True)


def _render(template: str, variables: dict[str, Any]) -> str:
  pieces, size = [], 0
  for piece in _compile(template).generate(**variables):
    size += len(piece)
    if size > MAX_OUTPUT_CHARS:
      raise ValueError(f'output is longer than {MAX_OUTPUT_CHARS} characters')
    pieces.append(piece)
  return ''.join(pieces)


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
  return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
  from jinja2 import exceptions
  from jinja2 import ext
  from jinja2 import sandbox

  class Generation(ext.Extension):
    """`{% generation %}` marks what a model wrote; it renders as its body."""

    tags = {'generation'}

    def parse(self, parser):
      next(parser.stream)
      return parser.parse_statements(('name:endgeneration',), drop_needle=True)

  def raise_exception(message: str):
    raise exceptions.TemplateError(message)

  def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)

  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[Generation, ext.loopcontrols],
  )
  environment.globals['raise_exception'] = raise_exception
  environment.filters['tojson'] = to_json
  return environment


if __name__ == '__main__':
  _serve()
