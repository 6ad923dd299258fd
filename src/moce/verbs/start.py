"""What every verb with a run folder does first, before it writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from moce.config import RunSettings, TrainingSettings
from moce.hardware import prepare
from moce.runs import CONFIG, check_unchanged, open_folder, read_config

R = TypeVar("R", bound=RunSettings)


def settle(settings: R) -> tuple[R, torch.device]:
    """The settings with device and precision resolved, and the device. Writes nothing.

    A resumed run keeps what it was resolved to at first. Raises MoceError if a resumed run's
    settings have changed.
    """
    resumed = _resumes(settings) and (settings.out / CONFIG).is_file()
    known = read_config(settings.out) if resumed else {}
    kept: dict[str, Any] = {
        name: known[name]
        for name in ("device", "precision")
        if name in known and getattr(settings, name) == "auto"
    }
    settings = settings.model_copy(update=kept)
    device, precision = prepare(settings)
    settings = settings.model_copy(update={"device": device.type, "precision": precision})
    if known:
        check_unchanged(settings.out, settings)
    return settings, device


def open_run(settings: RunSettings) -> Path:
    """The output folder, ready to write to: called when all inputs have been found good."""
    return open_folder(settings.out, settings)


def _resumes(settings: RunSettings) -> bool:
    return isinstance(settings, TrainingSettings) and settings.resume


def pixel_store(settings: RunSettings) -> Path:
    """Where pixels go that the memory has no room for: a passing file beside the output folder."""
    return settings.out.with_name(f".{settings.out.name}.pixels")
