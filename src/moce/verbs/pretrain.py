"""moce pretrain: a masked autoencoder from unlabelled images (stage 0)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from moce.config import PretrainSettings
from moce.data.images import ImageSet, load_images
from moce.errors import MoceError
from moce.features import input_size
from moce.loading import load_mae
from moce.models.encoder import EncoderSpec
from moce.models.mae import MAE, MAESpec
from moce.runs import last_metrics, write_model, write_skipped
from moce.training.loop import fit
from moce.training.progress import say
from moce.training.stages import mae_stage
from moce.verbs.start import open_run, pixel_store, settle

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
    if mae.encoder.in_chans != 3:
        raise MoceError(f"images have 3 channels; in_chans {mae.encoder.in_chans} is not supported")
    images = load_images(settings.data, input_size(mae.encoder), pixel_store(settings))
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
    name, mean, std = settings.model, settings.mean, settings.std
    if pretrained and timm.is_model(name):
        cfg: Any = timm.models.get_pretrained_cfg(name)
        given = settings.model_fields_set
        mean = mean if "mean" in given else tuple(cfg.mean)
        std = std if "std" in given else tuple(cfg.std)
    return EncoderSpec(name, arguments, mean, std)
