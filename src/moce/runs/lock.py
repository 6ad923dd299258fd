"""One writer per output folder (flock).

The lock is flock on the folder: it ends with the process and leaves no file. It does nothing on
systems without flock.
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

_locked: dict[Path, int] = {}  # folders that this process has locked: open file descriptors


def lock_folder(path: Path) -> None:
    """Lock an output folder for this process. Raises MoceError if another process writes to it."""
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
    except OSError:  # some network file systems do not support locks
        os.close(descriptor)
        return
    _locked[path.resolve()] = descriptor


def _drop_inherited_locks() -> None:
    """In a forked process: it would keep the locks of a parent that is gone, for as long as it lives."""
    for descriptor in _locked.values():
        os.close(descriptor)
    _locked.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_inherited_locks)


@contextmanager
def locks_released() -> Iterator[None]:
    """Release the locks taken within the context at its end."""
    before = set(_locked)
    try:
        yield
    finally:
        for path in set(_locked) - before:
            os.close(_locked.pop(path))
