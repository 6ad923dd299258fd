"""moce predict for a classifier: its most probable classes for each image, part by part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from moce.commands.setup import open_output, refuse_unused
from moce.config import PredictSettings
from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.data.readers.factory import open_source
from moce.data.readers.packed import find_packed
from moce.errors import MoceError
from moce.evaluation.classify import Classifier, load_classifier
from moce.evaluation.predictions import open_table
from moce.models.encoder import fit_of, input_channels
from moce.runs.model import write_config, write_skipped
from moce.runtime.progress import log, meter

DRAWN = ("pictures", "picture_score", "min_score")  # settings of detection and segmentation
PART = 2048  # images that are decoded at once
BATCH = 256  # where no batch_size is given: the default is for the large images of dense tasks


def run(
    settings: PredictSettings, model: Path, device: torch.device, precision: str
) -> tuple[int, int]:
    """Write predictions.csv, .jsonl or .parquet; how many images it has, and how many are unreadable."""
    refuse_unused(settings, DRAWN, "classifiers do not use them")
    classifier = load_classifier(model)
    top = min(settings.top_k, len(classifier.classes))
    if top < settings.top_k:
        log(f"the model has {top} classes: all of them are written")
    total, parts = _parts(settings, classifier)
    first = next(parts)  # read before anything is written
    open_output(settings)
    write_config(settings.out, settings)
    path = settings.out / f"predictions.{settings.format}"
    batch_size = settings.batch_size if "batch_size" in settings.model_fields_set else BATCH
    skipped: list[tuple[str, str]] = []
    done = 0
    with (
        open_table(path, settings.format, classifier.classes, top) as add,
        meter("predict", total) as progress,
    ):
        for images in _chain(first, parts):
            skipped += images.skipped
            if len(images):
                add(
                    images.ids,
                    classifier.probabilities(images, device, precision, batch_size),
                )
            done += len(images)
            progress.advance(f"{len(skipped)} unreadable", len(images) + len(images.skipped))
        _check_skipped(settings, skipped, total)
    write_skipped(settings.out, skipped, log)
    return done, len(skipped)


def _parts(settings: PredictSettings, classifier: Classifier) -> tuple[int, Iterator[ImageDataset]]:
    """The number of images, and the images, decoded part by part."""
    fit, channels = fit_of(classifier.vit), input_channels(classifier.vit)
    if find_packed(settings.data) is not None:  # decoded, and mapped from its file
        images = load_images(settings.data, fit, channels=channels)
        return len(images), iter([images])
    samples = open_source(settings.data)
    return len(samples), (
        load_images(samples[start : start + PART], fit, channels=channels, required=False)
        for start in range(0, len(samples), PART)
    )


def _chain(first: ImageDataset, parts: Iterator[ImageDataset]) -> Iterator[ImageDataset]:
    yield first
    yield from parts


def _check_skipped(settings: PredictSettings, skipped: list[tuple[str, str]], total: int) -> None:
    """Raise MoceError if too many images are unreadable, or all."""
    if skipped and (len(skipped) == total or len(skipped) > settings.max_skipped * total):
        name, reason = skipped[0]
        raise MoceError(
            f"{len(skipped)} of {total} images cannot be read, more than --max-skipped "
            f"{settings.max_skipped:g} allows: {reason} (as {name})"
        )
