"""Ctrl-C and SIGTERM end a run after the step under way, so that it can be saved first."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch

from moce.launch import speaks
from moce.processes import all_sum, world
from moce.signals import handled_by


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
    if not speaks():
        return
    with suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())


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
    with handled_by(request._handle, signal.SIGINT, signal.SIGTERM):
        yield request
