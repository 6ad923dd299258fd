"""Detection and segmentation as an objective: augmented images, the network's losses, layer-wise decay."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from moce.config import FinetuneSettings
from moce.data.loader import Loading
from moce.data.run_ahead import run_ahead
from moce.dense.augment import TargetView, Views
from moce.dense.dataset import DenseImages
from moce.dense.network import vit_of
from moce.dense.sampling import ImageSampling
from moce.dense.types import IGNORE
from moce.runtime.device import to_device
from moce.runtime.system import worker_threads
from moce.training.freeze import freeze_first
from moce.training.optimizer import ParameterGroup, parameter_groups
from moce.training.thread_parallel import Losses
from moce.training.trainer import Objective, Step


@dataclass
class DenseBatch:
    """rows: [b] int64 into the data set; epochs: [b] int64; images: [b, c, size, size] uint8.

    targets: as `Views` gives.
    """

    rows: Tensor
    epochs: Tensor
    images: Tensor
    targets: list[TargetView]


class _AsIs:
    """Arguments of a network that Fabric must not cast: in bf16, boxes would be off by pixels."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def _unpack(network: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as the network takes them; a forward pre-hook."""
    first = arguments[0]
    return first.values if isinstance(first, _AsIs) else arguments


class DenseObjective(Objective):
    """Trains a detector or a segmenter (dense/network.py). config: of the network."""

    images: DenseImages

    def __init__(
        self,
        network: Any,
        config: dict[str, Any],
        images: DenseImages,
        settings: FinetuneSettings,
    ) -> None:
        super().__init__(config["task"], network, images, _groups(network, settings))
        network.register_forward_pre_hook(_unpack)
        self._detects = config["task"] == "detect"
        self._sampling = ImageSampling(network, settings.seed) if self._detects else None
        low, *high = settings.jitter
        self._views = Views(
            size=config["image_size"],
            jitter=(low, high[0] if high else low),
            hflip=settings.hflip,
            fill=tuple(255.0 * value for value in config["mean"]),
            by_longer=self._detects,
            with_masks=config["masks"],
            seed=settings.seed,
        )

    def batches(
        self, order: Iterable[tuple[Tensor, Tensor]], device: torch.device, loading: Loading
    ) -> Generator[DenseBatch]:
        """Each batch is read and augmented by a thread, several batches at a time."""
        threads = worker_threads()
        jobs = (partial(self._read, rows, epochs) for rows, epochs in order)
        with closing(run_ahead(jobs, threads, threads)) as batches:
            for batch in batches:
                yield _placed(batch, device)

    def _read(self, rows: Tensor, epochs: Tensor) -> DenseBatch:
        views = [
            self._views(*self.images.read(row), row, epoch)
            for row, epoch in zip(rows.tolist(), epochs.tolist(), strict=True)
        ]
        images = torch.stack([image for image, _ in views])
        return DenseBatch(rows, epochs, images, [target for _, target in views])

    def loss(self, model: nn.Module, batch: Any, step: Step) -> Losses:
        images = batch.images.float() / 255
        if self._sampling is not None:
            self._sampling.start(batch.rows, batch.epochs)
            losses = model(_AsIs(list(images), batch.targets))
            losses = self._sampling.over_processes(losses, len(images))
            return {"loss": torch.stack(list(losses.values())).sum(), **losses}
        target = torch.stack(batch.targets)
        total = nn.functional.cross_entropy(
            model(_AsIs(images)), target, ignore_index=IGNORE, reduction="sum"
        )
        # Ignored pixels count as right, so that a batch's loss is the mean over its images.
        return {"loss": total / target.numel()}


def _placed(batch: DenseBatch, device: torch.device) -> DenseBatch:
    targets: list[Any] = [
        {name: to_device(value, device) for name, value in target.items()}
        if isinstance(target, dict)
        else to_device(target, device)
        for target in batch.targets
    ]
    return DenseBatch(batch.rows, batch.epochs, to_device(batch.images, device), targets)


def _groups(network: nn.Module, settings: FinetuneSettings) -> list[ParameterGroup]:
    """The encoder with layer-wise decayed learning rates, as far as it trains; the rest with the full one."""
    vit = vit_of(network)
    encoder = set(vit.parameters())
    rest = parameter_groups(
        (p for p in network.parameters() if p not in encoder), settings.weight_decay
    )
    freeze_first(vit, settings.freeze)
    decayed = param_groups_layer_decay(
        vit,
        weight_decay=settings.weight_decay,
        layer_decay=settings.layer_decay,
        no_weight_decay_list=vit.no_weight_decay(),
    )
    return decayed + rest
