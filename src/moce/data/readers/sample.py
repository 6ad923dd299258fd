"""One image that can be opened: id, label, split."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

from moce.data.decode import Raster, open_encoded

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}

Label = str | tuple[str, ...]  # one class, or any number of classes


@dataclass(frozen=True)
class Sample:
    """One image that can be opened. label, split: None if the source has none."""

    id: str
    open: Callable[[], Raster]
    label: Label | None = None
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """Opens an encoded image, and gives its bytes. source: its file, or a function that reads it."""

    source: Path | Callable[[], bytes]

    def __call__(self) -> Raster:
        return open_encoded(self.source if isinstance(self.source, Path) else self.source())

    def read(self) -> bytes:
        return self.source.read_bytes() if isinstance(self.source, Path) else self.source()


def is_image_name(name: str) -> bool:
    """True if a file has the suffix of an image."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def as_text(name: str) -> str:
    """A file name as printable text: bytes that are not UTF-8 become \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def error_line(error: Exception) -> str:
    """Type and message of an error, in one line of at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def split_and_label(name: str) -> tuple[str | None, str | None]:
    """Of a path: a first folder train, test or val is its split, the last its label."""
    folders = list(PurePosixPath(name).parts[:-1])
    split = SPLITS.get(folders[0]) if folders else None
    if split:
        folders = folders[1:]
    return split, folders[-1] if folders else None


def from_path(name: str, open_image: Callable[[], Raster]) -> Sample:
    """A sample identified by its path, which also has its split and label."""
    split, label = split_and_label(name)
    return Sample(name, open_image, label, split)


def refused(name: str, reason: str) -> Sample:
    """An image that is not read, but skipped and listed with the reason."""
    return Sample(name, partial(_refuse, reason))


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)
