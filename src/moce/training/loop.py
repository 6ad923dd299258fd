"""The training loop of every stage. A stage says what a step's loss is; the loop does the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moce.config import TrainingSettings
from moce.data.batches import Batch, BatchOrder, prefetched, resident
from moce.data.images import ImageSet
from moce.data.keyed import Stream, keyed_generator
from moce.errors import Interrupted, NotFinite
from moce.hardware import open_fabric
from moce.models.encoder import choose_attention
from moce.runs import write_config
from moce.training.checkpoint import load_checkpoint, save_checkpoint
from moce.training.interrupt import stop_request
from moce.training.log import MetricLog
from moce.training.optimiser import ParameterGroup, adamw, learning_rate, set_learning_rate
from moce.training.progress import meter, say

Losses = dict[str, Tensor]


@dataclass
class Step:
    """What a stage may know when it computes a loss: the number of the step and its whole batch's rows."""

    number: int
    rows: Tensor


@dataclass
class Stage:
    """One kind of training.

    module: what is trained and saved. loss: from the module as called in training, a micro-batch
    and the step to named scalars, "loss" among them, each a mean over the images of the
    micro-batch or the same for all micro-batches. diagnostics: numbers to log beside the losses.
    """

    title: str
    module: nn.Module
    images: ImageSet
    groups: list[ParameterGroup]
    loss: Callable[[nn.Module, Batch, Step], Losses]
    diagnostics: Callable[[], dict[str, Any]] = field(default=dict)


def total_steps(settings: TrainingSettings, count: int) -> int:
    """Steps of a run over `count` images."""
    return settings.steps or max(1, math.ceil(settings.epochs * count / settings.batch_size))


def fit(stage: Stage, settings: TrainingSettings, device: torch.device, precision: str) -> None:
    """Train `stage.module` in place; leaves config, metrics and checkpoints in the run folder.

    Raises NotFinite, with the last good state on disk, when the loss is not finite, and
    Interrupted, with the current state on disk, when the user or the system asks to stop.
    """
    _Loop(stage, settings, device, precision).run()


class _Loop:
    def __init__(
        self, stage: Stage, settings: TrainingSettings, device: torch.device, precision: str
    ) -> None:
        self.stage, self.settings, self.folder = stage, settings, settings.out
        self.count = len(stage.images)
        self.images = resident(stage.images, device)
        self.total = total_steps(settings, self.count)
        self.order = BatchOrder(self.count, settings.batch_size, settings.seed)
        self.fabric = open_fabric(device, precision)
        choose_attention(stage.module, device, precision)
        optimiser = adamw(stage.groups, settings.beta2)
        self.model, self.optimiser = self.fabric.setup(stage.module, optimiser)
        self.done = load_checkpoint(self.folder, stage.module, optimiser) if settings.resume else 0
        self.window = Window(device)

    def run(self) -> None:
        if self.done:
            say(f"resuming {self.folder} after step {self.done} of {self.total}")
        write_config(self.folder, self.settings)
        log = MetricLog(self.folder, tensorboard=self.settings.tensorboard, resumed_step=self.done)
        self.stage.module.train()
        parts = self.order.parts(self.done, self.total, self.settings.micro_batch_size)
        with (
            meter(self.stage.title, self.total, self.done) as progress,
            closing(prefetched(self.images, parts, self.fabric.device)) as batches,
            stop_request() as stop,
        ):
            for number in range(self.done, self.total):
                rate = self._set_rate(number)
                self._step(number, batches)
                received = stop.received  # read once: a later signal is for the next step
                stopping = received is not None or number + 1 == self.total
                note = None
                if stopping or (number + 1) % self.settings.log_every == 0:
                    self.window.check_finite(self.folder)
                    row = self.window.row(number + 1, self.count, self.settings.batch_size, rate)
                    log.write(row | self.stage.diagnostics())
                    note = _note(row)
                if stopping or (number + 1) % self.settings.save_every == 0:
                    self._check_weights()
                    save_checkpoint(self.folder, number + 1, self.stage.module, self.optimiser)
                progress.advance(note)
                if received is not None and number + 1 < self.total:
                    raise Interrupted(received, self.folder, f"step {number + 1}")
        log.close()
        self.stage.module.eval()

    def _check_weights(self) -> None:
        """A finite loss can still have made a step that overflows: look before saving."""
        self.window.check_finite(self.folder)
        if not all(value.isfinite().all() for value in self.stage.module.state_dict().values()):
            raise NotFinite(f"the weights are not finite; {remedy(self.folder)}")

    def _set_rate(self, number: int) -> float:
        settings = self.settings
        peak = settings.base_lr * settings.batch_size / 256
        rate = learning_rate(number, self.total, peak, settings.warmup, settings.min_lr)
        set_learning_rate(self.optimiser, rate)
        return rate

    def _step(self, number: int, batches: Iterator[Batch]) -> None:
        """Forward and backward over the next micro-batches, which make one batch; then a step."""
        # Layers that draw their own randomness (drop path) draw the same after a resume.
        seed = keyed_generator(self.settings.seed, Stream.STEP, number).initial_seed()
        torch.manual_seed(seed)
        rows, _ = self.order(number)
        size = self.settings.micro_batch_size or len(rows)
        step = Step(number, rows.to(self.fabric.device))
        for start in range(0, len(rows), size):
            with self.window.waiting():
                batch = next(batches)
            share = len(batch.rows) / len(rows)
            more = start + size < len(rows)
            with self.fabric.no_backward_sync(self.model, enabled=more):
                losses = self.stage.loss(self.model, batch, step)
                self.fabric.backward(losses["loss"] * share)
            self.window.add(losses, share)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.window.steps += 1


class Window:
    """Sums since the last logged row; they stay on the device until a row is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._reset()

    def _reset(self) -> None:
        self._sums: Losses = {}
        self._start, self._waited, self.steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, losses: Losses, share: float) -> None:
        for name, value in losses.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float() * share
        self._finite &= losses["loss"].detach().isfinite()

    def row(self, step: int, count: int, batch_size: int, rate: float) -> dict[str, Any]:
        """Means since the last row, and how fast it went."""
        means = {name: value.item() / self.steps for name, value in self._sums.items()}
        seconds = time.perf_counter() - self._start
        row = {
            "step": step,
            "epoch": round(step * batch_size / count, 4),
            **means,
            "lr": rate,
            "images_per_s": round(self.steps * batch_size / seconds, 1),
            "step_s": round(seconds / self.steps, 5),
            "data_wait_s": round(self._waited / self.steps, 5),
        }
        self._reset()
        return row

    def check_finite(self, folder: Path) -> None:
        """Raise NotFinite if any loss since the start was not finite; called before anything is written."""
        if not self._finite.item():
            raise NotFinite(f"the loss is not finite; {remedy(folder)}")


def remedy(folder: Path) -> str:
    """What to try when numbers overflow."""
    return (
        f"{folder} keeps the last good state. Start again (--overwrite) with a lower --base-lr, "
        "a longer --warmup or --precision float32"
    )


def _note(row: dict[str, Any]) -> str | None:
    """The words beside the progress bar."""
    if not row:
        return None
    wait = 100 * row["data_wait_s"] / max(row["step_s"], 1e-9)
    return f"loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s, data wait {wait:.1f}%"
