"""One image that can be opened, and what file names say about it: label and split."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NoReturn

from moce.data.decode import Raster, open_encoded
from moce.data.readers.torchvision import Label

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SPLITS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}


@dataclass(frozen=True)
class Sample:
    """One image that can be opened. label, split: None where the source does not tell.

    A label is one class, or a tuple of any number of classes where the source has several.
    """

    id: str
    open: Callable[[], Raster]
    label: Label | None = None
    split: str | None = None


def is_image_name(name: str) -> bool:
    """Whether a file is called as images are."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def as_text(name: str) -> str:
    """A file name as text that can be written anywhere: bytes that are no text become \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def from_path(name: str, open_image: Callable[[], Raster], label: str | None = None) -> Sample:
    """An image called by its path. A first folder named train, test or val is a split; a last one a label."""
    folders = list(PurePosixPath(name).parts[:-1])
    split = SPLITS.get(folders[0]) if folders else None
    if split:
        folders = folders[1:]
    if label is None and folders:
        label = folders[-1]
    return Sample(name, open_image, label, split)


def file_sample(path: Path, written: str) -> Sample:
    """A single image file, called by its path as it was written."""
    return Sample(as_text(Path(written).as_posix()), partial(open_encoded, path))


def refused(name: str, reason: str) -> Sample:
    """An image that will not be read: it is skipped, and listed with the reason."""
    return Sample(name, partial(_refuse, reason))


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)
