"""One process writes to an output folder at a time.

The lock is the system's own (flock on the folder): it ends with the process, leaves no file, and
does nothing where there is no such lock.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moce.errors import MoceError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_locked: dict[Path, int] = {}  # folders this process writes to, and their open descriptors


def lock_folder(path: Path) -> None:
    """Keep other processes out of an output folder. Raises MoceError if one is writing to it."""
    if fcntl is None or path.resolve() in _locked:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise MoceError(
            f"another process is writing to {path}; wait for it, or choose another output folder"
        ) from None
    except OSError:  # some network file systems know no locks
        os.close(descriptor)
        return
    _locked[path.resolve()] = descriptor


@contextmanager
def locks_released() -> Iterator[None]:
    """Folders claimed within the context are free again after it."""
    before = set(_locked)
    try:
        yield
    finally:
        for path in set(_locked) - before:
            os.close(_locked.pop(path))
