"""Images found to be unreadable while training: counted, listed, and fatal if they are too many."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path

from moce.data.dataset import ImageDataset
from moce.errors import MoceError
from moce.runs.model import read_skipped, write_skipped
from moce.runtime.distributed import all_gather
from moce.runtime.launch import is_rank0
from moce.runtime.progress import log

SHOWN = 5  # images


class UnreadableImages:
    """Of one run. found: the reason by row, of what this process has met."""

    def __init__(self, images: Sized, folder: Path) -> None:
        """images: only those of an `ImageDataset` can be unreadable."""
        self._folder, self._count = folder, len(images)
        self._ids: Sequence[str] = images.ids if isinstance(images, ImageDataset) else ()
        originals = images.originals if isinstance(images, ImageDataset) else None
        self._most = (originals.max_skipped if originals else 1.0) * self._count
        self._listed = -1
        self.found: dict[int, str] = {}

    def report(self, unreadable: list[tuple[int, str]]) -> None:
        """Remember images, by (row, reason), and log the first. Raises MoceError if too many."""
        for row, reason in unreadable:
            if row in self.found:
                continue
            self.found[row] = reason
            if len(self.found) <= SHOWN:
                name = self._ids[row]
                log(f"cannot read {name} ({reason}): another image takes its place")
        self._check(self.found)

    def write(self) -> None:
        """Add what all processes have found to skipped.jsonl. Raises MoceError if it is too many."""
        found: dict[int, str] = {}
        for part in all_gather(self.found):
            found |= part
        self._check(found)
        if len(found) > max(0, self._listed) and is_rank0():
            names = {self._ids[row]: reason for row, reason in sorted(found.items())}
            write_skipped(
                self._folder, list((dict(read_skipped(self._folder)) | names).items()), log
            )
        self._listed = len(found)

    def _check(self, found: dict[int, str]) -> None:
        if len(found) > self._most:
            row, reason = next(iter(found.items()))
            raise MoceError(
                f"{len(found)} of {self._count} images cannot be read, more than --max-skipped "
                f"allows: {reason} (as {self._ids[row]})"
            )
