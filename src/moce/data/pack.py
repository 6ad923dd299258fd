"""Write packed files (format: readers/packed.py): decoded in parallel, resumable.

While FILE is written there are FILE.partial, the pixels of the readable images in order, and
FILE.journal, a JSON line for every chunk of images that is on disk. A resumed pack cuts off what
follows the last journaled chunk and continues there; the result is the same to the byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moce.data.load import decode_into
from moce.data.readers.packed import HEADER_BYTES, Packed, header_block, open_packed
from moce.data.readers.sample import Sample
from moce.data.run_ahead import run_ahead
from moce.errors import MoceError
from moce.runs.files import make_folder, read_lines, write_text
from moce.runtime.system import existing, worker_threads

CHUNK_BYTES, MOST_IN_CHUNK = 2**25, 1024  # bytes, images: decoded, written and journaled together
ROW_KEYS = {"entries", "images", "crc32", "skipped"}  # of a line of the journal


class Packer:
    """Writes one packed file: iterate over `chunks`, then call `finish`."""

    def __init__(self, out: Path, samples: Sequence[Sample], shape: tuple[int, int, int]) -> None:
        """shape: (channels, height, width) of the packed images."""
        self.out, self.samples, self.shape = out, samples, shape
        self._partial = out.with_name(f"{out.name}.partial")
        self._journal = out.with_name(f"{out.name}.journal")
        self._image_bytes = int(np.prod(shape))
        self._size = max(1, min(MOST_IN_CHUNK, CHUNK_BYTES // self._image_bytes))
        names = json.dumps([(sample.id, sample.label, sample.split) for sample in samples])
        job = hashlib.sha256(names.encode()).hexdigest()
        self._job = {"job": job, "shape": list(shape)}
        self._rows: list[dict[str, Any]] = []

    @property
    def done(self) -> int:
        """Images processed so far, readable or not."""
        return sum(row["entries"] for row in self._rows)

    def resume(self) -> int:
        """Resume an interrupted pack, if there is one; the number of images it had processed.

        Raises MoceError if it packed other images or another size.
        """
        lines = read_lines(self._journal) if self._partial.is_file() else []
        if not lines:
            return 0
        if lines[0] != self._job:
            raise MoceError(
                f"{self._partial} was started with other images or another size; add --overwrite to "
                "start over, or choose another file"
            )
        rows = lines[1:]
        self._rows = rows if all(row.keys() >= ROW_KEYS for row in rows) else []
        if self._partial.stat().st_size < self._end():
            self._rows = []
        return self.done

    def discard(self) -> None:
        """Remove the files of an interrupted pack."""
        self._partial.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def chunks(self, workers: int | None = None) -> Generator[dict[str, Any]]:
        """Decode, write and journal the remaining images; yields the journal's lines.

        Can be closed, and resumed later.
        """
        self._check_room()
        make_folder(self.out.parent)
        # Rewrite the journal: its last line may be incomplete.
        write_text(self._journal, "".join(map(_line, [self._job, *self._rows])))
        with (
            self._partial.open("r+b" if self._rows else "wb") as pixels,
            self._journal.open("a", encoding="utf-8") as journal,
            closing(self._decoded(workers or worker_threads())) as decoded,
        ):
            pixels.truncate(self._end())
            pixels.seek(0, os.SEEK_END)
            for start, content, reasons in decoded:
                row = self._write(pixels, start, content, reasons)
                journal.write(_line(row))
                _sync(journal)
                self._rows.append(row)
                yield row

    def _end(self) -> int:
        """The size of the partial file with the journaled images."""
        images = sum(row["images"] for row in self._rows)
        return HEADER_BYTES + images * self._image_bytes

    def _check_room(self) -> None:
        parent = existing(self.out.parent)
        needed = (len(self.samples) - self.done) * self._image_bytes
        if needed > shutil.disk_usage(parent).free:
            raise MoceError(f"the images take {needed / 1e9:.1f} GB, more than is free in {parent}")

    def _decoded(self, workers: int) -> Generator[tuple[int, np.ndarray, list[str | None]]]:
        """First image, pixels and reasons of every chunk; the next one is decoded meanwhile."""
        chunks: deque[tuple[int, np.ndarray]] = deque()

        def jobs() -> Iterator[Callable[[], str | None]]:
            for start in range(self.done, len(self.samples), self._size):
                samples = self.samples[start : start + self._size]
                chunks.append((start, np.empty((len(samples), *self.shape), np.uint8)))
                for row, sample in enumerate(samples):
                    yield partial(decode_into, chunks[-1][1], row, sample)

        with closing(run_ahead(jobs(), workers, self._size)) as results:
            while reasons := list(islice(results, self._size)):
                yield *chunks.popleft(), reasons

    def _write(
        self, file: Any, start: int, pixels: np.ndarray, reasons: list[str | None]
    ) -> dict[str, Any]:
        """Append the readable images; returns the journal's line, for when they are on disk."""
        good = [row for row, reason in enumerate(reasons) if reason is None]
        content = pixels if len(good) == len(pixels) else pixels[good]
        file.write(content.data)
        _sync(file)
        skipped = [[start + row, reason] for row, reason in enumerate(reasons) if reason]
        return {
            "entries": len(reasons),
            "images": len(good),
            "crc32": zlib.crc32(content.data),
            "skipped": skipped,
        }

    def finish(self) -> Packed:
        """Write index and header, and rename the file. Raises MoceError if no image was readable."""
        skipped = dict(pair for row in self._rows for pair in row["skipped"])
        kept = [sample for row, sample in enumerate(self.samples) if row not in skipped]
        if not kept:
            self.discard()
            raise MoceError(f"no readable image; the first one: {skipped[0]}")
        index = {
            "ids": [sample.id for sample in kept],
            "labels": [sample.label for sample in kept],
            "splits": [sample.split for sample in kept],
            "skipped": [[self.samples[row].id, reason] for row, reason in skipped.items()],
            "chunks": [[row["images"], row["crc32"]] for row in self._rows if row["images"]],
        }
        content = json.dumps(index).encode()
        with self._partial.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(content)
            file.seek(0)
            file.write(header_block((len(kept), *self.shape), content, f"moce {version('moce')}"))
            _sync(file)
        self._partial.replace(self.out)
        self._journal.unlink()
        return open_packed(self.out)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
