"""What every training verb does first: settle device and precision, open or reopen its folder."""

from __future__ import annotations

from typing import TypeVar

import torch

from moce.config import RunSettings, TrainingSettings
from moce.hardware import prepare
from moce.runs import CONFIG, check_unchanged, open_folder, read_config

R = TypeVar("R", bound=RunSettings)


def start(settings: R) -> tuple[R, torch.device]:
    """The settings with device and precision resolved, and the device; the folder is there.

    A resumed run keeps what it was resolved to at first. Raises MoceError if the folder is in use,
    or a resumed run's settings have changed.
    """
    resume = isinstance(settings, TrainingSettings) and settings.resume
    known = read_config(settings.out) if resume and (settings.out / CONFIG).is_file() else {}
    kept = {
        name: known[name]
        for name in ("device", "precision")
        if name in known and getattr(settings, name) == "auto"
    }
    settings = settings.model_copy(update=kept)
    device, precision = prepare(settings)
    settings = settings.model_copy(update={"device": device.type, "precision": precision})
    if known:
        check_unchanged(settings.out, settings)
    open_folder(settings.out, overwrite=settings.overwrite, resume=resume)
    return settings, device
