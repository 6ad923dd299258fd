"""The encoded image of one row of a parquet file, read when it is needed.

Files of `moce pack` say in their footer where each image lies, so that it is read alone. Of others the
row group around it is read, and the last few of those are kept.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from moce.data.readers.storage import Storage

OFFSETS = b"moce.image_offsets"  # a key of the footer
CACHE_BYTES = 2**28
LENGTH = struct.Struct("<I")  # precedes every value in the file
Group = tuple[int, int]  # rows of a row group, and where in the file its images start


@dataclass(frozen=True)
class ImageColumn:
    """The images of one file. column: its name; in_struct: whether they are its field `bytes`.

    offsets, sizes: [n] uint64 and uint32, where in the file each image lies, or None.
    first_rows: [g + 1] int64, the first row of each row group, and the number of rows.
    """

    file: Storage
    column: str
    in_struct: bool
    first_rows: np.ndarray = field(repr=False)
    offsets: np.ndarray | None = field(default=None, repr=False)
    sizes: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def read(self, row: int) -> bytes:
        """Raises ValueError if the row has no image; errors of the file system and of pyarrow."""
        if self.offsets is not None and self.sizes is not None:
            start, size = int(self.offsets[row]), int(self.sizes[row])
            content = self.file.read(start - LENGTH.size, LENGTH.size + size)
            if LENGTH.unpack(content[: LENGTH.size])[0] == size:
                return content[LENGTH.size :]
        group = int(np.searchsorted(self.first_rows, row, "right")) - 1
        values = _groups.get(self, group)
        content = values[row - int(self.first_rows[group])].as_py()
        if content is None:
            raise ValueError("no content")
        return content

    def group(self, number: int) -> pyarrow.ChunkedArray:
        """All images of a row group."""
        name = f"{self.column}.bytes" if self.in_struct else self.column
        with self.file.open() as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            table = parquet.read_row_group(number, columns=[name])
        values = table.column(self.column)
        return pyarrow.compute.struct_field(values, "bytes") if self.in_struct else values


class RowReader:
    """The bytes of the image of a row, counted over several files."""

    def __init__(self, files: list[ImageColumn]) -> None:
        self.files = files
        self.first_rows = np.cumsum([0, *map(len, files)])

    def __call__(self, row: int) -> bytes:
        number = int(np.searchsorted(self.first_rows, row, "right")) - 1
        return self.files[number].read(row - int(self.first_rows[number]))


class _Groups:
    """The row groups read last, for all threads: one reads, the others wait for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._kept: OrderedDict[tuple[Storage, str, int], pyarrow.ChunkedArray] = OrderedDict()

    def get(self, images: ImageColumn, number: int) -> pyarrow.ChunkedArray:
        key = (images.file, images.column, number)
        with self.lock:
            if key not in self._kept:
                self._kept[key] = images.group(number)
                while (
                    len(self._kept) > 1 and sum(v.nbytes for v in self._kept.values()) > CACHE_BYTES
                ):
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


_groups = _Groups()
# A forked child has none of the threads that may hold the lock.
os.register_at_fork(after_in_child=lambda: setattr(_groups, "lock", threading.Lock()))


# --- where images lie -----------------------------------------------------------------------------


def encode_offsets(groups: Sequence[Group], offsets: np.ndarray, sizes: np.ndarray) -> bytes:
    """The value of OFFSETS, for a file with these row groups."""
    places = offsets.astype("<u8").tobytes() + sizes.astype("<u4").tobytes()
    text = base64.b64encode(places).decode()
    return json.dumps({"groups": _checksum(groups), "places": text}).encode()


def decode_offsets(metadata: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Offsets and sizes from a footer; None if it has none.

    None, too, if pandas or pyarrow copied it into a file whose row groups lie elsewhere.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    places = [(group.num_rows, group.column(0).data_page_offset) for group in groups]
    try:
        found = json.loads((metadata.metadata or {})[OFFSETS])
        content = base64.b64decode(found["places"], validate=True)
        matches = found["groups"] == _checksum(places)
    except (KeyError, TypeError, ValueError):
        return None
    rows = metadata.num_rows
    if not matches or len(content) != 12 * rows:
        return None
    return np.frombuffer(content, "<u8", rows), np.frombuffer(content, "<u4", rows, 8 * rows)


def _checksum(groups: Sequence[Group]) -> int:
    return zlib.crc32(json.dumps([list(group) for group in groups]).encode())
