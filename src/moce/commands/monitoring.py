"""What --monitor asks for: the tasks, a sample of the training images, and how often they are measured."""

from __future__ import annotations

import math

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.commands.setup import check_skipped, pixel_file
from moce.config import MonitoredSettings
from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.data.loader import BatchOrder
from moce.errors import counted
from moce.evaluation.monitor import SHOWN, Dense, Mixture, Monitor
from moce.evaluation.task import by_name, load_task
from moce.models.encoder import fit_of, input_channels, input_shape
from moce.runtime.progress import log
from moce.training.checkpoint import has_checkpoint
from moce.training.trainer import Objective, total_steps

TIMES = 10  # measurements of a run
SHARE = 0.01  # of the images seen in training, where nothing is asked for
FEWEST = 512  # images of the sample; at least two for each dimension of the features


def set_monitor(
    objective: Objective,
    settings: MonitoredSettings,
    images: ImageDataset,
    network: Dense | Mixture,
    device: torch.device,
) -> None:
    """Give an objective its monitor, unless nothing is asked for and it would cost more than 1 %.

    Call it before the run's folder is opened: it raises MoceError if a task cannot be used.
    """
    total = total_steps(settings, len(images))
    count = min(len(images), max(FEWEST, 2 * network.vit.embed_dim))
    every = interval(settings, total, count)
    if every is None:
        return
    asked = bool(settings.monitor or settings.monitor_every)
    shape, fit = input_shape(network.vit), fit_of(network.vit)
    tasks = {
        name: load_task(data, shape, pixel_file(settings), settings.max_skipped, fit)
        for name, data in by_name(settings.monitor).items()
    }
    sample = _sample(settings, images, network.vit, count)
    network.prepare(tasks, sample.subset(range(min(SHOWN, len(sample)))))
    objective.monitor = Monitor(
        network,
        sample,
        tasks,
        every,
        settings.log_every,
        total,
        from_start=asked and not (settings.resume and has_checkpoint(settings.out)),
        cheap=not asked,
        folder=settings.out,
        device=device,
        precision=settings.precision,
    )


def interval(settings: MonitoredSettings, total: int, count: int) -> int | None:
    """Steps between measurements of `count` images in `total` steps; None: there are none.

    An image of a measurement costs about as much as one of a step, whose encoder sees a quarter of it,
    forward and backward.
    """
    if settings.monitor_every is not None:
        return settings.monitor_every
    times = TIMES
    if not settings.monitor:
        assert settings.batch_size is not None
        times = min(TIMES, int(SHARE * total * settings.batch_size / count))
    return math.ceil(total / times) if times > 1 else None


def _sample(
    settings: MonitoredSettings, images: ImageDataset, vit: VisionTransformer, count: int
) -> ImageDataset:
    """Training images to measure on: those of the first steps, which the seed decides on."""
    order = BatchOrder(len(images), count, settings.seed, images.far_files)
    rows = order(0)[0].tolist()
    if images.stored is not None:
        return images.subset(rows)
    samples = [images.original(row) for row in rows]
    fit, channels = fit_of(vit), input_channels(vit)
    read = load_images(samples, fit, pixel_file(settings), channels=channels, required=False)
    check_skipped(read, settings.max_skipped)
    if read.skipped:
        log(f"{counted(len(read.skipped), 'image')} of {count} to measure RankMe on cannot be read")
    return read
