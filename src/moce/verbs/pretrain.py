"""moce pretrain: a masked autoencoder from unlabelled images (stage 0)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from moce.config import PretrainSettings
from moce.data.images import ImageSet
from moce.errors import MoceError
from moce.loading import load_mae
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE, MAESpec
from moce.runs import last_metrics, write_model, write_skipped
from moce.training.loop import fit
from moce.training.progress import say
from moce.training.stages import mae_stage
from moce.verbs.start import open_run, read_images, settle

RGB, OTHERWISE = 3, 0.5  # mean and deviation of images of another number of channels
PRETRAINED = "pretrained"
FIXED = frozenset({"num_classes", "global_pool", "fc_norm", "checkpoint_path", "cache_dir"})
OF_THE_MODEL = frozenset(
    {"model", "model_args", "img_size", "mean", "std", "mask_ratio", "norm_pix"}
    | {"decoder_dim", "decoder_depth", "decoder_heads"}
)


@dataclass
class PretrainResult:
    """run: the folder; loss: mean reconstruction loss of the last logged steps; images: how many."""

    run: Path
    loss: float
    images: int

    def summary(self) -> str:
        return f"pre-trained on {self.images} images, loss {self.loss:.4f}: {self.run}"


def run(settings: PretrainSettings) -> PretrainResult:
    settings, device = settle(settings)
    spec, mae = _build(settings)
    images = read_images(settings, settings.data, mae.encoder)
    open_run(settings)
    write_skipped(settings.out, images.skipped, say)
    stage = mae_stage("pretrain", mae, spec.encoder, images, settings)
    fit(stage, settings, device, settings.precision)
    return save_mae(settings.out, spec, mae, images)


def save_mae(folder: Path, spec: MAESpec, mae: MAE, images: ImageSet) -> PretrainResult:
    """Write the finished run of a masked autoencoder."""
    loss = last_metrics(folder)["loss"]
    info = {"spec": spec.to_dict(), "metrics": {"loss": loss}, "images": len(images)}
    write_model(folder, "mae", mae.state_dict(), info)
    return PretrainResult(folder, loss, len(images))


def _build(settings: PretrainSettings) -> tuple[MAESpec, MAE]:
    if settings.init is not None and settings.init != PRETRAINED:
        given = sorted(settings.model_fields_set & OF_THE_MODEL)
        if given:
            raise MoceError(
                f"{given[0]} comes from the run of --init {settings.init}; leave it out"
            )
        return load_mae(Path(settings.init))
    fixed = sorted(set(settings.model_args) & FIXED)
    if fixed:
        raise MoceError(
            f"model_args must not set {fixed[0]}: the encoder gives tokens, with no head"
        )
    arguments = dict(settings.model_args)
    if settings.img_size is not None:
        arguments["img_size"] = settings.img_size
    pretrained = settings.init == PRETRAINED
    spec = MAESpec(
        encoder=_encoder_spec(settings, arguments, pretrained),
        decoder_dim=settings.decoder_dim,
        decoder_depth=settings.decoder_depth,
        decoder_heads=settings.decoder_heads,
        mask_ratio=settings.mask_ratio,
        norm_pix=settings.norm_pix,
    )
    try:
        return spec, spec.build(pretrained=pretrained)
    except OSError as error:  # the hub client's errors derive from it
        raise MoceError(f"cannot get timm's weights of {settings.model}: {error}") from None


def _encoder_spec(settings: PretrainSettings, arguments: dict, pretrained: bool) -> EncoderSpec:
    """Pixels are normalised as timm's weights want it, unless the settings say otherwise."""
    name, channels = settings.model, int(arguments.get("in_chans", RGB))
    usual = settings.mean, settings.std
    if pretrained and timm.is_model(name):
        cfg: Any = timm.models.get_pretrained_cfg(name)
        usual = tuple(cfg.mean), tuple(cfg.std)
    if channels != RGB:
        usual = (OTHERWISE,), (OTHERWISE,)
    mean, std = (
        _per_channel(
            key, getattr(settings, key) if key in settings.model_fields_set else value, channels
        )
        for key, value in zip(("mean", "std"), usual, strict=True)
    )
    return EncoderSpec(name, arguments, mean, std)


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value per channel. Raises MoceError if there are neither as many nor one for all."""
    if len(values) not in (1, channels):
        raise MoceError(
            f"--{name} has {len(values)} values for {channels} channels; give one or {channels}"
        )
    return values * channels if len(values) == 1 else values
