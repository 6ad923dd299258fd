"""Progress bars and messages to the user: a bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Column
from rich.text import Text

from moce.runtime.launch import is_rank0

console = Console(stderr=True, highlight=False)
LINE_EVERY = 15.0  # seconds between lines where there is no terminal, at first
BAR_WIDTH = 20  # characters
LINE_SHARE = 0.01  # of the time since the start: a run of days must not write thousands of lines


def log(message: str) -> None:
    """Print a line to standard error, on rank 0 only."""
    if is_rank0():
        console.print(message, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Two units at most: 3 d 7 h, 3 h 20 min, 12 min, 40 s."""
    if seconds < 60:
        return f"{max(0, seconds):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h"


class _TimeLeft(ProgressColumn):
    """The time that is left, as `duration` writes it."""

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")


class _Note(ProgressColumn):
    """The note on one line: what does not fit is cut off, never the time that is left."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class Meter:
    """Progress of one job: call `advance` after every step, optionally with a short note.

    The bar appears after `wait` seconds; a job that has ended by then shows nothing.
    """

    def __init__(self, title: str, total: int, done: int, wait: float) -> None:
        self._title, self._total, self._done, self._first = title, total, done, done
        self._note, self._wait = "", wait
        self._start = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(BAR_WIDTH, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            _TimeLeft(Column(no_wrap=True)),
            _Note(),
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
        every = max(LINE_EVERY, LINE_SHARE * (now - self._start))
        if not console.is_terminal and now - self._last_line >= every:
            self._last_line = now
            rate = (self._done - self._first) / (now - self._start)
            left = (self._total - self._done) / rate
            log(f"{self._title} {self._done}/{self._total}, {duration(left)} left, {self._note}")


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
