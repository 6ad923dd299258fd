"""Several processes of one run: which one this is, and sums over all. One process: all of it is free.

torchrun (or Slurm) starts the processes; Lightning Fabric opens the group (hardware.py). What is
on the CPU goes by gloo, what is on accelerators by nccl.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moce.runtime.launch import launch, launched_as_rank0

T = TypeVar("T")


def world_size() -> int:
    """How many processes share this run."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Which of them this is, 0 .. world() - 1."""
    return dist.get_rank() if _is_distributed() else 0


def is_rank0() -> bool:
    """Whether this process is the one that writes files and talks; known before the group is open."""
    return launched_as_rank0()


def is_local_rank0() -> bool:
    """Whether this process is the one of its node that does what is to be done once a node."""
    return launch().local_rank == 0


def all_reduce(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place; any shape and type, the same everywhere."""
    if _is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_autograd(values: Tensor) -> Tensor:
    """`values` summed over all processes, as a new tensor that gradients pass through."""
    return _AllReduce.apply(values) if _is_distributed() else values


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_reduce(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce(gradients[0].clone())


def barrier() -> None:
    """Return when every process has come here."""
    all_reduce(torch.zeros(()))


def run_on_rank0(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, which alone calls it; for small plain values."""
    if not _is_distributed():
        return make()
    held: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(held)
    return held[0]


def run_on_local_rank0(make: Callable[[], T]) -> T:
    """What `make` returns in the first process of each node, which alone calls it."""
    if not _is_distributed():
        return make()
    mine = (launch().node, is_local_rank0(), make() if is_local_rank0() else None)
    everyones: list[Any] = [None] * world_size()
    dist.all_gather_object(everyones, mine)
    return next(value for node, first, value in everyones if first and node == mine[0])


def shard_range(count: int) -> slice:
    """This process's part of `count` things in their order; the parts differ by at most one."""
    here, of = rank(), world_size()
    return slice(count * here // of, count * (here + 1) // of)


def destroy_process_group() -> None:
    """Take leave of the other processes, at the end of the program."""
    if _is_distributed():
        dist.destroy_process_group()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def agreed_signal(received: signal.Signals | None) -> signal.Signals | None:
    """A signal if any process has received one, so that all stop after the same step."""
    if world_size() == 1:
        return received
    anyone = int(all_reduce(torch.tensor(int(received is not None)))) > 0
    return received or (signal.SIGTERM if anyone else None)
