"""moce pretrain: a masked autoencoder from unlabeled images (stage 0)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moce.commands.setup import read_images, resolve, start_run
from moce.config import PretrainSettings
from moce.data.dataset import ImageDataset
from moce.errors import counted
from moce.models.encoder import RGB, EncoderSpec, per_channel
from moce.models.mae import MAE, MAESpec
from moce.runs.model import last_metrics, write_model
from moce.training.objectives import MAEObjective
from moce.training.trainer import fit
from moce.weights.resolve import check_arguments, from_timm, overrides_of, start_from

PRETRAINED = "pretrained"


@dataclass
class PretrainResult:
    """run: the folder; loss: mean reconstruction loss of the last logged steps; images: how many."""

    run: Path
    loss: float
    images: int

    def summary(self) -> str:
        return f"pre-trained on {counted(self.images, 'image')}, loss {self.loss:.4f}: {self.run}"


def run(settings: PretrainSettings) -> PretrainResult:
    settings, device = resolve(settings)
    spec, mae = _build(settings)
    images = read_images(settings, settings.data, mae.encoder)
    start_run(settings, images)
    objective = MAEObjective("pretrain", mae, spec.encoder, images, settings)
    fit(objective, settings, device, settings.precision)
    return save_mae(settings.out, spec, mae, images)


def save_mae(folder: Path, spec: MAESpec, mae: MAE, images: ImageDataset) -> PretrainResult:
    """Write the finished run of a masked autoencoder."""
    loss = last_metrics(folder)["loss"]
    info = {"spec": spec.to_dict(), "metrics": {"loss": loss}, "images": len(images)}
    write_model(folder, "mae", mae.state_dict(), info)
    return PretrainResult(folder, loss, len(images))


def _build(settings: PretrainSettings) -> tuple[MAESpec, MAE]:
    if settings.init is not None and settings.init != PRETRAINED:
        return start_from(settings.init, settings)
    check_arguments(settings.model_args)
    if settings.init == PRETRAINED:
        return from_timm(settings.model, settings)
    overrides = overrides_of(settings)
    channels = int(overrides.model_args.get("in_chans", RGB))
    mean = per_channel("mean", overrides.mean, settings.mean, channels)
    std = per_channel("std", overrides.std, settings.std, channels)
    encoder = EncoderSpec(settings.model, overrides.model_args, mean, std)
    spec = MAESpec(encoder, *overrides.decoder, settings.mask_ratio, settings.norm_pix)
    return spec, spec.build()
