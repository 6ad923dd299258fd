"""What every verb with a run folder does first, before it writes anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.config import CustomizeSettings, EmbedSettings, ProbeSettings, RunSettings, Settings
from moce.config.load import explicitly_set
from moce.data.dataset import ImageDataset
from moce.data.load import load_images, temporary_file
from moce.data.readers.factory import paths_of
from moce.errors import MoceError
from moce.models.encoder import input_channels, input_size
from moce.runs.folder import check_folder
from moce.runs.model import CONFIG
from moce.runs.resume import (
    R,
    _as_started,
    _resumes,
    check_unchanged,
)
from moce.runtime.device import prepare
from moce.runtime.progress import log

FEW_STEPS = 500  # below which the published recipes for labeled tasks stop half trained


def resolve(settings: R) -> tuple[R, torch.device]:
    """The settings with device and precision resolved, and the device. Writes nothing.

    A resumed run keeps the settings it was started with where none are given now. Raises
    MoceError if some are given that differ.
    """
    check_folder(settings.out, settings)
    resumed = _resumes(settings) and (settings.out / CONFIG).is_file()
    if resumed:
        settings = _as_started(settings)
    device, precision = prepare(settings)
    settings = settings.model_copy(update={"device": device.type, "precision": precision})
    if resumed:
        check_unchanged(settings.out, settings)
    return settings, device


def check_file(out: Path, example: str, data: str, *, overwrite: bool) -> None:
    """Raise MoceError unless the file `out` may be made from the images `data`. example: a name for it."""
    if out.is_dir():
        raise MoceError(f"{out} is a folder; give a file to write, such as {out / example}")
    if out.exists() and not overwrite:
        raise MoceError(f"{out} exists; add --overwrite to replace it, or choose another file")
    if out.resolve() in {path.resolve() for path in paths_of(data)}:
        raise MoceError(f"{out} is the input; choose another file")


def refuse_unused(settings: Settings, names: Iterable[str], reason: str) -> None:
    """Raise MoceError if a setting was given that would be ignored."""
    unused = sorted(explicitly_set(settings) & set(names))
    if unused:
        flags = " and ".join(_flag(name, getattr(settings, name)) for name in unused)
        raise MoceError(f"{reason}: leave out {flags}")


def _flag(name: str, value: object) -> str:
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def hint_few_steps(settings: Settings, steps: int, advice: str) -> None:
    """Say it where the default batch of a published recipe leaves few steps for few images."""
    if steps < FEW_STEPS and "batch_size" not in settings.model_fields_set:
        log(f"only {steps} steps: the defaults are made for many images; for few, {advice}")


def read_images(settings: RunSettings, data: str, vit: VisionTransformer) -> ImageDataset:
    """The images of a DATA argument as an encoder takes them."""
    return load_images(
        data,
        input_size(vit),
        pixel_store(settings),
        channels=input_channels(vit),
        max_skipped=settings.max_skipped,
    )


def pixel_store(settings: RunSettings | ProbeSettings | EmbedSettings | CustomizeSettings) -> Path:
    """Where pixels go that the memory has no room for: a passing file beside what is written."""
    out = settings.out
    return temporary_file() if out is None else out.with_name(f".{out.name}.pixels")
