"""Passes over a batch before training starts, to measure time and memory, which leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch

from moce.config import TrainingSettings
from moce.data.loader import Loading
from moce.training.trainer import Objective, Step


@contextmanager
def trial(
    objective: Objective, settings: TrainingSettings, device: torch.device, count: int
) -> Iterator[Callable[[], None]]:
    """A function that makes a forward and backward pass over `count` images.

    The weights are moved to the device. On leaving, also by an error, they, the buffers (means of batch
    norm) and torch's random numbers are as before, and there are no gradients.
    """
    model = objective.model.to(device)
    rows = torch.arange(count) % len(objective.images)
    order = [(rows, torch.zeros_like(rows))]
    with closing(objective.batches(order, device, Loading(workers=0))) as batches:
        batch = next(batches)
    step = Step(-1, rows)  # what a loss keeps for one step must not be kept for the first
    prepared = objective.prepared(batch, step)

    def one_pass() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = objective.loss(model, prepared, step)["loss"]
        loss.backward()
        float(loss.detach())  # waits for the device

    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield one_pass
        finally:
            model.zero_grad(set_to_none=True)
            for buffer, value in before:
                buffer.copy_(value)
