"""What a trainer asks of a monitor: measurements of the network that leave its training unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


@dataclass
class Measured:
    """row: values for metrics.jsonl; picture: [h, w, 3] uint8, if one is due."""

    row: dict[str, Any] = field(default_factory=dict)
    picture: np.ndarray | None = None


class Monitor(Protocol):
    """Measures the network of an objective, on the first process.

    note: the last measurement, in a few words.
    """

    note: str

    def due(self, step: int) -> bool:
        """Whether to measure after `step`, which has a row of its own; 0: before the first step."""

    def measure(self, step: int) -> Measured:
        """Measure after `step`; pictures are also written to the run's folder."""

    def header(self, seconds: float | None) -> list[str]:
        """What is measured, how often and at what cost. seconds: of the training, if known."""


@contextmanager
def evaluating(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the context a network evaluates on `device`; after it, it is where and as it was."""
    modes = {each: each.training for each in module.modules()}
    before = next(module.parameters()).device
    module.to(device).eval()
    try:
        yield
    finally:
        module.to(before)
        for each, training in modes.items():
            each.training = training
