"""What every verb with a run folder does first, before it writes anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.config import CustomizeSettings, EmbedSettings, ProbeSettings, RunSettings, Settings
from moce.data.images import ImageSet, load_images
from moce.data.sources import paths_of
from moce.data.storage import passing_file
from moce.errors import MoceError
from moce.features import input_channels, input_size
from moce.hardware import prepare
from moce.inputs import check_inputs, describe_inputs, write_inputs
from moce.parsing import parse
from moce.progress import say
from moce.runs import (
    CONFIG,
    check_folder,
    check_unchanged,
    open_folder,
    read_config,
    write_config,
    write_skipped,
)

FEW_STEPS = 500  # below which the published recipes for labelled tasks stop half trained

R = TypeVar("R", bound=RunSettings)


def settle(settings: R) -> tuple[R, torch.device]:
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


def _as_started(settings: R) -> R:
    """The settings of config.yaml, overridden by those that were given now."""
    given = settings.model_dump(mode="json", by_alias=True, include=settings.model_fields_set)
    for name in ("device", "precision"):
        if given.get(name) == "auto":
            del given[name]
    return parse(type(settings), {**read_config(settings.out), **given})


def open_run(settings: RunSettings) -> Path:
    """The output folder, ready to write to: called when all inputs have been found good."""
    return open_folder(settings.out, settings)


def begin(settings: RunSettings, *sets: ImageSet) -> None:
    """Open the folder of a run that can be resumed, and note what it is made from: images and weights.

    Raises MoceError, before anything is written, if a resumed run was made from other ones.
    """
    inputs = describe_inputs(settings, *sets)
    if _resumes(settings):
        check_inputs(settings.out, inputs)
    open_run(settings)
    write_config(settings.out, settings)  # first: it says what the folder is
    write_inputs(settings.out, inputs)
    write_skipped(settings.out, [pair for images in sets for pair in images.skipped], say)


def given(settings: Settings) -> set[str]:
    """Settings unlike their defaults: a resumed run has read all of them from its config.yaml."""
    fields = type(settings).model_fields
    return {n for n in settings.model_fields_set if getattr(settings, n) != fields[n].default}


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
    unused = sorted(given(settings) & set(names))
    if unused:
        flags = " and ".join(_flag(name, getattr(settings, name)) for name in unused)
        raise MoceError(f"{reason}: leave out {flags}")


def _flag(name: str, value: object) -> str:
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def _resumes(settings: RunSettings) -> bool:
    return bool(getattr(settings, "resume", False))


def hint_few_steps(settings: Settings, steps: int, advice: str) -> None:
    """Say it where the default batch of a published recipe leaves few steps for few images."""
    if steps < FEW_STEPS and "batch_size" not in settings.model_fields_set:
        say(f"only {steps} steps: the defaults are made for many images; for few, {advice}")


def read_images(settings: RunSettings, data: str, vit: VisionTransformer) -> ImageSet:
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
    return passing_file() if out is None else out.with_name(f".{out.name}.pixels")
