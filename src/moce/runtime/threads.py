"""Work that can be done apart, on a few CPU threads that share the rest of torch's threads among them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

MOST_THREADS = 4  # only one thread at a time runs Python, and each keeps sums of its own


def num_worker_threads() -> int:
    """How many threads are worth having: torch's, or a few that have several of its own each."""
    threads = torch.get_num_threads()
    return threads if threads < 2 * MOST_THREADS else MOST_THREADS


def run_in_threads(pool: ThreadPoolExecutor, work: Callable[[int], T], count: int) -> list[T]:
    """What `work` returns for 0 .. count - 1, each in a thread of the pool, all at once.

    In the caller's modes of autograd, which threads do not inherit.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    gradients = torch.is_grad_enabled()

    def own(number: int) -> T:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(number)

    torch.set_num_threads(max(1, threads // count))
    try:
        return list(pool.map(own, range(count)))
    finally:
        torch.set_num_threads(threads)
