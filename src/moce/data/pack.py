"""Writing a packed file (see `packed`): decoded in parallel, in order, with a journal to resume from.

Beside FILE grow FILE.partial, the pixels of the readable images in their order, and FILE.journal,
one JSON line for every chunk of images that is safely in it. A stopped pack reads the journal, cuts
off whatever came after its last line and goes on; the result is the same to the byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moce.data.load import decode_into
from moce.data.readers.factory import Sample
from moce.data.readers.packed import HEADER_BYTES, Packed, header_block, open_packed
from moce.errors import MoceError
from moce.runs.files import make_folder, read_lines, write_text
from moce.runtime.system import worker_threads

CHUNK_BYTES, MOST_IN_CHUNK = 2**25, 1024  # of pixels decoded, written and journaled together
Reasons = list[str | None]


@dataclass
class Chunk:
    """Progress: entries dealt with by this chunk, and how many of them could not be read."""

    samples: int
    skipped: int


class Packer:
    """One packed file in the making: iterate over `chunks`, then call `finish`."""

    def __init__(self, out: Path, samples: list[Sample], shape: tuple[int, int, int]) -> None:
        """shape: (channels, height, width) of the packed images."""
        self.out, self.samples, self.shape = out, samples, shape
        self._partial = out.with_name(f"{out.name}.partial")
        self._journal = out.with_name(f"{out.name}.journal")
        self._image_bytes = int(np.prod(shape))
        self._size = max(1, min(MOST_IN_CHUNK, CHUNK_BYTES // self._image_bytes))
        self._job = {"job": self._fingerprint(), "shape": list(shape)}
        self._rows: list[dict[str, Any]] = []

    @property
    def done(self) -> int:
        """Entries dealt with so far."""
        return sum(row["entries"] for row in self._rows)

    def _fingerprint(self) -> str:
        names = [(sample.id, sample.label, sample.split) for sample in self.samples]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()

    def resume(self) -> int:
        """Take up what an earlier, interrupted pack left; the number of entries it had dealt with.

        Raises MoceError if that was of other images or another size.
        """
        lines = read_lines(self._journal) if self._partial.is_file() else []
        if not lines:
            return 0
        if lines[0] != self._job:
            raise MoceError(
                f"{self._partial} was begun with other images or another size; add --overwrite to "
                "begin anew, or choose another file"
            )
        rows = lines[1:]
        whole = all({"entries", "images", "crc32", "skipped"} <= row.keys() for row in rows)
        self._rows = rows if whole else []
        if self._partial.stat().st_size < self._end():
            self._rows = []
        return self.done

    def discard(self) -> None:
        """Remove what an interrupted pack left."""
        self._partial.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    def chunks(self, workers: int | None = None) -> Generator[Chunk]:
        """Decode, write and journal the rest; closing the iterator leaves a state to resume from."""
        self._check_room()
        make_folder(self.out.parent)
        # The journal is written anew: its last line may have been cut short.
        write_text(self._journal, "".join(map(_line, [self._job, *self._rows])))
        with (
            self._partial.open("r+b" if self._rows else "wb") as pixels,
            self._journal.open("a", encoding="utf-8") as journal,
        ):
            pixels.truncate(self._end())
            pixels.seek(0, os.SEEK_END)
            for start, decoded, reasons in self._decoded(workers or worker_threads()):
                row = self._write(pixels, start, decoded, reasons)
                journal.write(_line(row))
                _to_disk(journal)
                self._rows.append(row)
                yield Chunk(row["entries"], len(row["skipped"]))

    def _end(self) -> int:
        """Where the pixels written so far end."""
        images = sum(row["images"] for row in self._rows)
        return HEADER_BYTES + images * self._image_bytes

    def _check_room(self) -> None:
        parent = next(folder for folder in self.out.absolute().parents if folder.is_dir())
        needed = (len(self.samples) - self.done) * self._image_bytes
        if needed > shutil.disk_usage(parent).free:
            raise MoceError(f"the images take {needed / 1e9:.1f} GB, more than is free in {parent}")

    def _decoded(self, workers: int) -> Iterator[tuple[int, np.ndarray, Reasons]]:
        """Start, pixels and reasons of every chunk; the next one is decoded meanwhile."""
        with ThreadPoolExecutor(workers) as pool:
            ahead: list[tuple[int, np.ndarray, list[Future[str | None]]]] = []
            try:
                for start in range(self.done, len(self.samples), self._size):
                    part = self.samples[start : start + self._size]
                    pixels = np.empty((len(part), *self.shape), np.uint8)
                    jobs = [
                        pool.submit(decode_into, pixels, row, sample)
                        for row, sample in enumerate(part)
                    ]
                    ahead.append((start, pixels, jobs))
                    if len(ahead) > 1:
                        yield _finished(*ahead.pop(0))
                for chunk in ahead:
                    yield _finished(*chunk)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _write(self, file: Any, start: int, pixels: np.ndarray, reasons: Reasons) -> dict[str, Any]:
        """Append the good images; the journal's line, to be written when they are on the disk."""
        good = [row for row, reason in enumerate(reasons) if reason is None]
        content = pixels if len(good) == len(pixels) else pixels[good]
        file.write(content.data)
        _to_disk(file)
        skipped = [[start + row, reason] for row, reason in enumerate(reasons) if reason]
        return {
            "entries": len(reasons),
            "images": len(good),
            "crc32": zlib.crc32(content.data),
            "skipped": skipped,
        }

    def finish(self) -> Packed:
        """Write index and header, and give the file its name. Raises MoceError if no image was readable."""
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
            _to_disk(file)
        self._partial.replace(self.out)
        self._journal.unlink()
        return open_packed(self.out)


def _finished(
    start: int, pixels: np.ndarray, jobs: list[Future[str | None]]
) -> tuple[int, np.ndarray, Reasons]:
    return start, pixels, [job.result() for job in jobs]


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
