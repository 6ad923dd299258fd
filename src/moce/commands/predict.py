"""moce predict: a fine-tuned model applied to images of any source."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import torch

from moce.commands.setup import open_output, pixel_file, prepare, refuse_unused
from moce.config import PredictSettings, expand
from moce.data.load import load_images
from moce.errors import MoceError
from moce.evaluation.classify import load_classifier
from moce.models.encoder import input_shape
from moce.runs.files import write_text
from moce.runs.folder import check_folder
from moce.runs.model import read_info, write_config, write_skipped
from moce.runtime.progress import log

TABLE = "predictions.csv"
DRAWN = ("pictures", "picture_score", "min_score")  # settings of detection and segmentation


@dataclass
class PredictResult:
    """out: the folder; task: classify, detect or segment; images: predicted; skipped: unreadable."""

    out: Path
    task: str
    images: int
    skipped: int

    def summary(self) -> str:
        unread = f" ({self.skipped} unreadable)" if self.skipped else ""
        return f"predicted {self.images} images{unread}: {self.out}"


def run(settings: PredictSettings) -> PredictResult:
    model = expand(Path(settings.model))
    kind = read_info(model)["kind"]
    check_folder(settings.out, overwrite=settings.overwrite, inputs=[("model", model)])
    device, precision = prepare(settings)
    if kind == "classifier":
        return _classify(settings, model, device, precision)
    from moce.dense.predictor import KINDS  # its libraries take seconds to import

    if kind not in KINDS:
        raise MoceError(f"{model} is a run of kind '{kind}': give a folder of moce finetune")
    from moce.commands import predict_dense

    return PredictResult(settings.out, KINDS[kind], *predict_dense.run(settings, device, precision))


def _classify(
    settings: PredictSettings, model: Path, device: torch.device, precision: str
) -> PredictResult:
    """Write predictions.csv: id, the most probable class and its probability."""
    refuse_unused(settings, DRAWN, "classifiers do not use them")
    classifier = load_classifier(model)
    channels, *size = input_shape(classifier.vit)
    images = load_images(
        settings.data,
        (size[0], size[1]),
        pixel_file(settings),
        channels=channels,
        max_skipped=settings.max_skipped,
    )
    open_output(settings)
    write_config(settings.out, settings)
    write_skipped(settings.out, images.skipped, log)
    found = classifier.probabilities(images, device, precision, settings.batch_size)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "class", "probability"])
    for name, row in zip(images.ids, found, strict=True):
        best = int(row.argmax())
        table.writerow([name, classifier.classes[best], f"{row[best]:.6f}"])
    write_text(settings.out / TABLE, text.getvalue())
    return PredictResult(settings.out, "classify", len(images), len(images.skipped))
