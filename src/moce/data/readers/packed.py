"""Packed images: one file of decoded, resized pixels that is mapped into memory.

    bytes 0 to 4095     a line "MOCEPACK <CRC-32 of the header>", the header as JSON, spaces
    then                the pixels, uint8, image by image, each [channels, height, width]
    then                the index as JSON: ids, labels, splits, skipped, and a CRC-32 per chunk

Opening a file checks the header, the size of the file and the index. Only `verify` checks the
pixels, because it reads all of them.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moce.config import expand
from moce.data.readers.columns import Column, compact, label_column, plain, text_column
from moce.data.readers.sample import Label
from moce.data.readers.table import RasterTable
from moce.errors import MoceError

SUFFIX, MAGIC, VERSION = ".moce", b"MOCEPACK", 1
HEADER_BYTES = 4096
FIELDS = ("version", "count", "channels", "height", "width", "index_bytes", "index_crc32")


@dataclass(frozen=True)
class Packed:
    """A packed file whose header and index are valid.

    shape: (n, channels, height, width). chunks: (images, CRC-32 of their pixels), in order.
    """

    path: Path
    shape: tuple[int, int, int, int]
    ids: Column[str]
    labels: Column[Label | None]
    splits: Column[str | None]
    skipped: list[tuple[str, str]]
    chunks: list[tuple[int, int]]

    @property
    def num_bytes(self) -> int:
        """Size of the pixels."""
        return int(np.prod(self.shape, dtype=np.int64))

    def mapped(self) -> np.ndarray:
        """The pixels, [n, c, h, w] uint8, mapped from the file."""
        return np.memmap(self.path, np.uint8, "r", HEADER_BYTES, self.shape)

    def tensor(self, *, in_memory: bool) -> Tensor:
        """The pixels, [n, c, h, w] uint8: in memory, or mapped and read-only."""
        if in_memory:
            flat = np.fromfile(self.path, np.uint8, self.num_bytes, offset=HEADER_BYTES)
            return torch.from_numpy(flat.reshape(self.shape))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(self.mapped())

    def samples(self) -> RasterTable:
        """The images, as other readers return them."""
        columns = (self.labels.values, self.splits.values)
        return RasterTable(self.ids.values, partial(_as_raster, self.mapped()), *columns)

    def verify(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read all pixels and compare checksums; calls `advance` with the number of images read.

        Raises MoceError that names the corrupt images.
        """
        pixels, start = self.mapped(), 0
        for count, expected in self.chunks:
            if zlib.crc32(pixels[start : start + count].data) != expected:
                raise _corrupt(
                    self.path, f"the pixels of images {start} to {start + count - 1} have changed"
                )
            start += count
            advance(count)


