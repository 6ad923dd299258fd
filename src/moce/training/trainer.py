"""The training loop: step, log, checkpoint, resume. An `Objective` defines what is trained."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moce.config import TrainingSettings
from moce.data.dataset import ImageDataset
from moce.data.loader import (
    Batch,
    BatchOrder,
    Loading,
    check_batch_size,
    shard_micro_batches,
    view_batches,
)
from moce.data.rng import Stream, keyed_generator
from moce.data.views import Views
from moce.errors import Interrupted, MoceError
from moce.models.activation_checkpoint import set_checkpointing
from moce.models.encoder import choose_attention
from moce.runs.model import INFO, write_config
from moce.runtime.distributed import agreed_signal, all_reduce, barrier, broadcast, rank, world_size
from moce.runtime.fabric import open_fabric
from moce.runtime.fsdp import full_state
from moce.runtime.launch import is_rank0
from moce.runtime.progress import log, meter
from moce.runtime.signals import stop_request
from moce.training.checkpoint import Checkpoint, CheckpointWriter, check_agreed, load_checkpoint
from moce.training.drop_path import draw_drop_path, forget_drop_path, use_keyed_drop_path
from moce.training.gate_stats import Diagnostics
from moce.training.idle_experts import IdleExperts
from moce.training.metrics import MetricLog, Window, note_of
from moce.training.monitoring import Measured, Monitor
from moce.training.optimizer import ParameterGroup, adamw, learning_rate, set_learning_rate
from moce.training.thread_parallel import Losses, ThreadParallel, draws_in_turn
from moce.training.unreadable import UnreadableImages
from moce.training.weight_average import WeightAverage


@dataclass
class Step:
    """What a loss may depend on beside the micro-batch.

    number: of the step, from 0; rows: [batch size] int64, the whole batch, on the CPU;
    micro_batch: number of the micro-batch; num_leading: how many of its first images only serve
    mixup (see `Objective.uses_mixup`).
    """

    number: int
    rows: Tensor
    micro_batch: int = 0
    num_leading: int = 0


@dataclass
class Objective(ABC):
    """One kind of training: a subclass implements `loss`.

    Args:
        name: shown beside the progress bar.
        model: the network that is trained, and saved in checkpoints. With FSDP it stays whole, on
            the CPU, and is up to date in diagnostics and after `fit`.
        images: the training images; an `ImageDataset`, unless `batches` is overridden.
        parameter_groups: for AdamW; `lr_scale` is a factor of the learning rate.
        chunk_size: images per chunk for `ThreadParallel`. None: the loss must not be chunked.
        diagnostics: values to log beside the losses.
        monitor: measures the network at some of the rows.
        classes: [n] int64; as many images are drawn of each class as of any other (None: every
            image once an epoch).
        ema: decay of an average of the weights, which then is what is evaluated and kept; 0: none.
        views: what `loss` asks a batch for: random crops of the images, or what a policy makes of
            those. None: batches are whole images.
    """

    name: str
    model: nn.Module
    images: Sized
    parameter_groups: list[ParameterGroup]
    chunk_size: int | None = None
    diagnostics: Diagnostics | None = None
    monitor: Monitor | None = field(default=None, init=False)
    classes: Tensor | None = field(default=None, init=False)
    views: Views | None = None
    ema: float = 0.0
    average: WeightAverage | None = field(default=None, init=False)  # set by the trainer

    @property
    def evaluated(self) -> nn.Module:
        """The network to evaluate: with averaged weights, or as it is."""
        return self.model if self.average is None else self.average.model

    def converged(self) -> bool:
        """Whether training should end before its last step; asked after every logged row."""
        return False

    def prepared(self, batch: Batch, step: Step) -> Any:
        """What `loss` gets, with `rows`, `epochs` and `take`: what all chunks need made at once."""
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, step: Step) -> Losses:
        """Named scalars of a micro-batch as `prepared`, or of a chunk of it, "loss" among them.

        Each is a mean over the images, or the same for all micro-batches of the step. `model` is
        `self.model` as it is called in training (wrapped, sharded or a replica).
        """

    def batches(
        self, order: Iterable[tuple[Tensor, Tensor]], device: torch.device, loading: Loading
    ) -> Generator[Any]:
        """The batch of each (rows, epochs) on `device`, read while the previous ones are used."""
        assert isinstance(self.images, ImageDataset)
        return view_batches(self.images, order, device, self.views, loading)

    @property
    def uses_mixup(self) -> bool:
        """Whether `loss` mixes every image with the one before it.

        With several processes each then gets that image, too, before its own.
        """
        return False

    def chunk_order(self, batch: Batch) -> Tensor | None:
        """Order [b] int64 of a batch's images before it is chunked; None: as they come."""
        return None


