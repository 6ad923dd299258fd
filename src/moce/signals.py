"""What signals do while moce works. Light: the command line needs it before anything is imported."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from moce.errors import Terminated

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled_by(handler: Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Within the context these signals go to `handler` (on the main thread; elsewhere: nothing)."""
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
