"""moce doctor: what this machine offers, and what to mend."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from moce.config import DoctorSettings
from moce.hardware import BF16_GAIN, matmul_rate, resolve_device, resolve_precision

PACKAGES = (
    "moce",
    "torch",
    "torchvision",
    "timm",
    "lightning-fabric",
    "safetensors",
    "tensorboard",
)
LOW_DISK = 5e9  # bytes
BUSY = 0.9  # programs running on average in the last minute, before moce


@dataclass
class DoctorResult:
    """Rates in GFLOP/s, disk in GB; advice: what a user should mend, empty if nothing."""

    versions: dict[str, str]
    device: str
    device_name: str
    precision: str
    precision_reason: str
    threads: int
    cores: int
    matmul_float32: float
    matmul_bf16: float
    disk_free: float
    advice: list[str] = field(default_factory=list)

    def summary(self) -> str:
        rows = [
            *((name, number) for name, number in self.versions.items()),
            ("device", f"{self.device} ({self.device_name})"),
            ("precision", f"{self.precision}: {self.precision_reason}"),
            ("threads", f"{self.threads} of {self.cores} cores"),
            ("matmul float32", f"{self.matmul_float32:.0f} GFLOP/s"),
            ("matmul bf16", f"{self.matmul_bf16:.0f} GFLOP/s"),
            ("disk free", f"{self.disk_free:.0f} GB"),
        ]
        width = max(len(name) for name, _ in rows)
        advice = [f"mend: {line}" for line in self.advice] or ["nothing to mend"]
        return "\n".join([f"{name:<{width}}  {value}" for name, value in rows] + advice)


def run(settings: DoctorSettings) -> DoctorResult:
    device = resolve_device("auto")
    rates = [matmul_rate(device, kind) / 1e9 for kind in (torch.float32, torch.bfloat16)]
    result = DoctorResult(
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        device=device.type,
        device_name=_device_name(device),
        precision=resolve_precision("auto", device),
        precision_reason=_reason(device, rates[1] / rates[0]),
        threads=torch.get_num_threads(),
        cores=os.cpu_count() or 1,
        matmul_float32=rates[0],
        matmul_bf16=rates[1],
        disk_free=_disk_free(settings.out),
    )
    result.advice.extend(_advice(result))
    return result


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def _reason(device: torch.device, gain: float) -> str:
    if device.type == "cpu":
        return f"bf16 products are {gain:.1f} times as fast as float32 (taken from {BF16_GAIN})"
    return f"what the {device.type} device supports"


def _disk_free(path: Path) -> float:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free / 1e9


def _advice(result: DoctorResult) -> list[str]:
    advice = []
    if result.versions["tensorboard"] == "not installed":
        advice.append("for --tensorboard: pip install 'moce[tensorboard]'")
    if result.disk_free * 1e9 < LOW_DISK:
        advice.append("less than 5 GB of disk are free; checkpoints may not fit")
    if result.threads < result.cores and "OMP_NUM_THREADS" not in os.environ:
        advice.append(
            f"only {result.threads} of {result.cores} cores are used; set OMP_NUM_THREADS"
        )
    if result.device == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
        advice.append(
            "other programs are busy: training can become ten times slower; stop them, or set "
            "OMP_WAIT_POLICY=passive, which bears them better (and costs a third when alone)"
        )
    if result.device == "cpu" and shutil.which("nvidia-smi"):
        advice.append("there is an NVIDIA driver, but torch sees no device: is it a CPU build?")
    return advice
