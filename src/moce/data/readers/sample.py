"""One image that can be opened: id, label, split."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from moce.data.decode import Raster, open_encoded
from moce.data.formats import suffixes

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
    return suffix_of(name).lower() in suffixes()


def suffix_of(name: str) -> str:
    """The last suffix of a path, as pathlib's, in a tenth of the time."""
    last = name.rpartition("/")[2]
    dot = last.rfind(".")
    return last[dot:] if 0 < dot < len(last) - 1 else ""


def as_text(name: str) -> str:
    """A file name as printable text: bytes that are not UTF-8 become \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def error_line(error: Exception) -> str:
    """Type and message of an error, in one line of at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def refused(name: str, reason: str) -> Sample:
    """An image that is not read, but skipped and listed with the reason."""
    return Sample(name, partial(_refuse, reason))


def _refuse(reason: str) -> NoReturn:
    raise ValueError(reason)
