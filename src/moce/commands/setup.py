"""What every command does first: device, output folder, images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer

from moce.config import ChosenSettings, RunSettings, RuntimeSettings, Settings
from moce.config.base import DataSettings
from moce.config.facts import facts_of
from moce.config.usage import check_used, explicitly_set, flag
from moce.data.dataset import ImageDataset
from moce.data.divide import learning_rows
from moce.data.load import Choose, load_images, open_images, temporary_file
from moce.data.readers.factory import check_packs, paths_of
from moce.data.readers.sample import Sample
from moce.errors import MoceError, counted
from moce.models.encoder import fit_of, input_channels
from moce.runs.folder import check_folder, open_folder
from moce.runs.model import write_config, write_skipped
from moce.runs.resume import (
    check_inputs,
    check_unchanged,
    describe_images,
    describe_weights,
    recorded_settings,
    resumes,
    write_inputs,
)
from moce.runtime import device
from moce.runtime.progress import log
from moce.training.defaults import choose_training
from moce.training.loggers import check_loggers

R = TypeVar("R", bound=RunSettings)
C = TypeVar("C", bound=ChosenSettings)


class Described(Protocol):
    """What is recorded of a set of images."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[Any]: ...
    @property
    def skipped(self) -> list[tuple[str, str]]: ...


FEW_STEPS = 500  # below which the published recipes for labeled tasks stop half trained


# --- settings and device --------------------------------------------------------------------------


def prepare(settings: RuntimeSettings) -> tuple[torch.device, str]:
    """Set threads and seed; (device, precision), resolved."""
    return device.prepare(settings.seed, settings.device, settings.precision, settings.threads)


def resolve(settings: R) -> tuple[R, torch.device]:
    """The settings with device and precision resolved, and the device. Writes nothing.

    A resumed run keeps its recorded settings where none are given now. Raises MoceError if some
    differ that must not, or are not used.
    """
    asked, resumed = settings, False
    check_output(settings)
    if resumes(settings):
        settings, resumed = recorded_settings(settings), True
    check_used(settings, asked)
    check_loggers(getattr(settings, "loggers", ()))
    where, precision = prepare(settings)
    settings = settings.model_copy(update={"device": where.type, "precision": precision})
    if resumed:
        check_unchanged(settings)
    return settings, where


def refuse_unused(settings: Settings, names: Iterable[str], reason: str) -> None:
    """Raise MoceError if a setting was given that would be ignored."""
    unused = sorted(explicitly_set(settings) & set(names))
    if unused:
        flags = " and ".join(flag(name, getattr(settings, name)) for name in unused)
        raise MoceError(f"{reason}: leave out {flags}")


def choose(
    settings: C,
    count: int,
    encoder: torch.nn.Module,
    device: torch.device,
    rate_of_weights: float | None = None,
) -> C:
    """The settings with length, batch and rate for `count` images where they are not given.

    rate_of_weights: base_lr for the weights that training starts from.
    """
    parameters = sum(weight.numel() for weight in encoder.parameters())
    accelerated = device.type != "cpu"
    chosen = choose_training(settings, count, parameters, accelerated, rate_of_weights)
    return settings.model_copy(update=chosen)


def changed(before: Settings, after: Settings) -> list[str]:
    """The names of the settings whose values differ."""
    return [name for name, value in after if value != getattr(before, name)]


def hint_few_steps(settings: Settings, steps: int, advice: str) -> None:
    """Log advice where the default batch of a published recipe leaves few steps for few images."""
    if steps < FEW_STEPS and "batch_size" not in settings.model_fields_set:
        log(
            f"only {counted(steps, 'step')}: the defaults are made for many images; for few, {advice}"
        )


# --- output ---------------------------------------------------------------------------------------


def inputs_of(settings: Settings) -> list[tuple[str, Path]]:
    """Every setting that names an input, with each path that it names."""
    found: list[tuple[str, Path]] = []
    for name, facts in facts_of(settings).items():
        value = getattr(settings, name)
        if value is not None and "input" in facts:
            for one in value if isinstance(value, tuple) else (value,):
                paths = paths_of(one) if facts["input"] == "images" else [Path(one)]
                found += [(name, path) for path in paths]
    return found


def check_output(settings: Any) -> None:
    """Raise MoceError unless the output folder can be written to; nothing is changed."""
    check_folder(
        settings.out,
        overwrite=settings.overwrite,
        resume=getattr(settings, "resume", None),
        inputs=inputs_of(settings) if settings.overwrite else (),
    )