def total_steps(settings: TrainingSettings, count: int) -> int:
    """Steps of a run over `count` images."""
    return settings.steps or max(1, math.ceil(settings.epochs * count / settings.batch_size))


def fit(
    objective: Objective, settings: TrainingSettings, device: torch.device, precision: str
) -> None:
    """Train `objective.model` in place; config, metrics and checkpoints go to `settings.out`.

    Raises NotFinite when the loss or the weights are not finite; the last good state is on disk.
    Raises Interrupted when the user or the system asks to stop; the current state is on disk.
    """
    _Trainer(objective, settings, device, precision).run()


class _Trainer:
    """model: the network as it is called; its `module` is `objective.model`, or under FSDP a shard."""

    def __init__(
        self, objective: Objective, settings: TrainingSettings, device: torch.device, precision: str
    ) -> None:
        self.objective, self.settings, self.folder = objective, settings, settings.out
        self.count = len(objective.images)
        self.unreadable = UnreadableImages(objective.images, settings.out)
        self.total = total_steps(settings, self.count)
        far = getattr(objective.images, "far_files", None)  # not of dense tasks
        self.order = BatchOrder(
            self.count, settings.batch_size, settings.seed, far, objective.classes
        )
        self.sharded = settings.strategy == "fsdp" and world_size() > 1
        self.fabric = open_fabric(device, precision, "fsdp" if self.sharded else "ddp")
        choose_attention(objective.model, device, precision)
        set_checkpointing(objective.model, settings.grad_checkpointing)
        check_batch_size(settings.batch_size, settings.micro_batch_size)
        self.model, self.optimizer = self._setup()
        if objective.ema:
            if self.sharded:
                raise MoceError("--ema averages whole networks: give --strategy ddp")
            objective.average = WeightAverage(self.model.module, objective.ema)
        self.idle = IdleExperts(self.model)
        self.window = Window(device)
        self.done = self._load() if settings.resume else 0
        check_agreed(self.done)

    def _setup(self) -> tuple[Any, torch.optim.Optimizer]:
        """Wrap the model for its device and processes, and create its optimizer."""
        objective = self.objective
        if objective.chunk_size is not None:
            use_keyed_drop_path(objective.model)
        module = copy.deepcopy(objective.model) if self.sharded else objective.model
        names = {parameter: name for name, parameter in objective.model.named_parameters()}
        model = self.fabric.setup_module(module)
        parameters = dict(module.named_parameters())  # FSDP replaces them
        groups = [
            {**group, "params": [parameters[names[parameter]] for parameter in group["params"]]}
            for group in objective.parameter_groups
        ]
        return model, adamw(groups, self.settings.beta2)

    def run(self) -> None:
        if self.done:
            log(f"resuming {self.folder} after step {self.done} of {self.total}")
        write_config(self.folder, self.settings)
        self.model.train()
        leading = self.objective.uses_mixup and world_size() > 1
        rows = self.order.micro_batches(
            self.done, self.total, self.settings.micro_batch_size, leading
        )
        with (
            closing(self._open_log()) as metric_log,
            meter(self.objective.name, self.total, self.done) as progress,
            closing(self._batches(rows)) as batches,
            stop_request("the first step") as self.stop,
            self._thread_parallel() as self.thread_parallel,
            CheckpointWriter(self.folder) as checkpoints,
        ):
            if not self.done and (measured := self._measure(0)).row:
                metric_log.write({"step": 0, "epoch": 0.0, **measured.row}, None, measured.picture)
                self.window.reset()
            end = self.done if self.done and self._converged() else self.total
            for number in range(self.done, end):
                self.stop.waits_for = f"step {number + 1:,} of {self.total:,}"
                rate = self._set_rate(number)
                self._step(number, batches)
                checkpoints.check()
                last = number + 1 == self.total
                note = None
                # Rows are where an uninterrupted run has them: asking to stop makes none.
                if last or (number + 1) % self.settings.log_every == 0:
                    note = self._log(metric_log, number + 1, rate)
                    last = last or self._converged()
                # Read once: a later signal is for the next step.
                received = agreed_signal(self.stop.received)
                if last or received is not None or (number + 1) % self.settings.save_every == 0:
                    self._save(checkpoints, number + 1)
                if last or received is not None:
                    checkpoints.finish()
                progress.advance(note)
                if received is not None:
                    raise Interrupted(received, self.folder, f"step {number + 1} of {self.total}")
                if last:
                    break
            metric_log.finish()
        self._finish()

    def _batches(self, rows: Iterable[tuple[Tensor, Tensor]]) -> Generator[Any]:
        settings = self.settings
        loading = Loading(settings.cache_on_gpu, settings.workers, self.unreadable.report)
        return self.objective.batches(rows, self.fabric.device, loading)

    def _open_log(self) -> MetricLog:
        settings = self.settings
        return MetricLog(self.folder, settings.loggers, self.done, settings.model_dump(mode="json"))

    def _log(self, metric_log: MetricLog, step: int, rate: float) -> str:
        """Write the row of a step. Returns a summary for the progress bar."""
        self.window.check_finite(self.folder)
        self.window.collect()
        row = self.window.row(step, self.count, self.settings.batch_size, rate)
        times = self.window.times(step, self.settings.batch_size)
        row |= self._diagnostics()
        measured = self._measure(step)
        metric_log.write(row | measured.row, times, measured.picture)
        self.window.reset()  # measuring is no part of a step
        return note_of(row, times, self.objective.monitor.note if self.objective.monitor else "")

    def _measure(self, step: int) -> Measured:
        """What the monitor finds after a step, if it is due: on rank 0, the others wait."""
        monitor, measured = self.objective.monitor, Measured()
        if monitor is None or not monitor.due(step):
            return measured
        self.stop.waits_for = f"measuring at step {step:,}"
        if self.sharded:
            self._update_model()
        if is_rank0():
            measured = monitor.measure(step)
        barrier()
        return measured

    def _diagnostics(self) -> dict[str, Any]:
        """On rank 0, which alone writes the row."""
        if self.objective.diagnostics is None:
            return {}
        if self.sharded:
            self._update_model()
        return self.objective.diagnostics() if is_rank0() else {}

    def _update_model(self) -> None:
        """Under FSDP: copy the weights to `objective.model` of rank 0."""
        weights = full_state(self.model.module)
        if is_rank0():
            self.objective.model.load_state_dict(weights)

    def _converged(self) -> bool:
        """What the first process, which alone has the diagnostics, says."""
        asks = is_rank0() and self.objective.converged()
        return bool(all_reduce(torch.tensor(int(asks))))

    def _finish(self) -> None:
        if self.objective.average is not None:
            self.objective.model.load_state_dict(self.objective.average.model.state_dict())
        if self.sharded:
            self._update_model()
            for value in self.objective.model.state_dict().values():
                broadcast(value)
        set_checkpointing(self.objective.model.eval(), False)
        forget_drop_path(self.objective.model)

    def _load(self) -> int:
        """Load the newest checkpoint. Returns the number of steps done."""
        found = load_checkpoint(self.folder, self.model.module, self.optimizer)
        if found is None:
            if (self.folder / INFO).is_file():
                raise MoceError(
                    f"{self.folder} is finished: no checkpoint to resume from; use --overwrite to retrain"
                )
            return 0
        self.window.load(found.window)
        if self.objective.diagnostics is not None:
            self.objective.diagnostics.state.update(found.diagnostics)
        if self.objective.average is not None:
            self.objective.average.load(found.average)
        return found.step

    def _save(self, checkpoints: CheckpointWriter, step: int) -> None:
        self.window.collect()
        self.window.check_finite(self.folder)
        self.unreadable.write()
        diagnostics = self.objective.diagnostics
        average = self.objective.average
        state = Checkpoint(
            step,
            self.window.state(),
            diagnostics.state if diagnostics else {},
            average.state() if average else {},
        )
        checkpoints.save(state, self.model.module, self.optimizer)

    def _set_rate(self, number: int) -> float:
        settings = self.settings
        peak = settings.base_lr * settings.batch_size / 256
        rate = learning_rate(number, self.total, peak, settings.warmup, settings.min_lr)
        set_learning_rate(self.optimizer, rate)
        return rate

    def _step(self, number: int, batches: Iterator[Batch]) -> None:
        """Forward and backward over the micro-batches of a batch, then an optimizer step."""
        # Layers with random numbers (drop path) draw the same after a resume, but not the same in
        # two processes.
        place = number * world_size() + rank()
        seed = keyed_generator(self.settings.seed, Stream.STEP, place).initial_seed()
        torch.manual_seed(seed)
        rows, _ = self.order(number)
        leading = int(self.objective.uses_mixup and world_size() > 1)
        step = Step(number, rows, num_leading=leading)
        micro_batches = shard_micro_batches(len(rows), self.settings.micro_batch_size)
        for step.micro_batch, own in enumerate(micro_batches):
            with self.window.waiting():
                batch = next(batches)
            share = (own.stop - own.start) / len(rows)
            last = step.micro_batch == len(micro_batches) - 1
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                # DDP and FSDP average the gradients over the processes; the sum is needed.
                losses = self._backward(batch, step, share * world_size())
            self.window.add(losses, share)
        self.idle.drop_gradients()
        if self.settings.clip_grad is not None:
            norm = self.settings.clip_grad  # values that are not finite are found when logging
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        if self.objective.average is not None:
            self.objective.average.update(self.model.module)
        self.optimizer.zero_grad(set_to_none=True)
        self.window.steps += 1

    def _thread_parallel(self) -> AbstractContextManager[ThreadParallel | None]:
        """Computes a batch in chunks; on a CPU with a single process."""
        alone = self.fabric.device.type == "cpu" and world_size() == 1
        model = self.objective.model
        if self.objective.chunk_size is None or not alone or draws_in_turn(model):
            return nullcontext()
        return ThreadParallel(model, self.fabric.setup_module, self.fabric.backward)

    def _backward(self, batch: Batch, step: Step, scale: float) -> Losses:
        """The losses of a micro-batch; its gradients, times `scale`, are accumulated."""
        objective, size = self.objective, self.objective.chunk_size
        batch = objective.prepared(batch, step)

        def loss(model: nn.Module, part: Any) -> Losses:
            draw_drop_path(model, self.settings.seed, part)
            return objective.loss(model, part, step)

        if self.thread_parallel is None or size is None:
            losses = loss(self.model, batch)
            self.fabric.backward(losses["loss"] * scale)
            return losses
        if (order := objective.chunk_order(batch)) is not None:
            batch = batch.take(order)
        of_chunk = lambda model, chunk: loss(model, batch.take(chunk))  # noqa: E731
        return self.thread_parallel.backward(of_chunk, len(batch.rows), size, scale)
