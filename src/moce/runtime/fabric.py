"""Lightning Fabric with DDP or FSDP2."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from moce.errors import MoceError
from moce.runtime.fsdp import shard
from moce.runtime.launch import ALONE, launch

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# For another process, which may be decoding all images. One that has ended is noticed at once.
LONGEST_WAIT = timedelta(hours=6)


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
            shard, data_parallel_size=started.world_size, tensor_parallel_size=1, **group
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
        "num_nodes": started.world_size // started.local,
        "strategy": chosen,
        "plugins": [environment],
    }
