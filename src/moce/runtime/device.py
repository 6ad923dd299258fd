"""Device and precision of a run, and host-to-device copies."""

from __future__ import annotations

import atexit
import os
import time
from functools import lru_cache

import torch
from torch import Tensor

from moce.errors import MoceError
from moce.runtime.distributed import destroy_process_group, run_on_rank0
from moce.runtime.fabric import open_fabric
from moce.runtime.launch import ALONE, launch

MATMUL_SIZE = 1024
MAX_SECONDS = 0.5  # a product that takes longer is not repeated
BF16_GAIN = 1.3  # choose bf16 if its matrix products are this much faster than float32's


def resolve_device(wanted: str) -> torch.device:
    """The torch device for auto (CUDA, MPS, else CPU), cpu, cuda or mps. Raises MoceError if absent."""
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[wanted]:
        raise MoceError(f"device '{wanted}' is not available here; use --device auto")
    return torch.device(wanted) if launch() is ALONE else _own_device(wanted)


def _own_device(kind: str) -> torch.device:
    """The device of one of several processes: every process of a node has its own GPU."""
    if kind == "cpu":
        return torch.device("cpu")
    local, devices = launch().local, torch.cuda.device_count() if kind == "cuda" else 1
    if kind == "cuda" and devices == 1 and _has_own_gpu(local):
        return torch.device(kind, 0)
    if local > devices:
        slurm = ", give the node more (--gpus-per-node), let all see them (--gpu-bind=none)"
        raise MoceError(
            f"{local} processes on a node with {devices} {kind} devices; start as many processes as "
            f"there are devices{slurm if launch().by == 'srun' else ''}, or add --device cpu"
        )
    return torch.device(kind, launch().local_rank)


def _has_own_gpu(local: int) -> bool:
    """Whether Slurm gave each process a GPU of its own, the only one it sees (--gpus-per-task=1)."""
    if launch().by != "srun":
        return False
    return int(os.environ.get("SLURM_GPUS_ON_NODE", local)) >= local


def resolve_precision(wanted: str, device: torch.device) -> str:
    """float32 or bf16; auto: bf16 where a CUDA device supports it or a CPU is measured to be faster."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "mps":
        return "float32"
    return _cpu_precision(torch.get_num_threads())


@lru_cache
def _cpu_precision(threads: int) -> str:
    """Measured once per number of threads; takes a few tenths of a second at most."""
    for size in (128, MATMUL_SIZE):  # small first: emulated bf16 would take seconds at full size
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
    """Speed of a square float matrix product in FLOP/s, the best of a few."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        if best > MAX_SECONDS:
            break
    return 2 * size**3 / best


def prepare(
    seed: int, device: str, precision: str, threads: int | None
) -> tuple[torch.device, str]:
    """Set threads and seed, and connect the processes; (device, precision), the same on all ranks."""
    if threads is not None:  # else torch's choice: OMP_NUM_THREADS, or all cores
        torch.set_num_threads(threads)
    elif launch() is not ALONE and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // launch().local))
    resolved = resolve_device(device)
    if launch() is not ALONE:
        open_fabric(resolved, "float32")
        atexit.register(destroy_process_group)
    dtype = run_on_rank0(lambda: resolve_precision(precision, resolved))
    # Last: the measurement draws random numbers, and how many depends on the clock.
    torch.manual_seed(seed)
    return resolved, dtype


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of networks outside training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# Share of a GPU's free memory that cached data may take. Small, because gradients, AdamW's averages
# and activations, the largest, are allocated later.
CACHE_SHARE = 0.25


def fits_on(device: torch.device, num_bytes: int) -> bool:
    """Whether data of `num_bytes` may be cached on a device: on CUDA devices with enough free memory."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= CACHE_SHARE * free


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; the copy to a CUDA device is asynchronous."""
    if device.type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def bincount(numbers: Tensor, count: int) -> Tensor:
    """How often 0 .. count - 1 occur in `numbers` [m] int64: [count] int64.

    Unlike torch.bincount it does not synchronize with a CUDA device.
    """
    if numbers.device.type == "cpu":
        return numbers.bincount(minlength=count)
    return (numbers[:, None] == torch.arange(count, device=numbers.device)).sum(dim=0)
