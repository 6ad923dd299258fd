"""Where to compute and in what precision, decided once per run and recorded in its config."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from moce.config import RuntimeSettings
from moce.errors import MoceError
from moce.launch import ALONE, launch
from moce.processes import leave_group, of_main
from moce.sharding import shard

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MATMUL_SIZE = 1024
LONG = 0.5  # seconds of one product, after which it is not repeated
# For another process, which may be decoding all images. One that has ended is noticed at once.
LONGEST_WAIT = timedelta(hours=6)
BF16_GAIN = 1.3  # bf16 is taken if its matrix products are this much faster than float32's


def resolve_device(wanted: str) -> torch.device:
    """The device of a setting (auto: the first accelerator, else the CPU). Raises MoceError if absent."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": _has_mps()}
    if wanted == "auto":
        wanted = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[wanted]:
        raise MoceError(f"device '{wanted}' is not available here; use --device auto")
    return torch.device(wanted) if launch() is ALONE else _own_device(wanted)


def _own_device(kind: str) -> torch.device:
    """The device of this process, one of several: each process of a node has one of its GPUs."""
    if kind == "cpu":
        return torch.device("cpu")
    local, devices = launch().local, torch.cuda.device_count() if kind == "cuda" else 1
    if kind == "cuda" and devices == 1 and _bound(local):
        return torch.device(kind, 0)
    if local > devices:
        slurm = ", give the node more (--gpus-per-node), let all see them (--gpu-bind=none)"
        raise MoceError(
            f"{local} processes on a node with {devices} {kind} devices; start as many processes as "
            f"there are devices{slurm if launch().by == 'srun' else ''}, or add --device cpu"
        )
    return torch.device(kind, launch().local_rank)


def _bound(local: int) -> bool:
    """Whether Slurm has left each process a GPU of its own, all it sees (--gpus-per-task=1)."""
    if launch().by != "srun":
        return False
    return int(os.environ.get("SLURM_GPUS_ON_NODE", local)) >= local


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
    """Set threads and seed, and meet the other processes; (device, precision), resolved alike in all."""
    if settings.threads is not None:  # else torch's choice: OMP_NUM_THREADS, or all cores
        torch.set_num_threads(settings.threads)
    elif launch() is not ALONE and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // launch().local))
    device = resolve_device(settings.device)
    if launch() is not ALONE:
        open_fabric(device, "float32")
        atexit.register(leave_group)
    precision = of_main(lambda: resolve_precision(settings.precision, device))
    # Last: measuring draws random numbers, how many depends on the clock.
    torch.manual_seed(settings.seed)
    return device, precision


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks run outside training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def open_fabric(device: torch.device, precision: str, strategy: str = "ddp") -> Fabric:
    """Lightning Fabric (imported here: it takes seconds); the first call opens the group of processes.

    strategy: with several processes, what each holds: ddp, all of the module, or fsdp, a share of it.
    """
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=device.type,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        devices=1,
        **({} if launch() is ALONE else _shared_by_all(device, strategy)),
    )
    fabric.launch()
    return fabric


def _shared_by_all(device: torch.device, strategy: str) -> dict[str, Any]:
    """What Fabric is to know of several processes."""
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy

    started = launch()
    # Sums of what is on the CPU go by gloo, beside nccl.
    group: dict[str, Any] = {
        "process_group_backend": "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        "timeout": LONGEST_WAIT,
    }
    strategies: dict[str, Callable[[], Strategy]] = {
        "ddp": lambda: DDPStrategy(broadcast_buffers=False, **group),
        "fsdp": lambda: ModelParallelStrategy(
            shard, data_parallel_size=started.world, tensor_parallel_size=1, **group
        ),
    }
    by = {"torchrun": TorchElasticEnvironment, "srun": SLURMEnvironment}
    chosen: Any = strategies[strategy]()
    # Fabric looks up a process's device at its place on the node. Here every process says which is
    # its own: where each sees one GPU only, all of them are called cuda:0.
    chosen.parallel_devices = [device] * started.local
    try:
        environment = by[started.by]()
    except RuntimeError as error:  # Slurm's settings are not as Fabric needs them
        raise MoceError(" ".join(str(error).split())) from None
    return {
        "num_nodes": started.world // started.local,
        "strategy": chosen,
        "plugins": [environment],
    }
