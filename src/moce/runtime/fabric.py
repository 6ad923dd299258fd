"""Lightning Fabric: device, precision, and DDP or FSDP2 for several processes; one needs none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from moce.errors import MoceError
from moce.runtime.fsdp import shard
from moce.runtime.launch import ALONE, launch
from moce.runtime.single_process import SingleProcess

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Another process may be decoding all images meanwhile. One that has ended is noticed at once.
TIMEOUT = timedelta(hours=6)


def open_fabric(
    device: torch.device, precision: str, strategy: str = "ddp"
) -> Fabric | SingleProcess:
    """A launched Fabric (imported here, as that takes seconds); the first call opens the process group.

    A process alone gets its stand-in, which needs no import.
    precision: float32 or bf16; strategy, for several processes: ddp, each holds the whole model, or
    fsdp, each holds a shard. Raises MoceError if Slurm's settings do not fit.
    """
    if launch() is ALONE:
        return SingleProcess(device, precision)
    from lightning_fabric import Fabric

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=device.type,
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        devices=1,
        **_distributed_arguments(device, strategy),
    )
    fabric.launch()
    return fabric


def _distributed_arguments(device: torch.device, strategy: str) -> dict[str, Any]:
    """Arguments of Fabric for several processes."""
    from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy

    started = launch()
    # gloo beside nccl, for CPU tensors.
    group: dict[str, Any] = {
        "process_group_backend": "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        "timeout": TIMEOUT,
    }
    strategies: dict[str, Callable[[], Strategy]] = {
        "ddp": lambda: DDPStrategy(broadcast_buffers=False, **group),
        "fsdp": lambda: ModelParallelStrategy(
            shard, data_parallel_size=started.world_size, tensor_parallel_size=1, **group
        ),
    }
    by = {"torchrun": TorchElasticEnvironment, "srun": SLURMEnvironment}
    chosen: Any = strategies[strategy]()
    # Fabric takes a process's device by its local rank. Where each process sees one GPU only, all
    # are called cuda:0, so give every rank this process's own device.
    chosen.parallel_devices = [device] * started.local
    try:
        environment = by[started.by]()
    except RuntimeError as error:  # Slurm's settings do not fit
        raise MoceError(" ".join(str(error).split())) from None
    return {
        "num_nodes": started.world_size // started.local,
        "strategy": chosen,
        "plugins": [environment],
    }
