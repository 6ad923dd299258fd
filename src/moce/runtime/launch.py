"""How this process was started: alone, or as one of several by torchrun or by Slurm's srun.

Read from the environment, without torch, so that it is known before anything heavy is imported.
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
    """world: processes of the run; local: those on each node; rank, local_rank and node: which this is."""

    world_size: int
    rank: int
    local: int
    local_rank: int
    node: int
    by: str


ALONE = Launch(1, 0, 1, 0, 0, "")
# By what has started the processes: a variable that it alone sets, and those that say the rest.
STARTERS = {
    "torchrun": (
        "TORCHELASTIC_RUN_ID",
        ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"),
    ),
    # Without srun, a Slurm script is one process, whatever SLURM_NTASKS says: it has no step.
    "srun": (
        "SLURM_STEP_ID",
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "", "SLURM_LOCALID", "SLURM_NODEID"),
    ),
}


@lru_cache
def launch() -> Launch:
    """How this process was started. Raises MoceError if the nodes have unlike numbers of processes."""
    for by, (sign, names) in STARTERS.items():
        if sign in os.environ:
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


def launched_as_rank0() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return launch().rank == 0


def leave(status: int) -> NoReturn:
    """End this process at once: to take leave of the others could take for ever, if one is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first_to_fail() -> bool:
    """Whether no other process of the run has failed before: only the first says why.

    The others fail because it is gone, or of the same mistake. Told by a counter in the store that
    the processes found each other by; True where it cannot be asked.
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
        return launched_as_rank0()
