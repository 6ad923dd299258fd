"""Blocks of remote files on the local disk, for all processes of a machine; the oldest are removed.

MOCE_CACHE is the folder (default: ~/.cache/moce/remote), MOCE_CACHE_GB how much it may hold (default:
half of what is free on its disk).
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from moce.config import expand
from moce.data.readers.storage import read_exactly
from moce.errors import MoceError
from moce.runs.files import atomic, make_folder
from moce.runtime.system import existing

BLOCK = 2**22  # bytes
GIGABYTE = 10**9
KEPT = 0.9  # of the limit, after the oldest blocks are removed
STRIPES = 64  # locks


class BlockCache:
    """Keeps blocks by key and number. A block is fetched by one thread, while others wait for it."""

    def __init__(self, folder: Path, limit: int) -> None:
        """limit: bytes."""
        self.folder, self.limit = folder, limit
        self.locks = [threading.Lock() for _ in range(STRIPES)]
        self._added: int | None = None  # bytes since the folder was last measured

    def read(
        self, key: str, number: int, start: int, size: int, fetch: Callable[[], bytes]
    ) -> bytes:
        """`size` bytes from `start` of a block, which `fetch` returns if it is not kept."""
        path = self.folder / key[:2] / f"{key}-{number}"
        with self.locks[hash((key, number)) % STRIPES]:
            with suppress(OSError, EOFError), path.open("rb", buffering=0) as file:
                file.seek(start)
                return read_exactly(file, size)
            content = fetch()
            self._keep(path, content)
            return content[start : start + size]

    def _keep(self, path: Path, content: bytes) -> None:
        """Write a block. A cache that cannot be written to, as on a full disk, keeps nothing."""
        with suppress(MoceError, OSError):
            self._make_room(len(content))
            make_folder(path.parent)
            with atomic(path) as temporary:
                temporary.write_bytes(content)

    def _make_room(self, size: int) -> None:
        """Remove the oldest blocks if the limit is reached."""
        if self._added is None or self._added + size > self.limit:
            self._added = self._shrink(self.limit - size)
        self._added += size

    def _shrink(self, limit: int) -> int:
        """Bytes that are kept; others are removed, the oldest first. Other processes do the same."""
        found = []
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= limit:
            return total
        for _, size, path in sorted(found):
            if total <= KEPT * limit:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


@lru_cache(maxsize=1)
def _open(folder: str, gigabytes: str | None) -> BlockCache:
    path = expand(Path(folder))
    if gigabytes is None:
        return BlockCache(path, shutil.disk_usage(existing(path)).free // 2)
    try:
        return BlockCache(path, int(float(gigabytes) * GIGABYTE))
    except (ValueError, OverflowError):
        raise MoceError(f"MOCE_CACHE_GB is {gigabytes}: give a number of gigabytes") from None


def block_cache() -> BlockCache:
    """The cache that the environment names."""
    folder = os.environ.get("MOCE_CACHE") or "~/.cache/moce/remote"
    return _open(folder, os.environ.get("MOCE_CACHE_GB"))


# A forked child has none of the threads that may hold a lock.
os.register_at_fork(after_in_child=_open.cache_clear)
