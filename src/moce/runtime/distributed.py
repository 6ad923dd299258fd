"""Communication between the processes of a run; with one process all of it is a no-op.

torchrun or Slurm starts the processes, and Lightning Fabric opens the process group (fabric.py).
CPU tensors go through gloo, those on accelerators through nccl.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moce.runtime.launch import launch

T = TypeVar("T")


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Number of this process, 0 .. world_size() - 1."""
    return dist.get_rank() if _is_distributed() else 0


def all_reduce(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place. Shape and dtype must be the same in all."""
    if _is_distributed():
        dist.all_reduce(values)
    return values


def all_reduce_autograd(values: Tensor) -> Tensor:
    """`values` summed over all processes, as a new tensor with gradients."""
    return _AllReduce.apply(values) if _is_distributed() else values


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return all_reduce(values.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce(gradients[0].clone())


def broadcast(values: Tensor) -> Tensor:
    """Set `values` to those of rank 0, in place. Shape and dtype must be the same in all processes."""
    if _is_distributed():
        dist.broadcast(values, 0)
    return values


def barrier() -> None:
    """Wait until all processes have reached this call."""
    all_reduce(torch.zeros(()))


def run_on_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 only and return its result, a small picklable value, in all processes."""
    if not _is_distributed():
        return make()
    result: list[Any] = [make() if rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


def run_on_local_rank0(make: Callable[[], T]) -> T:
    """Call `make` in the first process of each node and return its result in all of that node."""
    if not _is_distributed():
        return make()
    first = launch().local_rank == 0
    own = (launch().node, first, make() if first else None)
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, own)
    return next(value for node, first, value in gathered if first and node == own[0])


def all_gather(value: T) -> list[T]:
    """A picklable value of every process, in the order of their ranks, in all processes."""
    if not _is_distributed():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_gather_rows(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The rows of every process, [counts[r], ...] on the CPU, in the order of their ranks, in all of them.

    values: [counts[rank()], ...]; the other dimensions are the same in all processes.
    """
    if not _is_distributed():
        return [values]
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [rows[:count] for rows, count in zip(gathered, counts, strict=True)]


def shard_range(count: int) -> slice:
    """This process's slice of `count` items; sizes differ by at most one between processes."""
    own, size = rank(), world_size()
    return slice(count * own // size, count * (own + 1) // size)


def destroy_process_group() -> None:
    """Close the process group, at the end of the program."""
    if _is_distributed():
        dist.destroy_process_group()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def agreed_signal(received: signal.Signals | None) -> signal.Signals | None:
    """A signal if any process has received one, so that all processes stop after the same step."""
    if world_size() == 1:
        return received
    anyone = int(all_reduce(torch.tensor(int(received is not None)))) > 0
    return received or (signal.SIGTERM if anyone else None)
