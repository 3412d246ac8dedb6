"""Where the images of rows are, and splits of such rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Images(Protocol):
    """Where the images of rows are."""

    def read(self, row: int) -> tuple[Any, str]:
        """Image and key of a row, see `Example`; may raise `BadImageError`."""

    def identity(self, row: int) -> str:
        """What tells the image from others without reading it: its name."""

    def path(self, row: int) -> str | None:
        """The file that the image is; None if it is in one with others."""

    def called(self, row: int) -> str:
        """What a person calls the row."""

    def faults(self) -> Mapping[int, str]:
        """The rows whose image cannot be read, as far as can be told at once, and why."""


@dataclasses.dataclass(frozen=True, eq=False)
class AtRows:
    """A split of n images at rows of `images`, the part that all such splits share."""

    images: Images
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def paths(self) -> list[str] | None:
        """The files of the images; None if several are in one."""
        paths = [self.images.path(int(row)) for row in self.rows]
        return None if None in paths else paths  # type: ignore[return-value]
