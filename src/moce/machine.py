"""What the operating system says of this machine: processors, their limits, and free disk space."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores this process may run on: fewer than there are, if it is bound to some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_limit(root: Path = CGROUPS) -> float | None:
    """Cores' worth of time that a container leaves to its processes; None without a limit.

    Read from cgroups, version 2 (cpu.max) or 1 (cpu.cfs_quota_us), as a container sees its own.
    """
    text = _read(root / "cpu.max").split()
    if len(text) != 2:
        text = [_read(root / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    try:
        quota, period = int(text[0]), int(text[1])
    except ValueError:  # "max", or no such files
        return None
    return quota / period if quota > 0 and period > 0 else None


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system has it."""
    for line in _read(info).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def existing(path: Path) -> Path:
    """A path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not os.path.exists(path):  # noqa: PTH110 - pathlib's raises for names that are too long
        path = path.parent
    return path


def disk_free(path: Path) -> int:
    """Free bytes where a path is, or would be."""
    return shutil.disk_usage(existing(path)).free


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
