"""Room for pixels: in memory, or in a passing file that leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moce.errors import MoceError


def allocate(shape: tuple[int, ...], store: Path | None, *, in_memory: bool) -> np.ndarray:
    """uint8 of this shape, in memory or in the file `store`, whose name is taken away at once.

    Raises MoceError if there is no room, or no file to use instead of memory.
    """
    if in_memory:
        return np.empty(shape, np.uint8)
    if store is None:
        raise MoceError(
            f"the images take {_bytes_of(shape) / 1e9:.1f} GB, more than the memory has room for; pack them "
            "once (moce pack): a packed file is read image by image"
        )
    pixels = in_file(shape, store)
    store.unlink()  # the file stays as long as the process, and leaves nothing behind
    return pixels


def in_file(shape: tuple[int, ...], store: Path) -> np.ndarray:
    """Pixels in a new file. Raises MoceError if the disk has no room."""
    needed = _bytes_of(shape)
    store.parent.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(store.parent).free:
        raise MoceError(
            f"the images take {needed / 1e9:.1f} GB, more than is free in {store.parent}; make "
            "room, or give --out (without it TMPDIR) on a larger disk"
        )
    with store.open("w+b") as file:
        _take_room(file, needed, store)
        return np.memmap(file, np.uint8, "w+", shape=shape)


def passing_file() -> Path:
    """A file for pixels where there is no output folder to put it beside; no name to be guessed."""
    return Path(tempfile.gettempdir()) / f".moce-{secrets.token_hex(8)}.pixels"


def _take_room(file: BinaryIO, needed: int, store: Path) -> None:
    """Take the room of a file at once: a disk that is full later ends the process without a word."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        store.unlink()
        raise MoceError(
            f"no room for {needed / 1e9:.1f} GB of images in {store.parent}: {error.strerror}"
        ) from None


def _bytes_of(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
