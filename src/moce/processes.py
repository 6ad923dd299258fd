"""Several processes of one run: which one this is, and sums over all. One process: all of it is free.

torchrun (or Slurm) starts the processes; Lightning Fabric opens the group (hardware.py).
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """How many processes share this run."""
    return dist.get_world_size() if _grouped() else 1


def rank() -> int:
    """Which of them this is, 0 .. world() - 1."""
    return dist.get_rank() if _grouped() else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and talks."""
    return rank() == 0


def all_sum(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place; any shape and type, the same everywhere."""
    if _grouped():
        dist.all_reduce(values)
    return values


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _grouped():
        dist.barrier()


def own_share(count: int) -> slice:
    """This process's part of `count` things in their order; the parts differ by at most one."""
    here, of = rank(), world()
    return slice(count * here // of, count * (here + 1) // of)


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
