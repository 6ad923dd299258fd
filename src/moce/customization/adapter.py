"""Adapting to a task from where its images are: default settings, related images, resuming."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.config import AdaptationSettings
from moce.customization.adaptation import ADAPTATION, CHECKS, Adaptation, adapt, default_steps
from moce.customization.related_images import Load, RelatedImages
from moce.data.dataset import ImageDataset
from moce.data.load import load_images, temporary_file
from moce.data.readers.sample import Sample
from moce.errors import MoceError
from moce.models.encoder import input_channels, input_size
from moce.models.mae import MAE, MAESpec
from moce.runs.resume import check_unchanged, recorded_settings, resumes


@dataclass
class Adapter:
    """Adapts masked autoencoders to tasks.

    related: of the pool; None to train on the task's images alone. load: images by encoder.
    start: opens the output folder, once everything is checked.
    """

    related: RelatedImages | None
    load: Load
    start: Callable[[AdaptationSettings, ImageDataset], None]
    device: torch.device

    def run(
        self, task: Sequence[Sample], spec: MAESpec, mae: MAE, settings: AdaptationSettings
    ) -> Adaptation:
        """Adapt `mae` in place to a task's images, which must not be test images.

        Raises MoceError if there are none, or the output folder is finished already.
        """
        if not len(task):
            raise MoceError(f"{settings.images} has test images only; adaptation needs others")
        related: list[Sample] = []
        unreadable: list[tuple[str, str]] = []
        if self.related is not None and settings.steps is not None:
            count = round(settings.steps * settings.batch_size * settings.pool_share)
            related = self.related.find(task, count, settings.seed)
            unreadable = self.related.skipped
        images = self.load([*task, *related], mae.encoder)
        images = replace(images, skipped=images.skipped + unreadable)
        if resumes(settings):
            if settings.micro_batch_size == "auto":
                size = recorded_settings(settings).micro_batch_size
                settings = settings.model_copy(update={"micro_batch_size": size})
            check_unchanged(settings)
            if (settings.out / ADAPTATION).is_file():
                raise MoceError(f"{settings.out} is finished; use --overwrite to adapt again")
        self.start(settings, images)
        of_pool = {sample.id for sample in related}
        num_task = sum(name not in of_pool for name in images.ids)
        return adapt(spec, mae, images, num_task, settings, self.device)


def adapt_samples(
    task: Sequence[Sample],
    spec: MAESpec,
    mae: MAE,
    related: RelatedImages | None,
    settings: AdaptationSettings,
    device: torch.device,
) -> Adaptation:
    """Like `Adapter.run`, without a run folder: nothing is left on disk.

    settings: `out` is replaced by a temporary folder; without `steps`, as many as by default.
    """
    with tempfile.TemporaryDirectory(prefix="moce-") as folder:
        settings = settings.model_copy(update={"out": Path(folder)})
        settings = with_steps(settings, settings.steps or "auto", len(task))
        start = lambda *_: None  # noqa: E731 - there is no run to resume
        adapter = Adapter(related, load_for, start, device)
        return adapter.run(task, spec, mae, settings)


def load_for(samples: Sequence[Sample], vit: VisionTransformer) -> ImageDataset:
    """Load images for an encoder; tiny ones keep their size, as in training."""
    size, channels = input_size(vit), input_channels(vit)
    return load_images(samples, size, temporary_file(), channels=channels, keep_tiny=True)


def with_steps(
    settings: AdaptationSettings, steps: int | Literal["auto"], num_images: int
) -> AdaptationSettings:
    """The settings for a task of `num_images`, and how often to log, check and save."""
    if steps == "auto":
        steps = default_steps(num_images, settings.batch_size, settings.pool_share)
    every = max(1, steps // CHECKS)
    return settings.model_copy(update={"steps": steps, "log_every": every, "save_every": every})
