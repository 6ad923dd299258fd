"""What a run says before it starts: what is trained on what, for how long, and what was chosen."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import closing

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.config import TrainingSettings
from moce.config.usage import flag
from moce.data.loader import Loading
from moce.errors import counted
from moce.models.encoder import input_size
from moce.runtime.distributed import world_size
from moce.runtime.progress import duration, log
from moce.training.defaults import rate_for
from moce.training.trainer import Objective, Step, total_steps

PASSES = 3  # of which the fastest counts
MOST_MEASURED = {"cpu": 32}  # images; on accelerators a whole micro-batch, up to
MOST_ON_GPU = 256
WORTH_MEASURING = 300  # passes over the measured images; a shorter run ends soon anyway
LONG = 30 * 60.0  # seconds
LOOK = 5 * 60.0  # seconds of a first look
FEW_STEPS = 8  # per epoch


def announce(
    objective: Objective,
    settings: TrainingSettings,
    device: torch.device,
    name: str,
    encoder: VisionTransformer,
    chosen: Collection[str] = (),
) -> None:
    """Log a header: model, images, device, steps, rate, output, time, and the settings `chosen`."""
    for line in _header(objective, settings, device, name, encoder, chosen):
        log(line)


def _header(
    objective: Objective,
    settings: TrainingSettings,
    device: torch.device,
    name: str,
    encoder: VisionTransformer,
    chosen: Collection[str],
) -> list[str]:
    count, steps = len(objective.images), total_steps(settings, len(objective.images))
    total = sum(weight.numel() for weight in objective.model.parameters())
    height, width = input_size(encoder)
    processes = f", {world_size()} processes" if world_size() > 1 else ""
    rate = settings.base_lr * settings.batch_size / 256
    epochs = steps * settings.batch_size / count
    lines = [
        f"{objective.name}: {name}, {total / 1e6:.3g} M parameters, on {count:,} images of "
        f"{height}x{width}, {device.type}, {settings.precision}{processes}",
        f"{steps:,} steps of {settings.batch_size} images ({epochs:.3g} epochs), rate {rate:.3g} "
        f"(base_lr {settings.base_lr:g}), warm-up {counted(round(settings.warmup * steps), 'step')}; writes "
        f"{settings.out}",
    ]
    if chosen:
        flags = ", ".join(flag(name) for name in sorted(chosen))
        lines.append(f"chosen for these images and this device: {flags}")
    guess = rate_for(sum(weight.numel() for weight in encoder.parameters()))[1]
    if "base_lr" in chosen and guess and not _starts_from_weights(settings):
        lines.append(
            f"base_lr {settings.base_lr:g} is {guess}, not measured for this one: if the loss does not fall, "
            "try a tenth"
        )
    per_epoch = count / settings.batch_size
    if per_epoch < FEW_STEPS and "batch_size" not in chosen:
        lines.append(
            f"a batch of {settings.batch_size} leaves {per_epoch:.2g} steps per pass over "
            f"{count:,} images; a smaller --batch-size makes more"
        )
    seconds = _seconds(objective, settings, device, steps)
    if seconds is not None:
        lines.append(f"takes about {duration(seconds)}{_first_look(settings, steps, seconds)}")
    if objective.monitor is not None:
        lines += objective.monitor.header(seconds)
    return lines


def _starts_from_weights(settings: TrainingSettings) -> bool:
    """Whether the rate is that of weights, not of a model's size."""
    return any(getattr(settings, name, None) is not None for name in ("init", "mae"))


def _first_look(settings: TrainingSettings, steps: int, seconds: float) -> str:
    """The flag that makes a long run short."""
    if seconds < LONG:
        return ""
    share = LOOK / seconds
    if settings.steps is not None:
        return f"; for a first look: --steps {max(1, round(steps * share))}"
    epochs = settings.epochs * share
    return (
        f"; for a first look: --epochs {max(1, round(epochs)) if epochs >= 1 else f'{epochs:.1g}'}"
    )


def _seconds(
    objective: Objective, settings: TrainingSettings, device: torch.device, steps: int
) -> float | None:
    """How long the steps will take; None if they are few, or the model is sharded."""
    share = -(-settings.batch_size // world_size())
    most = MOST_MEASURED.get(device.type, MOST_ON_GPU)
    measured = min(share, settings.micro_batch_size or share, most)
    if steps * share < WORTH_MEASURING * measured or settings.strategy == "fsdp":
        return None
    return steps * share * seconds_per_image(objective, settings, device, measured)


def seconds_per_image(
    objective: Objective, settings: TrainingSettings, device: torch.device, count: int
) -> float:
    """Time of a forward and backward pass over `count` images, which leaves no trace in the model."""
    objective.model.to(device)
    rows = torch.arange(count) % len(objective.images)
    order = [(rows, torch.zeros_like(rows))]
    with closing(objective.batches(order, device, Loading(workers=0))) as batches:
        batch = next(batches)
    step = Step(-1, rows)  # what a loss keeps for one step must not be kept for the first
    prepared = objective.prepared(batch, step)
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = objective.loss(objective.model, prepared, step)["loss"]
        loss.backward()
        float(loss.detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    objective.model.zero_grad(set_to_none=True)
    return min(seconds) / count
