"""CPU data parallelism: a batch in chunks, computed by replicas of the model in threads.

Each core computes whole chunks, forward and backward. Cores that share every operation would wait
for each other after each, and be idle while Python runs in between. The tensors of a chunk are
small enough to stay in the cache, and activations are kept for the current chunks only.
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

from moce.models.token_moe import TokenExpertFFN
from moce.runtime.threads import num_worker_threads, run_in_threads
from moce.training.drop_path import KeyedDropPath

Losses = dict[str, Tensor]
ChunkLoss = Callable[[nn.Module, slice], Losses]

CHUNK_NUMBERS = 2**18  # values in the tokens of a chunk: 1 MiB of float32


def chunks_of(count: int, size: int, num_threads: int) -> list[slice]:
    """Slices of a batch of `count` images, about `size` each, equally many per thread if possible."""
    number = -(-count // size)
    number = min(count, -(-number // num_threads) * num_threads)
    return [slice(i * count // number, (i + 1) * count // number) for i in range(number)]


def replica(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters' and buffers' memory but has its own gradients."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad)
    return copy.deepcopy(module, memo)


def images_per_chunk(tokens: int, width: int) -> int:
    """Images of so many tokens in a chunk: their tokens have about CHUNK_NUMBERS values."""
    return max(1, CHUNK_NUMBERS // (tokens * width))


def draws_in_turn(module: nn.Module) -> bool:
    """Whether layers draw random numbers in training, whose order would depend on the threads."""
    layers = [m for m in module.modules() if not isinstance(m, KeyedDropPath)]
    rates = [getattr(m, name, 0.0) for m in layers for name in ("p", "drop_prob")]
    drops = any(isinstance(rate, float) and rate > 0 for rate in rates)
    return module.training and (drops or any(isinstance(m, TokenExpertFFN) for m in layers))


class ThreadParallel:
    """Worker threads, each with a replica of the module; a context manager.

    Gradients and losses are summed in a fixed order, so every run gives the same numbers.

    Args:
        module: accumulates the gradients.
        wrap: makes the callable used in training from a replica (as `Fabric.setup_module`).
        backward: computes the gradients of a loss (as `Fabric.backward`).
    """

    def __init__(
        self,
        module: nn.Module,
        wrap: Callable[[nn.Module], Any] = lambda m: m,
        backward: Callable[[Tensor], None] = Tensor.backward,
    ) -> None:
        self.num_threads = num_worker_threads()
        replicas = [replica(module) for _ in range(self.num_threads - 1)]
        self._models = [wrap(module), *(wrap(other) for other in replicas)]
        self._backward = backward
        self._pool = ThreadPoolExecutor(self.num_threads, "thread_parallel")
        self._parameters = [list(each.parameters()) for each in (module, *replicas)]

    def __enter__(self) -> ThreadParallel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def backward(self, loss: ChunkLoss, count: int, size: int, scale: float = 1.0) -> Losses:
        """Add the gradients of a batch to those of the module.

        Args:
            loss: named scalars of a model and a slice of the batch, "loss" among them; each a mean
                over the images of the slice, or the same for all slices.
            count: images in the batch.
            size: images per chunk, about.
            scale: factor of the gradients.

        Returns the means of the losses over the batch.
        """
        chunks = chunks_of(count, size, self.num_threads)
        stopped = Event()  # by Ctrl-C or an error: no thread starts another chunk

        def worker(number: int) -> list[Losses]:
            found = []
            for chunk in chunks[number :: self.num_threads]:
                if stopped.is_set():
                    break
                with _set_on_error(stopped):
                    losses = loss(self._models[number], chunk)
                    share = (chunk.stop - chunk.start) / count
                    self._backward(losses["loss"] * (share * scale))
                found.append({name: value.detach() * share for name, value in losses.items()})
            return found

        with _set_on_error(stopped):
            found = [
                losses
                for each in run_in_threads(self._pool, worker, self.num_threads)
                for losses in each
            ]
        self._reduce_gradients()
        return {name: torch.stack([losses[name] for losses in found]).sum(0) for name in found[0]}

    def _reduce_gradients(self) -> None:
        """Add the gradients of the replicas to the module's own."""
        for own, *others in zip(*self._parameters, strict=True):
            for other in others:
                if other.grad is None:
                    continue
                own.grad = other.grad if own.grad is None else own.grad.add_(other.grad)
                other.grad = None


@contextmanager
def _set_on_error(event: Event) -> Iterator[None]:
    try:
        yield
    except BaseException:  # Ctrl-C, too
        event.set()
        raise
