"""Packages of npm for pages: fetched once at a pinned version, checked, and taken apart."""

import base64
import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping

from vit_jax.data import remote
from vit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Package:
    """A package at one version.

    Attributes:
        name: as npm has it.
        version: the only one that is taken.
        integrity: its SHA-512, as `npm view NAME@VERSION dist.integrity` gives it.
        option: of the command line, that names its file where there is no npm; '' for none.
    """

    name: str
    version: str
    integrity: str
    option: str = ''

    @property
    def file(self) -> str:
        """What `npm pack` calls it."""
        return f'{self.name.removeprefix("@").replace("/", "-")}-{self.version}.tgz'

    def fetch(self) -> pathlib.Path:
        """The file of the package, in the cache; npm downloads it the first time.

        Raises:
            UserError: there is no npm, it fails, or what it brings is another package.
        """
        path = remote.cache_folder() / 'npm' / self.file
        if path.is_file():
            return path
        named = f', or give the file {self.file} with {self.option}' if self.option else ''
        if shutil.which('npm') is None:
            raise UserError(
                f'{self.name} {self.version} comes from npm, which is not installed: install '
                f'Node.js{named}'
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = ['npm', 'pack', f'{self.name}@{self.version}', '--pack-destination', folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            made = pathlib.Path(folder, self.file)
            if done.returncode or not made.is_file():
                said = ' '.join(done.stderr.split())[-300:]
                raise UserError(
                    f'npm could not download {self.name} {self.version} ({said}): try again with a '
                    f'network{named}'
                )
            self.check(made)
            os.replace(made, path)
        return path

    def check(self, path: pathlib.Path) -> None:
        """Raises `UserError` where a file is not this package."""
        try:
            digest = hashlib.sha512(path.read_bytes()).digest()
        except OSError as error:
            raise UserError(f'{self.option} {path} cannot be read ({error.strerror})') from error
        if base64.b64encode(digest).decode() != self.integrity:
            raise UserError(
                f"{path} is not npm's package {self.name} {self.version} (its SHA-512 differs); "
                'remove it, and it is downloaded again'
            )

    def unpack(self, path: pathlib.Path, folder: pathlib.Path, names: Mapping[str, str]) -> None:
        """Copies files of the package, after a check.

        Args:
            path: its file.
            folder: where to.
            names: path inside of the package -> name in the folder.

        Raises:
            UserError: see `check`.
        """
        self.check(path)
        with tarfile.open(path) as archive:
            for inside, name in names.items():
                source = archive.extractfile(f'package/{inside}')
                assert source is not None  # the package is known
                with source, open(folder / name, 'wb') as target:
                    shutil.copyfileobj(source, target)
