"""Work that can be done apart, on a few CPU threads that share the rest of torch's threads among them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")

LANES = 4  # at most: only one at a time is in Python, and each has sums of its own


def num_lanes() -> int:
    """How many threads are worth having: torch's, or a few that have several of its own each."""
    return min(LANES, torch.get_num_threads())


def at_once(pool: ThreadPoolExecutor, work: Callable[[int], T], count: int) -> list[T]:
    """What `work` returns for 0 .. count - 1, each in a thread of the pool, all at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // count))
    try:
        return list(pool.map(work, range(count)))
    finally:
        torch.set_num_threads(threads)
