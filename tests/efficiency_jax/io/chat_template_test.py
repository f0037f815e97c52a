"""Tests of the sandbox that chat templates run in."""

import concurrent.futures
import os
import time

import pytest

from efficiency_jax.io import chat_template

_MESSAGES = {'messages': [{'role': 'user', 'content': 'Grüße "x"'}]}


def test_conventions_of_transformers():
  template = (
    '{%- for m in messages %}\n'
    '    {% if loop.first %}\n'
    '{{ m.content | tojson }}\n'
    '    {% endif %}\n'
    '{% generation %}[{{ m.role }}]{% endgeneration %}\n'
    '{% break %}{% endfor %}'
  )
  found = chat_template.render(template, _MESSAGES)
  assert found == '"Grüße \\"x\\""\n[user]'


def test_raise_exception_reaches_the_caller():
  template = "{{ raise_exception('roles must alternate') }}"
  with pytest.raises(ValueError, match='roles must alternate'):
    chat_template.render(template, {})


@pytest.mark.parametrize(
  'expression',
  [
    '().__class__.__mro__[1].__subclasses__()',
    "''.__class__.__base__",
    "cycler.__init__.__globals__['os'].system('true')",
    "raise_exception.__globals__['json']",
    'self.__init__.__globals__',
    "'{0.__class__.__base__}'.format(())",
    "('{0.__cl'~'ass__}').format(())",
    "''|attr('__class__')",
    'messages.append(1)',
    "messages[0].update({'a': 1})",
    'range(10**7)|list|length',
  ],
)
def test_escapes_are_refused(expression):
  # Each of these reaches Python, or changes its arguments, unless refused;
  # an attribute that is refused may also just be undefined and print nothing.
  template = '{% set x = ' + expression + ' %}{{ x }}'
  try:
    found = chat_template.render(template, _MESSAGES)
  except ValueError:
    found = ''
  assert found == ''


@pytest.mark.parametrize('template', ['{% for', '{{ x.y.z }}', '{% nothing %}'])
def test_invalid_templates_are_refused(template):
  with pytest.raises(ValueError, match='The chat template failed'):
    chat_template.render(template, {})


@pytest.mark.parametrize(
  'template',
  [
    '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}'
    '{% endfor %}',
    '{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}'
    '{% endfor %}',
    "{{ 'x' * 10 ** 12 }}",
    "{{ '%1000000000000d' % 1 }}",
    '{% set x = [1] %}' + '{% set x = x + x %}' * 60 + '{{ x }}',
    "{% set x = 'x' %}" + '{% set x = x ~ x %}' * 60 + '{{ x }}',
    '{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}',
    '{{ 9 ** (9 ** 9) }}',
    '(' * 200 + '{{ ' + '(' * 100_000 + ' }}',
  ],
)
def test_runaway_templates_are_stopped(template, monkeypatch):
  monkeypatch.setattr(chat_template, 'SECONDS', 1.0)
  start = time.monotonic()
  with pytest.raises(ValueError, match='template'):
    chat_template.render(template, {})
  assert time.monotonic() - start < 10.0
  # The next template gets an answer, and its own.
  assert chat_template.render('{{ x }}', {'x': 'fine'}) == 'fine'


def test_size_of_the_template_is_limited():
  template = 'x' * (chat_template.MAX_TEMPLATE_CHARS + 1)
  with pytest.raises(ValueError, match='over the limit'):
    chat_template.render(template, {})


def test_variables_must_be_plain():
  with pytest.raises(ValueError, match='plain JSON'):
    chat_template.render('{{ x }}', {'x': object()})


def test_threads_get_their_own_answers():
  def ask(number):
    return chat_template.render('{{ x }}', {'x': number})

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(ask, range(100)))
  assert found == [str(number) for number in range(100)]


def test_a_dead_worker_is_replaced():
  chat_template.render('a', {})
  pid, process = chat_template._worker
  assert pid == os.getpid()
  process.kill()
  process.wait()
  assert chat_template.render('b', {}) == 'b'
