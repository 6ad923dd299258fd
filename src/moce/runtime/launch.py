"""Rank and world size from torchrun or Slurm's srun, read from the environment.

Does not import torch, so that it is known before anything heavy is imported.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from moce.errors import MoceError


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    world_size: processes of the run; rank: number of this one; local: processes on each node;
    local_rank: number on its node; node: number of the node; by: torchrun, srun, or "" (alone).
    """

    world_size: int
    rank: int
    local: int
    local_rank: int
    node: int
    by: str


ALONE = Launch(1, 0, 1, 0, 0, "")
# By launcher: a variable that only it sets, and the variables of the fields of `Launch`.
LAUNCHERS = {
    "torchrun": (
        "TORCHELASTIC_RUN_ID",
        ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"),
    ),
    # Without srun a Slurm script has no step and is one process, whatever SLURM_NTASKS is.
    "srun": (
        "SLURM_STEP_ID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "", "SLURM_LOCALID", "SLURM_NODEID"),
    ),
}


@lru_cache
def launch() -> Launch:
    """How this process was started. Raises MoceError if nodes differ in their number of processes."""
    for by, (variable, names) in LAUNCHERS.items():
        if variable in os.environ:
            world_size, rank, local, local_rank, node = (int(os.environ.get(n, 0)) for n in names)
            if world_size > 1:
                return Launch(
                    world_size, rank, local or _per_node(world_size), local_rank, node, by
                )
            return ALONE
    return ALONE


def _per_node(world_size: int) -> int:
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    if world_size % nodes:
        raise MoceError(
            f"{world_size} processes on {nodes} nodes: give every node as many (srun --ntasks-per-node)"
        )
    return world_size // nodes


def is_rank0() -> bool:
    """Whether this process writes files and messages; known before the process group is open."""
    return launch().rank == 0


def leave(status: int) -> NoReturn:
    """End this process at once: closing the process group could hang if another process is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first_to_fail() -> bool:
    """Whether no other process of the run has failed before this one: only the first reports why.

    The others fail because it is gone, or for the same reason. Uses a counter in the store of the
    process group; if the store cannot be reached, True on rank 0.
    """
    if launch() is ALONE:
        return True
    from datetime import timedelta

    from torch.distributed import TCPStore

    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"moce/failed/{attempt}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return is_rank0()