def open_output(settings: Any) -> Path:
    """Create or empty the output folder, and lock it; called once all inputs are checked."""
    keep = getattr(settings, "resume", False)
    return open_folder(settings.out, partial(check_output, settings), keep=keep)


def start_run(settings: RunSettings, *sets: Described) -> None:
    """Open the folder of a run that can be resumed, and record its settings and inputs.

    Raises MoceError, before anything is written, if a resumed run was started with other inputs.
    """
    weights = {
        name: getattr(settings, name)
        for name, facts in facts_of(settings).items()
        if facts.get("input") == "weights" and getattr(settings, name)
    }
    labeled = chain.from_iterable(zip(s.ids, s.labels, strict=True) for s in sets)
    inputs = {"data": describe_images(labeled), **describe_weights(weights)}
    if resumes(settings):
        check_inputs(settings.out, inputs)
    open_output(settings)
    write_config(settings.out, settings)  # first: it marks the folder as a run
    write_inputs(settings.out, inputs)
    write_skipped(settings.out, [pair for images in sets for pair in images.skipped], log)


def check_file(
    out: Path, inputs: list[Path], example: str, *, overwrite: bool, any_suffix: bool = False
) -> None:
    """Raise MoceError unless the file `out` can be written. example: a name with its suffix."""
    suffix = Path(example).suffix
    if out.suffix != suffix and not any_suffix:
        raise MoceError(f"--out must be a file that ends in {suffix}, not {out.name}")
    if out.is_dir():
        raise MoceError(f"{out} is a folder; give a file to write, such as {out / example}")
    if out.exists() and not overwrite:
        raise MoceError(f"{out} exists; add --overwrite to replace it, or choose another file")
    if out.resolve() in {path.resolve() for path in inputs}:
        raise MoceError(f"{out} is the input; choose another file")


# --- images ---------------------------------------------------------------------------------------


def read_images(
    settings: DataSettings,
    data: str | Sequence[Sample],
    vit: VisionTransformer,
    choose: Choose | None = learning_rows,
    *,
    keep_tiny: bool = False,
) -> ImageDataset:
    """The images of a DATA argument, or these, in the size and channels of an encoder.

    choose: which of those of a DATA argument; by default those that a model may learn from.
    keep_tiny: see `load_images`.
    """
    return load_images(
        data,
        fit_of(vit),
        pixel_file(settings),
        channels=input_channels(vit),
        max_skipped=settings.max_skipped,
        choose=choose if isinstance(data, str) else None,
        keep_tiny=keep_tiny,
    )


def check_skipped(images: ImageDataset, most: float) -> None:
    """Raise MoceError if more than the share `most` of the images could not be read, or all."""
    skipped, total = len(images.skipped), len(images) + len(images.skipped)
    if not len(images) or skipped > most * total:
        name, reason = images.skipped[0]
        raise MoceError(
            f"{skipped} of {total} images cannot be read, more than --max-skipped {most:g} allows: "
            f"{reason} (as {name})"
        )


def training_images(
    settings: DataSettings,
    data: str,
    vit: VisionTransformer,
    samples: Sequence[Sample] | None = None,
) -> ImageDataset:
    """The images of a DATA argument to train on: not decoded yet, unless they are tiny.

    samples: all of DATA, if they are listed already.
    """
    if samples is not None:
        check_packs(data, fit_of(vit).size)
    return open_images(
        data if samples is None else samples,
        fit_of(vit),
        pixel_file(settings),
        channels=input_channels(vit),
        max_skipped=settings.max_skipped,
        choose=learning_rows,
        name=data,
    )


def decoded(
    settings: DataSettings, data: str, images: ImageDataset, vit: VisionTransformer
) -> ImageDataset:
    """Those of these images of a DATA argument that can be read, decoded to the size of an encoder."""
    if images.originals is None:
        everything = read_images(settings, data, vit)
        row_of = {name: row for row, name in enumerate(everything.ids)}
        return everything.subset([row_of[name] for name in images.ids])
    samples = [images.original(row) for row in range(len(images))]
    store, channels = pixel_file(settings), input_channels(vit)
    return load_images(samples, fit_of(vit), store, channels=channels, required=False)


def pixel_file(settings: Any) -> Path:
    """The temporary file, beside the output, for pixels that do not fit into memory."""
    out = settings.out
    return temporary_file() if out is None else out.with_name(f".{out.name}.pixels")
