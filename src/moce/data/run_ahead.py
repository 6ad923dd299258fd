"""Run jobs in threads, ahead of the use of their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_ahead(jobs: Iterable[Callable[[], T]], threads: int, ahead: int) -> Generator[T]:
    """The results of all jobs, in order; at most `ahead` wait to be used, and `jobs` is read lazily.

    Closing the generator cancels waiting jobs and joins the threads.
    """
    with ThreadPoolExecutor(threads, "prefetch") as pool:
        pending: deque[Future[T]] = deque()
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
