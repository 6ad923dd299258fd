"""Ctrl-C and SIGTERM: finish the step, save, stop. Light: imported before anything heavy is."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from moce.errors import Terminated
from moce.runtime.launch import is_rank0

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled_by(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Within the context `handler` handles these signals (on the main thread; elsewhere a no-op)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the context SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt."""
    with handled_by(_terminate, signal.SIGTERM):
        yield


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


class StopRequest:
    """received: the signal that asked to stop, or None. A Ctrl-C after it raises KeyboardInterrupt.

    waits_for: what will be finished before the work stops, in words; it may change.
    """

    def __init__(self, waits_for: str) -> None:
        self.received: signal.Signals | None = None
        self.waits_for = waits_for

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            _write(
                f"stopping after {self.waits_for}, then saving; Ctrl-C again stops at once, without saving"
            )
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


def _write(message: str) -> None:
    """Write a line to standard error, unbuffered: the signal may have interrupted a buffered write."""
    if not is_rank0():
        return
    with suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())


@contextmanager
def stop_request(waits_for: str) -> Iterator[StopRequest]:
    """Within the context signals only set `received` (on the main thread; elsewhere a no-op)."""
    request = StopRequest(waits_for)
    with handled_by(request._handle, signal.SIGINT, signal.SIGTERM):
        yield request
