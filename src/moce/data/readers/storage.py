"""Files that images are read from in place, by range."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from moce.errors import MoceError


class Storage(Protocol):
    """A file of known size. Can be pickled, compared and used by several threads and processes."""

    @property
    def name(self) -> str:
        """Its path or URL."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read(self, start: int, size: int) -> bytes:
        """`size` bytes from `start`. Raises ValueError if it has changed, EOFError if it ends before."""

    def open(self, *, sparse: bool = False) -> BinaryIO:
        """The whole file, to read from and seek in. Raises ValueError if it has changed.

        sparse: a little of it will be read, here and there.
        """


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk. changed: when, in ns."""

    path: Path
    size: int
    changed: int

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, start: int, size: int) -> bytes:
        with self.open() as file:
            file.seek(start)
            return read_exactly(file, size)

    def open(self, *, sparse: bool = False) -> BinaryIO:
        file = self.path.open("rb", buffering=0)
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size, self.changed):
            file.close()
            raise ValueError(f"{self.path} has changed since it was opened")
        return file


def are_far(files: Sequence[Storage]) -> bool:
    """Whether files are best read one after the other, not at random."""
    return not all(isinstance(file, LocalFile) for file in files)


def local_file(path: Path) -> LocalFile:
    """Raises MoceError if there is no such file."""
    try:
        if not path.is_file():  # a pipe would block
            raise MoceError(f"{path} is not a file")
        status = path.stat()
    except OSError as error:
        raise MoceError(f"cannot read {path}: {error.strerror}") from None
    return LocalFile(path, status.st_size, status.st_mtime_ns)


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Raises EOFError if the file ends before."""
    parts = []
    while size > 0:
        part = file.read(size)
        if not part:
            raise EOFError("the file ends within the image")
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
