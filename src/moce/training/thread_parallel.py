"""A batch in parts on CPUs: each core takes whole parts, forward and backward.

Cores that share every operation wait for each other at each, and do nothing while Python is between two.
A part's tensors, which are small, stay in the cache, and what a backward pass needs is there for
the parts at hand only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from moce.runtime.threads import num_worker_threads, run_in_threads

Losses = dict[str, Tensor]
LossOfChunk = Callable[[nn.Module, slice], Losses]

PART = 2**18  # numbers in the tokens of a part: 1 MiB of float32


def chunks_of(count: int, size: int, thread_parallel: int) -> list[slice]:
    """A batch of `count` images in parts of about `size`, as many for each lane if there are enough."""
    number = -(-count // size)
    number = min(count, -(-number // thread_parallel) * thread_parallel)
    return [slice(i * count // number, (i + 1) * count // number) for i in range(number)]


def replica(module: nn.Module) -> nn.Module:
    """A copy of a module that has the same weights and buffers in memory, and gradients of its own."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad)
    return copy.deepcopy(module, memo)


def has_dropout(module: nn.Module) -> bool:
    """Whether layers draw numbers of their own, which lanes would do in no certain order."""
    rates = [getattr(m, name, 0.0) for m in module.modules() for name in ("p", "drop_prob")]
    return module.training and any(isinstance(rate, float) and rate > 0 for rate in rates)


class ThreadParallel:
    """As many threads as cores, or a few cores to each, with a twin of the module for each.

    Use as a context. Sums are in the order of the parts, so that they are the same in every run.
    """

    def __init__(
        self,
        module: nn.Module,
        wrap: Callable[[nn.Module], Any] = lambda m: m,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        """wrap: what makes of a twin what is called in training; backward: of a loss, as it needs."""
        self.count = num_worker_threads()
        replicas = [replica(module) for _ in range(self.count - 1)]
        self._models = [wrap(module), *(wrap(other) for other in replicas)]
        self._backward = backward
        self._pool = ThreadPoolExecutor(self.count, "lane")
        self._gradients = [list(each.parameters()) for each in (module, *replicas)]

    def __enter__(self) -> ThreadParallel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def backward(self, loss: LossOfChunk, count: int, size: int, scale: float = 1.0) -> Losses:
        """Add the gradients of a batch of `count` images, in parts of about `size`, to the module's.

        loss: of a twin and a part of the batch to named scalars, means over the images of the part
        or the same for all. Returns their means over the batch. scale: of the gradients.
        """
        parts = chunks_of(count, size, self.count)

        stopped = Event()  # by Ctrl-C or an error: no lane begins another part

        def worker(number: int) -> list[Losses]:
            found = []
            for part in parts[number :: self.count]:
                if stopped.is_set():
                    break
                with _set_by_errors(stopped):
                    losses = loss(self._models[number], part)
                    share = (part.stop - part.start) / count
                    self._backward(losses["loss"] * (share * scale))
                found.append({name: value.detach() * share for name, value in losses.items()})
            return found

        with _set_by_errors(stopped):
            found = [
                losses for each in run_in_threads(self._pool, worker, self.count) for losses in each
            ]
        self._collect()
        return {name: sum_of([losses[name] for losses in found]) for name in found[0]}

    def _collect(self) -> None:
        """Add the gradients of the twins to the module's own."""
        for own, *others in zip(*self._gradients, strict=True):
            for other in others:
                if other.grad is None:
                    continue
                own.grad = other.grad if own.grad is None else own.grad.add_(other.grad)
                other.grad = None


@contextmanager
def _set_by_errors(event: Event) -> Iterator[None]:
    try:
        yield
    except BaseException:  # Ctrl-C, too
        event.set()
        raise


def sum_of(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(dim=0)
