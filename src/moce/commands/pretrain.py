"""moce pretrain: a masked autoencoder from unlabeled images (stage 0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moce.commands.monitoring import set_monitor
from moce.commands.setup import changed, choose, resolve, start_run, training_images
from moce.config import PretrainSettings
from moce.data.dataset import ImageDataset
from moce.data.readers.factory import open_source
from moce.data.readers.packed import find_packed
from moce.data.readers.sample import Sample
from moce.data.sample_sizes import count_and_side
from moce.errors import counted
from moce.evaluation.monitor import Dense
from moce.models.encoder import RGB, EncoderSpec, per_channel
from moce.models.mae import MAE, MAESpec
from moce.runs.model import last_metrics, write_model
from moce.runtime.progress import log
from moce.training.announce import announce
from moce.training.defaults import (
    BASE,
    OFFICIAL,
    choose_model,
    default_lr,
    official_weights_here,
)
from moce.training.objectives import MAEObjective
from moce.training.trainer import fit
from moce.weights.resolve import check_arguments, from_timm, overrides_of, start_from

PRETRAINED = "pretrained"
FEW_IMAGES, PHOTOGRAPH = 50_000, 160  # images; pixels of the shorter side


@dataclass
class PretrainResult:
    """run: the folder; loss: mean reconstruction loss of the last logged steps; images: how many."""

    run: Path
    loss: float
    images: int

    def summary(self) -> str:
        return f"pre-trained on {counted(self.images, 'image')}, loss {self.loss:.4f}: {self.run}"


def run(settings: PretrainSettings) -> PretrainResult:
    asked, device = resolve(settings)
    settings, samples = _with_model(asked, device)
    spec, mae = _build(settings)
    images = training_images(settings, settings.data, mae.encoder, samples)
    rate = None if settings.init is None else default_lr(settings.init)
    settings = choose(settings, len(images), mae.encoder, device, rate)
    objective = MAEObjective("pretrain", mae, spec.encoder, images, settings)
    set_monitor(objective, settings, images, Dense(mae, mae.encoder, spec.encoder, mae), device)
    start_run(settings, images)
    announce(objective, settings, device, spec.encoder.name, mae.encoder, changed(asked, settings))
    fit(objective, settings, device, settings.precision)
    return save_mae(settings.out, spec, mae, images)


def save_mae(folder: Path, spec: MAESpec, mae: MAE, images: ImageDataset) -> PretrainResult:
    """Write the finished run of a masked autoencoder."""
    loss = last_metrics(folder)["loss"]
    info = {"spec": spec.to_dict(), "metrics": {"loss": loss}, "images": len(images)}
    write_model(folder, "mae", mae.state_dict(), info)
    return PretrainResult(folder, loss, len(images))


def _with_model(
    settings: PretrainSettings, device: torch.device
) -> tuple[PretrainSettings, Sequence[Sample] | None]:
    """With a model that fits the images and the device, unless one or weights are given.

    And all images, if they had to be listed for it.
    """
    if settings.init not in (None, PRETRAINED) and settings.model == BASE:
        return settings.model_copy(
            update={"model": None}
        ), None  # as recipes of 0.1.0 have it, not given
    if settings.model is not None or settings.init is not None:
        return settings, None
    samples = open_source(settings.data) if find_packed(settings.data) is None else None
    count, side = count_and_side(settings.data, samples)
    chosen = choose_model(settings, count, side, accelerated=device.type != "cpu")
    if count < FEW_IMAGES and side >= PHOTOGRAPH:
        where = "on this machine" if official_weights_here() else "from the hub"
        log(
            f"for {count:,} photographs, official weights ({where}, CC BY-NC 4.0) are a better start: "
            f"--init {OFFICIAL}"
        )
    return settings.model_copy(update=chosen), samples


def _build(settings: PretrainSettings) -> tuple[MAESpec, MAE]:
    if settings.init is not None and settings.init != PRETRAINED:
        return start_from(settings.init, settings)
    check_arguments(settings.model_args)
    if settings.init == PRETRAINED:
        return from_timm(settings.model or BASE, settings)
    overrides = overrides_of(settings)
    channels = int(overrides.model_args.get("in_chans", RGB))
    mean = per_channel("mean", overrides.mean, settings.mean, channels)
    std = per_channel("std", overrides.std, settings.std, channels)
    encoder = EncoderSpec(settings.model or BASE, overrides.model_args, mean, std)
    spec = MAESpec(encoder, *overrides.decoder, settings.mask_ratio, settings.norm_pix)
    return spec, spec.build()
