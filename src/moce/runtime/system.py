"""CPU cores, memory and disk space of this machine, cgroup limits included."""

from __future__ import annotations

import math
import os
import platform
import shutil
from pathlib import Path

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")
UNKNOWN_MEMORY = 4 * 2**30  # bytes, where the system does not report it
# By cgroup version: files of the memory limit and usage, and the statistic of reclaimable cache.
MEMORY_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def usable_cores() -> int:
    """Cores this process may run on (its CPU affinity)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_limit(root: Path = CGROUPS) -> float | None:
    """CPU time limit of this container, in cores; None without a limit.

    From cgroups, version 2 (cpu.max) or 1 (cpu.cfs_quota_us).
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
    """Number of useful compute threads: the cores, or the container's limit."""
    limit = cpu_limit()
    return max(1, min(usable_cores(), math.ceil(limit) if limit else usable_cores()))


def free_memory(root: Path = CGROUPS, proc: Path = PROC) -> int:
    """Bytes of memory that can be allocated before the system or a container kills this process.

    Page cache counts as free, as the system reclaims it. Of nested limits (Slurm jobs inside a
    container) the tightest counts.
    """
    left = (_remaining(folder, version) for folder, version in _memory_groups(root, proc))
    return max(0, min([_available(proc), *(size for size in left if size is not None)]))


def _available(proc: Path) -> int:
    """Available bytes of the whole machine; without /proc, unused bytes, page cache excluded."""
    available = _field(_read(proc / "meminfo"), "MemAvailable:")
    if available is not None:
        return available * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return UNKNOWN_MEMORY


def _memory_groups(root: Path, proc: Path) -> list[tuple[Path, int]]:
    """The folders of this process's cgroup and its parents, with the cgroup version.

    In a container its own group is the root, whatever /proc calls it.
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


def _remaining(group: Path, version: int) -> int | None:
    """Bytes left to one cgroup; None without a limit."""
    limit, used, inactive = MEMORY_FILES[version]
    try:
        left = int(_read(group / limit)) - int(_read(group / used))
    except ValueError:  # "max", or no such files
        return None
    return left + (_field(_read(group / "memory.stat"), inactive) or 0)


def _field(text: str, name: str) -> int | None:
    """The number after `name` in a text of lines "name number"."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as the system reports it."""
    for line in _read(info).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def existing(path: Path) -> Path:
    """The path if it exists, else its nearest existing parent."""
    path = path.absolute()
    while not os.path.exists(path):  # noqa: PTH110 - pathlib's raises for names that are too long
        path = path.parent
    return path


def disk_free(path: Path) -> int:
    """Free bytes on the disk of a path that may not exist yet."""
    return shutil.disk_usage(existing(path)).free


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
