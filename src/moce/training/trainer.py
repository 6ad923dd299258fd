"""The training loop of every stage. A stage says what a step's loss is; the loop does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moce.config import TrainingSettings
from moce.data.dataset import ImageDataset
from moce.data.loader import Batch, BatchOrder, cached_on_gpu, prefetched, shard_micro_batches
from moce.data.rng import Stream, keyed_generator
from moce.errors import Interrupted, MoceError, NotFinite
from moce.models.activation_checkpoint import set_checkpointing
from moce.models.encoder import choose_attention
from moce.runs.model import INFO, write_config
from moce.runtime.distributed import agreed_signal, all_reduce, barrier, is_rank0, rank, world_size
from moce.runtime.fabric import open_fabric
from moce.runtime.fsdp import Replicated, Sharded
from moce.runtime.progress import log, meter
from moce.runtime.signals import stop_request
from moce.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from moce.training.idle_experts import IdleExperts
from moce.training.metrics import MetricLog, Window, remedy
from moce.training.optimizer import ParameterGroup, adamw, learning_rate, set_learning_rate
from moce.training.thread_parallel import Losses, ThreadParallel, has_dropout


@dataclass
class Step:
    """What a stage may know when it computes a loss.

    The number of the step and its whole batch's rows, on the CPU; which part of it the micro-batch is, and how
    many of the micro-batch's images only lead it (see `Stage.mixes`).
    """

    number: int
    rows: Tensor
    part: int = 0
    led_by: int = 0


@dataclass
class Objective:
    """One kind of training.

    module: what is trained and saved. loss: from the module as called in training, a micro-batch
    and the step to named scalars, "loss" among them, each a mean over the images of the
    micro-batch or the same for all micro-batches. diagnostics: numbers to log beside the losses.
    memory: what diagnostics keeps from one row to the next, so that checkpoints can hold it. mixes:
    whether it mixes each image with the one before it; of several processes, each then has that
    image, too, before its own. part: about how many images are worth computing apart from the
    others; None: the losses are not the means over those of a batch's parts. order: of a batch's
    images, so that those of a part have much in common.
    """

    title: str
    module: nn.Module
    images: ImageDataset
    groups: list[ParameterGroup]
    loss: Callable[[nn.Module, Batch, Step], Losses]
    diagnostics: Callable[[], dict[str, Any]] = field(default=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    uses_mixup: bool = False
    part: int | None = None
    order: Callable[[Batch], Tensor] | None = None


def total_steps(settings: TrainingSettings, count: int) -> int:
    """Steps of a run over `count` images."""
    return settings.steps or max(1, math.ceil(settings.epochs * count / settings.batch_size))


def fit(
    objective: Objective, settings: TrainingSettings, device: torch.device, precision: str
) -> None:
    """Train `stage.module` in place; leaves config, metrics and checkpoints in the run folder.

    Raises NotFinite, with the last good state on disk, when the loss is not finite, and
    Interrupted, with the current state on disk, when the user or the system asks to stop.
    """
    _Loop(objective, settings, device, precision).run()


class _Loop:
    def __init__(
        self, objective: Objective, settings: TrainingSettings, device: torch.device, precision: str
    ) -> None:
        self.objective, self.settings, self.folder = objective, settings, settings.out
        self.count = len(objective.images)
        self.images = (
            cached_on_gpu(objective.images, device) if settings.cache_on_gpu else objective.images
        )
        self.total = total_steps(settings, self.count)
        self.order = BatchOrder(self.count, settings.batch_size, settings.seed)
        shared = settings.strategy == "fsdp" and world_size() > 1
        self.fabric = open_fabric(device, precision, "fsdp" if shared else "ddp")
        choose_attention(objective.module, device, precision)
        set_checkpointing(objective.module, settings.grad_checkpointing)
        check_share(settings)
        self.plain = adamw(objective.groups, settings.beta2)  # of the module itself: what is saved
        self.held = (Sharded if shared else Replicated)(self.fabric, objective.module, self.plain)
        self.model, self.optimizer = self.held.model, self.held.optimizer
        self.idle = IdleExperts(self.model)
        self.window = Window(device)
        self.done = self._load() if settings.resume else 0
        check_agreed(self.done)
        self.held.scatter()

    def run(self) -> None:
        if self.done:
            log(f"resuming {self.folder} after step {self.done} of {self.total}")
        write_config(self.folder, self.settings)
        self.model.train()
        led = self.objective.uses_mixup and world_size() > 1
        parts = self.order.micro_batches(self.done, self.total, self.settings.micro_batch_size, led)
        with (
            closing(self._open_log()) as metric_log,
            meter(self.objective.title, self.total, self.done) as progress,
            closing(prefetched(self.images, parts, self.fabric.device)) as batches,
            stop_request() as stop,
            self._thread_parallel() as self.thread_parallel,
        ):
            for number in range(self.done, self.total):
                rate = self._set_rate(number)
                self._step(number, batches)
                # Read once: a later signal is for the next step.
                received = agreed_signal(stop.received)
                last = number + 1 == self.total
                note = None
                # Rows are where an uninterrupted run has them: asking to stop makes none.
                if last or (number + 1) % self.settings.log_every == 0:
                    note = self._log(metric_log, number + 1, rate)
                if last or received is not None or (number + 1) % self.settings.save_every == 0:
                    self._save(number + 1)
                progress.advance(note)
                if received is not None:
                    raise Interrupted(received, self.folder, f"step {number + 1} of {self.total}")
        set_checkpointing(self.objective.module.eval(), False)

    def _open_log(self) -> MetricLog:
        return MetricLog(self.folder, tensorboard=self.settings.tensorboard, resumed_step=self.done)

    def _log(self, metric_log: MetricLog, step: int, rate: float) -> str:
        """Write the row of a step; a few words on it."""
        self.window.check_finite(self.folder)
        self.window.collect()
        if self.objective.diagnostics is not dict:  # they read the module
            self.held.gather_module()
        row = self.window.row(step, self.count, self.settings.batch_size, rate)
        times = self.window.times(step, self.settings.batch_size)
        self.window.reset()
        metric_log.write(row | self.objective.diagnostics(), times)
        return _note(row, times)

    def _load(self) -> int:
        """Go back to the newest checkpoint; the number of steps done."""
        found = load_checkpoint(self.folder, self.objective.module, self.plain)
        if found is None:
            if (self.folder / INFO).is_file():
                raise MoceError(
                    f"{self.folder} is finished and its checkpoints are gone: there is nothing to "
                    "go on from; --overwrite trains again"
                )
            return 0
        self.window.load(found.window)
        self.objective.memory.update(found.memory)
        return found.step

    def _save(self, step: int) -> None:
        self.held.gather()
        self.window.collect()
        self._check_finite()
        if is_rank0():
            state = Checkpoint(step, self.window.state(), self.objective.memory)
            save_checkpoint(self.folder, state, self.objective.module, self.plain)
        barrier()

    def _check_finite(self) -> None:
        """A finite loss can still have made a step that overflows: look before saving."""
        self.window.check_finite(self.folder)
        averages = [value for values in self.plain.state.values() for value in values.values()]
        held = (*self.objective.module.state_dict().values(), *averages)
        wrong = torch.tensor(int(not all(value.isfinite().all() for value in held)))
        if int(all_reduce(wrong)):
            raise NotFinite(f"the weights are not finite; {remedy(self.folder)}")

    def _set_rate(self, number: int) -> float:
        settings = self.settings
        peak = settings.base_lr * settings.batch_size / 256
        rate = learning_rate(number, self.total, peak, settings.warmup, settings.min_lr)
        set_learning_rate(self.optimizer, rate)
        return rate

    def _step(self, number: int, batches: Iterator[Batch]) -> None:
        """Forward and backward over the next micro-batches, which make one batch; then a step."""
        # Layers that draw their own randomness (drop path) draw the same after a resume.
        place = number * world_size() + rank()  # no two processes drop the same
        seed = keyed_generator(self.settings.seed, Stream.STEP, place).initial_seed()
        torch.manual_seed(seed)
        rows, _ = self.order(number)
        step = Step(number, rows, led_by=int(self.objective.uses_mixup and world_size() > 1))
        parts = shard_micro_batches(len(rows), self.settings.micro_batch_size)
        for step.part, part in enumerate(parts):
            with self.window.waiting():
                batch = next(batches)
            share = (part.stop - part.start) / len(rows)
            with self.fabric.no_backward_sync(self.model, enabled=step.part < len(parts) - 1):
                # Gradients are averaged over the processes, and are to be summed.
                losses = self._backward(batch, step, share * world_size())
            self.window.add(losses, share)
        self.idle.drop_gradients()
        if self.settings.clip_grad is not None:
            norm = self.settings.clip_grad  # what is not finite is found when losses are read
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.window.steps += 1

    def _thread_parallel(self) -> AbstractContextManager[ThreadParallel | None]:
        """What computes the parts of a batch, on a CPU that this process has for itself."""
        apart = (
            self.objective.part is not None
            and self.fabric.device.type == "cpu"
            and world_size() == 1
        )
        if not apart or has_dropout(self.objective.module):
            return nullcontext()
        return ThreadParallel(self.objective.module, self.fabric.setup_module, self.fabric.backward)

    def _backward(self, batch: Batch, step: Step, scale: float) -> Losses:
        """The losses of a micro-batch, and its gradients, scaled, added to those there are."""
        loss, thread_parallel = self.objective.loss, self.thread_parallel
        if thread_parallel is None or self.objective.part is None:
            losses = loss(self.model, batch, step)
            self.fabric.backward(losses["loss"] * scale)
            return losses
        if self.objective.order is not None:
            batch = batch.take(self.objective.order(batch))
        of_part = lambda model, part: loss(model, batch.take(part), step)  # noqa: E731
        return thread_parallel.backward(of_part, len(batch.rows), self.objective.part, scale)


def _note(row: dict[str, Any], times: dict[str, Any]) -> str:
    """The words beside the progress bar."""
    wait = 100 * times["data_wait_s"] / max(times["step_s"], 1e-9)
    return f"loss {row['loss']:.4f}, {times['images_per_s']:.0f} images/s, data wait {wait:.1f}%"


def check_share(settings: TrainingSettings) -> None:
    """Raise MoceError if a process would have no image in some forward pass."""
    size, parts = (
        settings.batch_size,
        shard_micro_batches(settings.batch_size, settings.micro_batch_size),
    )
    shortest = torch.tensor([part.stop - part.start for part in parts]).amin()
    idle = int(all_reduce((shortest == 0).long()))
    if idle:
        of = f", {settings.micro_batch_size} a pass" if settings.micro_batch_size else ""
        raise MoceError(
            f"a batch of {size} images{of} leaves some of {world_size()} processes without an image in a "
            "forward pass; start fewer processes, or give another batch_size or micro_batch_size"
        )


def check_agreed(done: int) -> None:
    """Raise MoceError if the processes have found different checkpoints to go on from."""
    total = int(all_reduce(torch.tensor(done)))
    differ = int(all_reduce(torch.tensor(int(total != done * world_size()))))
    if differ:
        raise MoceError(
            "the processes find different checkpoints; the output folder has to be on a disk that all "
            "nodes share"
        )
