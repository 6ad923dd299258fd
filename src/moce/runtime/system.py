"""What the operating system says of this machine: processors, memory, their limits, disk space."""

from __future__ import annotations

import math
import os
import platform
import shutil
from pathlib import Path

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")
UNKNOWN_MEMORY = 4 * 2**30  # bytes, where the system does not tell
# What control groups call their memory's limit, its use, and the files in it that can be given up.
MEMORY_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


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


def worker_threads() -> int:
    """How many threads that compute are of use: the cores, or what a container leaves of them."""
    limit = cpu_limit()
    return max(1, min(usable_cores(), math.ceil(limit) if limit else usable_cores()))


def free_memory(root: Path = CGROUPS, proc: Path = PROC) -> int:
    """Bytes of memory that can be taken before the system or a container ends this process.

    The page cache counts as free, for the system gives it up; where limits are nested the tightest
    counts, as in jobs of Slurm inside a container.
    """
    rooms = (_room(folder, version) for folder, version in _memory_groups(root, proc))
    return max(0, min([_available(proc), *(room for room in rooms if room is not None)]))


def _available(proc: Path) -> int:
    """What the whole machine has; without /proc what is unused, which leaves out the cache."""
    available = _field(_read(proc / "meminfo"), "MemAvailable:")
    if available is not None:
        return available * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return UNKNOWN_MEMORY


def _memory_groups(root: Path, proc: Path) -> list[tuple[Path, int]]:
    """The folders of this process's control group and of those around it, with their version.

    A container sees its own group as the root, whatever /proc calls it.
    """
    folders = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, controllers, place = line.split(":", 2)
        if number == "0":
            top, version = root, 2
        elif "memory" in controllers.split(","):
            top, version = root / "memory", 1
        else:
            continue
        inner = top / place.strip("/")
        folders += [(f, version) for f in (inner, *inner.parents) if f.is_relative_to(top)]
    return folders or [(root, 2), (root / "memory", 1)]


def _room(group: Path, version: int) -> int | None:
    """What is left to one control group; None without a limit."""
    limit, used, inactive = MEMORY_FILES[version]
    try:
        room = int(_read(group / limit)) - int(_read(group / used))
    except ValueError:  # "max", or no such files
        return None
    return room + (_field(_read(group / "memory.stat"), inactive) or 0)


def _field(text: str, name: str) -> int | None:
    """The number behind a name, in a file of one name a line."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


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
