"""Run a function in several CPU threads at once, each with its share of torch's threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

MAX_WORKERS = 4  # only one thread at a time runs Python, and each needs gradients of its own


def num_worker_threads() -> int:
    """Useful number of worker threads: torch's number, or if that is large, MAX_WORKERS."""
    threads = torch.get_num_threads()
    return threads if threads < 2 * MAX_WORKERS else MAX_WORKERS


def run_in_threads(pool: ThreadPoolExecutor, work: Callable[[int], T], count: int) -> list[T]:
    """`[work(0), ..., work(count - 1)]`, each call in a thread of the pool, all at the same time.

    Grad and inference mode are the caller's (threads do not inherit them). Meanwhile torch uses
    1/count of its threads in each.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
    gradients = torch.is_grad_enabled()

    def in_mode(number: int) -> T:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(number)

    torch.set_num_threads(max(1, threads // count))
    try:
        return list(pool.map(in_mode, range(count)))
    finally:
        torch.set_num_threads(threads)