class PixelReader:
    """Reads rows of a packed file, which stays open even if it is deleted.

    A mapping would kill the process, silently, if its file is cut short or its disk fails.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        """shape: [n, c, h, w] of the pixels in the file."""
        self._path, self._count, self._shape = path, shape[0], shape[1:]
        self._file = path.open("rb", buffering=0)

    def read(self, rows: Sequence[int]) -> Tensor:
        """The pixels of these rows, [len(rows), c, h, w] uint8.

        Raises MoceError if they cannot be read, IndexError if the file never had them.
        """
        pixels = np.empty((len(rows), *self._shape), np.uint8)
        size, numbers, flat = int(np.prod(self._shape)), range(self._count), pixels.reshape(-1).data
        try:
            for place, row in enumerate(rows):
                image = flat[place * size : (place + 1) * size]
                self._read_into(image, row, HEADER_BYTES + numbers[row] * size)
        except OSError as error:
            raise MoceError(f"cannot read {self._path}: {error.strerror}") from None
        return torch.from_numpy(pixels)

    def _read_into(self, image: memoryview, row: int, start: int) -> None:
        """Read an image from `start` on: not every system reads it all at once.

        Threads and forked processes share the position in the file, so it is not used.
        """
        while image:
            found = os.preadv(self._file.fileno(), [image], start)
            if not found:
                raise MoceError(f"cannot read {self._path}: it was cut short at image {row}")
            image, start = image[found:], start + found


def _as_raster(images: np.ndarray, row: int) -> Image.Image | np.ndarray:
    """A PIL image for 1 or 3 channels, else an array [h, w, c]."""
    pixels = images[row]
    if len(pixels) == 1:
        return Image.fromarray(np.array(pixels[0]))
    last = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    return Image.fromarray(last) if len(pixels) == 3 else last


def check_large_enough(packed: Packed, size: tuple[int, int]) -> None:
    """Raise MoceError if the images of a packed file are smaller than `size`, [h, w]."""
    height, width = packed.shape[2:]
    if height < size[0] or width < size[1]:
        raise MoceError(
            f"{packed.path} contains images of {height}x{width}, smaller than the "
            f"{size[0]}x{size[1]} needed; pack them again with --size {size[0]}x{size[1]} or more"
        )


def find_packed(data: str) -> Packed | None:
    """The packed file that DATA names, by suffix or content; None if it names something else.

    Raises MoceError if the file is corrupt.
    """
    path = expand(Path(data))
    if not data or not os.path.isfile(path):  # noqa: PTH113 - pathlib's raises for long names
        return None
    with path.open("rb") as file:
        is_packed = file.read(len(MAGIC)) == MAGIC
    return open_packed(path) if is_packed or path.suffix == SUFFIX else None


def open_packed(path: Path) -> Packed:
    """Read header and index. Raises MoceError if the file is corrupt, cut short or not packed."""
    with path.open("rb") as file:
        header = _read_header(path, file.read(HEADER_BYTES))
        shape = tuple(header[name] for name in ("count", "channels", "height", "width"))
        end = HEADER_BYTES + int(np.prod(shape, dtype=np.int64))
        expected, found = end + header["index_bytes"], path.stat().st_size
        if found != expected:
            raise _corrupt(path, f"it has {found} bytes where {expected} are expected")
        file.seek(end)
        index = file.read(header["index_bytes"])
    if zlib.crc32(index) != header["index_crc32"]:
        raise _corrupt(path, "its index does not match its checksum")
    return _from_index(path, shape, json.loads(index))


def _read_header(path: Path, block: bytes) -> dict[str, Any]:
    line, _, body = block.partition(b"\n")
    body = body.rstrip()
    if line != MAGIC + b" %08x" % zlib.crc32(body) or len(block) != HEADER_BYTES:
        raise _corrupt(path, "its header does not match its checksum")
    header = json.loads(body)
    if header["version"] != VERSION:
        raise MoceError(
            f"{path} has format {header['version']}, but this version of moce reads format {VERSION}; "
            "pack the images again"
        )
    return header


def _from_index(path: Path, shape: tuple[int, ...], index: dict[str, Any]) -> Packed:
    return Packed(
        path=path,
        shape=shape,  # type: ignore[arg-type]
        ids=Column(text_column(index["ids"])),
        labels=Column(compact(label_column([*map(plain, index["labels"])]))),
        splits=Column(compact(text_column(index["splits"]))),
        skipped=[(name, reason) for name, reason in index["skipped"]],
        chunks=[(count, crc) for count, crc in index["chunks"]],
    )


def header_block(shape: tuple[int, ...], index: bytes, made_by: str) -> bytes:
    """The first HEADER_BYTES of a file with pixels of `shape` (n, c, h, w) and this index."""
    values = [VERSION, *shape, len(index), zlib.crc32(index)]
    body = json.dumps({**dict(zip(FIELDS, values, strict=True)), "made_by": made_by}).encode()
    return (MAGIC + b" %08x\n" % zlib.crc32(body) + body).ljust(HEADER_BYTES - 1) + b"\n"


def _corrupt(path: Path, reason: str) -> MoceError:
    return MoceError(f"{path} is corrupt or not a packed file: {reason}; pack the images again")
