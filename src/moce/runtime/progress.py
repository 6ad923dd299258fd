"""Progress bars and messages to the user: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moce.runtime.launch import is_rank0

console = Console(stderr=True, highlight=False)
LINE_EVERY = 15.0  # seconds between lines where there is no terminal


def log(message: str) -> None:
    """Print a line to standard error, on rank 0 only."""
    if is_rank0():
        console.print(message, markup=False, soft_wrap=True)


class Meter:
    """Progress of one job: call `advance` after every step, optionally with a short note.

    The bar appears after `wait` seconds; a job that has ended by then shows nothing.
    """

    def __init__(self, title: str, total: int, done: int, wait: float) -> None:
        self._title, self._total, self._done, self._first = title, total, done, done
        self._note, self._wait = "", wait
        self._start = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal or not is_rank0(),
        )
        self._task = self._bar.add_task(title, total=total, completed=done, note="")

    def advance(self, note: str | None = None, count: int = 1) -> None:
        self._done += count
        self._note = self._note if note is None else note
        self._bar.update(self._task, completed=self._done, note=self._note)
        now = time.monotonic()
        if now - self._start >= self._wait:
            self._bar.start()
        if not console.is_terminal and now - self._last_line >= LINE_EVERY:
            self._last_line = now
            rate = (self._done - self._first) / (now - self._start)
            left = (self._total - self._done) / rate
            log(f"{self._title} {self._done}/{self._total}, {left:.0f} s left, {self._note}")


@contextmanager
def meter(title: str, total: int, done: int = 0, wait: float = 0.0) -> Iterator[Meter]:
    """A Meter whose bar is shown within the context, after `wait` seconds."""
    shown = Meter(title, total, done, wait)
    try:
        if not wait:
            shown._bar.start()
        yield shown
    finally:
        shown._bar.stop()
