"""Where to compute and in what precision, decided once per run and recorded in its config."""

from __future__ import annotations

import logging
import time
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from moce.config import RuntimeSettings
from moce.errors import MoceError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MATMUL_SIZE = 1024
LONG = 0.5  # seconds of one product, after which it is not repeated
BF16_GAIN = 1.3  # bf16 is taken if its matrix products are this much faster than float32's


def resolve_device(wanted: str) -> torch.device:
    """The device of a setting (auto: the first accelerator, else the CPU). Raises MoceError if absent."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": _has_mps()}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[wanted]:
        raise MoceError(f"device '{wanted}' is not available here; use --device auto")
    return torch.device(wanted)


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def resolve_precision(wanted: str, device: torch.device) -> str:
    """float32 or bf16; auto measures on CPUs and asks CUDA devices."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "mps":
        return "float32"
    return _cpu_precision(torch.get_num_threads())


@lru_cache
def _cpu_precision(threads: int) -> str:
    """Measured once per number of threads: at most some tenths of a second, also without bf16 units."""
    for size in (128, MATMUL_SIZE):  # bf16 in software would take seconds at full size
        bf16, float32 = (
            matmul_rate(torch.device("cpu"), dtype, size)
            for dtype in (torch.bfloat16, torch.float32)
        )
        if bf16 < float32 / 2:
            return "float32"
    return "bf16" if bf16 >= BF16_GAIN * float32 else "float32"


def matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int = MATMUL_SIZE, repeats: int = 5
) -> float:
    """Best of a few square matrix products, in FLOP/s."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        if best > LONG:
            break
    return 2 * size**3 / best


def prepare(settings: RuntimeSettings) -> tuple[torch.device, str]:
    """Set threads and seed; (device, precision) of the settings, resolved."""
    if settings.threads is not None:  # else torch's choice: OMP_NUM_THREADS, or all cores
        torch.set_num_threads(settings.threads)
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    # Last: measuring draws random numbers, how many depends on the clock.
    torch.manual_seed(settings.seed)
    return device, precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks run outside training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def open_fabric(device: torch.device, precision: str) -> Fabric:
    """Lightning Fabric for the training loop (imported here: it takes seconds)."""
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=device.type,
        devices=1,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    fabric.launch()
    return fabric
