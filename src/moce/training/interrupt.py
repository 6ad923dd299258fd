"""Ctrl-C and SIGTERM end a run after the step under way, so that it can be saved first."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from moce.errors import Terminated

Handler = Callable[[int, FrameType | None], None]


class StopRequest:
    """`received`: the signal that asked to stop, if any. Ctrl-C after it stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            _tell("stopping after this step; Ctrl-C now stops at once, without saving")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


def _tell(message: str) -> None:
    """A line on standard error, past the buffers that the signal may have come into."""
    with suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the context the signals only set `received` (on the main thread; elsewhere: nothing)."""
    request = StopRequest()
    with _handled_by(request._handle, signal.SIGINT, signal.SIGTERM):
        yield request


@contextmanager
def terminable() -> Iterator[None]:
    """Within the context SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt."""
    with _handled_by(_terminate, signal.SIGTERM):
        yield


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def _handled_by(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
