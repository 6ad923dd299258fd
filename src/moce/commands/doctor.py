"""moce doctor: check this machine, and list anything to fix."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement

from moce.config import DoctorSettings
from moce.runtime.device import matmul_rate, resolve_device, resolve_precision
from moce.runtime.system import cpu_limit, cpu_name, disk_free, existing, usable_cores

LOW_DISK = 5e9  # bytes
BUSY = 0.9  # programs running on average in the last minute, before moce
NOT_FOR_USERS = frozenset({"dev"})  # extras


@dataclass
class DoctorResult:
    """Rates are in GFLOP/s, disk space in GB.

    unusable: why moce cannot run here; advice: what could be better; extras: by extra, the packages
    that are not installed; cpu_limit: cores' worth of CPU time of a container, None without a limit.
    """

    versions: dict[str, str]
    extras: dict[str, list[str]]
    device: str
    devices: list[str]
    precision: str
    threads: int
    omp_num_threads: str | None
    cores: int
    usable_cores: int
    cpu_limit: float | None
    matmul_float32: float
    matmul_bf16: float
    disk: str
    disk_free: float
    unusable: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        return 1 if self.unusable else 0

    def summary(self) -> str:
        rows = [
            *self.versions.items(),
            *((f"extra {name}", _extra(name, missing)) for name, missing in self.extras.items()),
            ("devices", "; ".join(self.devices)),
            ("device used", self.device),
            ("precision", self.precision),
            ("threads", f"{self.threads} (OMP_NUM_THREADS is {self.omp_num_threads or 'not set'})"),
            (
                "cores",
                f"{self.usable_cores} of {self.cores} may be used, "
                f"{'no limit' if self.cpu_limit is None else f'a limit of {self.cpu_limit:g}'} by a container",
            ),
            ("matmul float32", f"{self.matmul_float32:.0f} GFLOP/s"),
            ("matmul bf16", f"{self.matmul_bf16:.0f} GFLOP/s"),
            ("free disk space", f"{self.disk_free:.0f} GB for {self.disk}"),
        ]
        width = max(len(name) for name, _ in rows)
        to_fix = [f"! {line}" for line in self.unusable] + [f"- {line}" for line in self.advice]
        to_fix = ["to fix:", *to_fix] if to_fix else ["nothing to fix"]
        return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), "", *to_fix])


def _extra(name: str, missing: list[str]) -> str:
    return f"missing {', '.join(missing)}: pip install 'moce[{name}]'" if missing else "installed"


def run(settings: DoctorSettings) -> DoctorResult:
    device = resolve_device("auto")
    rates = [matmul_rate(device, kind) / 1e9 for kind in (torch.float32, torch.bfloat16)]
    core = [r for r in _requirements() if r.marker is None]
    result = DoctorResult(
        versions={"python": platform.python_version(), "moce": _version("moce") or "not installed"}
        | {r.name: _version(r.name) or "not installed" for r in core},
        extras=_extras(),
        device=device.type,
        devices=_devices(),
        precision=resolve_precision("auto", device),
        threads=torch.get_num_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        cpu_limit=cpu_limit(),
        matmul_float32=rates[0],
        matmul_bf16=rates[1],
        disk=str(settings.out.absolute()),
        disk_free=disk_free(settings.out) / 1e9,
    )
    result.unusable += [*_unmet(core), *_unwritable(settings.out)]
    result.advice += [*_of_threads(result), *_of_the_rest(result)]
    return result


def _requirements() -> list[Requirement]:
    """The declared requirements of moce; those of extras have a marker."""
    return [Requirement(text) for text in requires("moce") or []]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_met(requirement: Requirement) -> bool:
    found = _version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def _extras() -> dict[str, list[str]]:
    """By extra, the packages that are not installed."""
    names = set(metadata("moce").get_all("Provides-Extra") or []) - NOT_FOR_USERS
    needs = _requirements()
    return {
        name: [
            r.name
            for r in needs
            if r.marker and r.marker.evaluate({"extra": name}) and not _is_met(r)
        ]
        for name in sorted(names)
    }


def _unmet(core: list[Requirement]) -> list[str]:
    return [
        f"{r.name} is {_version(r.name) or 'not installed'}, but moce needs {r.specifier}: "
        f"pip install -U '{r.name}{r.specifier}'"
        for r in core
        if not _is_met(r)
    ]


def _devices() -> list[str]:
    found = [f"cpu ({cpu_name()})"]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        found.append(f"cuda:{number} ({card.name}, {card.total_memory / 1e9:.0f} GB)")
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def _unwritable(out: Path) -> list[str]:
    place = existing(out)
    if not place.is_dir():
        return [f"{place} is a file, so {out.absolute()} cannot be created; choose another folder"]
    if not os.access(place, os.W_OK):
        return [f"{place} is not writable; choose another folder for runs"]
    return []


def _of_threads(result: DoctorResult) -> list[str]:
    """More threads than the cores or a container allow slow each other down."""
    room = min(result.usable_cores, result.cpu_limit or result.usable_cores)
    best = max(1, int(room))
    if result.threads > best:
        return [
            f"{result.threads} threads share {room:g} cores' worth of time: set OMP_NUM_THREADS={best}, "
            f"or use --threads {best}"
        ]
    if result.threads < best:
        return [
            f"only {result.threads} of {best} cores are used: add --threads {best} or change "
            "OMP_NUM_THREADS, unless other programs need the rest"
        ]
    return []


def _of_the_rest(result: DoctorResult) -> list[str]:
    advice = []
    if result.disk_free * 1e9 < LOW_DISK:
        advice.append("less than 5 GB of disk space is free; checkpoints may not fit")
    if result.device == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
        advice.append(
            "other programs keep the cores busy, which can make training ten times slower: stop them, "
            "or set OMP_WAIT_POLICY=passive, which is slowed down less (but takes a third longer alone)"
        )
    if result.device == "cpu" and shutil.which("nvidia-smi"):
        advice.append(
            "an NVIDIA driver is installed, but torch finds no GPU: is torch a build for CPUs?"
        )
    return advice
