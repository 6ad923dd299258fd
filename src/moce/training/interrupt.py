"""Ctrl-C and SIGTERM end a run after the step under way, so that it can be saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from moce.processes import all_sum, world


class StopRequest:
    """`received`: the signal that asked to stop, if any. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def agreed(received: signal.Signals | None) -> signal.Signals | None:
    """A signal if any process has received one, so that all stop after the same step."""
    if world() == 1:
        return received
    anyone = int(all_sum(torch.tensor(int(received is not None)))) > 0
    return received or (signal.SIGTERM if anyone else None)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the context the signals only set `received` (on the main thread; elsewhere: nothing)."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {
        number: signal.signal(number, request._handle) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
