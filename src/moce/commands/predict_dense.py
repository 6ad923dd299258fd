"""moce predict with a detector or segmenter: COCO JSON or mask PNGs, and pictures."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from moce.commands.setup import open_output
from moce.config import PredictSettings
from moce.data.readers.factory import open_source
from moce.data.readers.sample import Sample, error_line
from moce.data.run_ahead import run_ahead
from moce.dense.images import whole_pixels
from moce.dense.mask_files import write_class_names, write_mask
from moce.dense.metrics import xywh
from moce.dense.pictures import draw_instances, draw_mask
from moce.dense.predictor import Prediction, Predictor, chosen, in_batches, load_predictor
from moce.errors import MoceError
from moce.runs.files import atomic, make_folder, write_text
from moce.runs.model import write_config, write_skipped
from moce.runtime.progress import log, meter
from moce.runtime.system import worker_threads

MASKS, PICTURES = "predicted_masks", "predicted_pictures"
Read = tuple[Sample, np.ndarray | None, str]  # pixels [c, h, w] uint8, or why there are none


def run(settings: PredictSettings, device: torch.device, precision: str) -> tuple[int, int]:
    """Predict all images of DATA; how many could be read, and how many not."""
    predictor = load_predictor(settings.model, device, precision)
    samples = open_source(settings.data)
    if not samples:
        raise MoceError(f"no images in {settings.data}")
    open_output(settings)
    write_config(settings.out, settings)
    output = _Output(settings, predictor, file_names([sample.id for sample in samples]))
    skipped: list[tuple[str, str]] = []
    with meter("predict", len(samples)) as progress:
        for batch in in_batches(_read(samples, predictor.channels), settings.batch_size):
            skipped += [(sample.id, reason) for sample, pixels, reason in batch if pixels is None]
            known = [(sample, pixels) for sample, pixels, _ in batch if pixels is not None]
            found = predictor([pixels for _, pixels in known])
            for (sample, pixels), prediction in zip(known, found, strict=True):
                output.add(sample.id, pixels, prediction)
            progress.advance(count=len(batch))
    write_skipped(settings.out, skipped, log)
    if len(skipped) == len(samples) or len(skipped) > settings.max_skipped * len(samples):
        raise MoceError(
            f"{len(skipped)} of the {len(samples)} images of {settings.data} cannot be read, the first: "
            f"{skipped[0][0]}: {skipped[0][1]}; fix them, or raise --max-skipped"
        )
    output.finish()
    return len(samples) - len(skipped), len(skipped)


def _read(samples: Sequence[Sample], channels: int) -> Generator[Read]:
    """Every image as upright pixels, read by threads ahead of their use."""

    def read(sample: Sample) -> Read:
        try:
            return sample, whole_pixels(sample.open(), channels), ""
        except Exception as error:  # decoders raise errors of any type
            return sample, None, error_line(error)

    threads = worker_threads()
    jobs = (partial(read, sample) for sample in samples)
    with closing(run_ahead(jobs, threads, 2 * threads)) as found:
        yield from found


def file_names(ids: list[str]) -> dict[str, str]:
    """A relative path of a PNG for every id: its own with another suffix, or added to it if two agree."""
    safe = {name: [p for p in PurePosixPath(name).parts if p not in ("/", "..")] for name in ids}
    paths = {name: PurePosixPath(*parts) for name, parts in safe.items()}
    replaced = {name: str(path.with_suffix(".png")) for name, path in paths.items()}
    if len(set(replaced.values())) == len(replaced):
        return replaced
    return {name: f"{path}.png" for name, path in paths.items()}


class _Output:
    """Writes predictions as they come."""

    def __init__(
        self, settings: PredictSettings, predictor: Predictor, names: dict[str, str]
    ) -> None:
        self._settings, self._predictor, self._names = settings, predictor, names
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []

    def add(self, name: str, pixels: np.ndarray, prediction: Prediction) -> None:
        number = len(self._images) + 1
        height, width = pixels.shape[1:]
        image = {"id": number, "file_name": name, "height": height, "width": width}
        self._images.append(image)
        if isinstance(prediction, dict):
            self._annotations += self._coco(number, prediction)
        else:
            path = self._settings.out / MASKS / self._names[name]
            make_folder(path.parent)
            write_mask(path, prediction)
        if number <= self._settings.pictures:
            self._draw(self._settings.out / PICTURES / self._names[name], pixels, prediction)

    def finish(self) -> None:
        out, classes = self._settings.out, self._predictor.classes
        if self._predictor.task == "segment":
            write_class_names(out, classes)
            return
        categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": categories,
        }
        write_text(out / "predictions.json", json.dumps(content) + "\n")

    def _coco(self, image: int, found: dict[str, Any]) -> list[dict[str, Any]]:
        annotations: list[dict[str, Any]] = []
        for row in np.flatnonzero(found["scores"] >= self._settings.min_score).tolist():
            box = xywh(found["boxes"][row])
            entry = {
                "id": len(self._annotations) + len(annotations) + 1,
                "image_id": image,
                "category_id": int(found["labels"][row]) + 1,
                "bbox": [round(value, 2) for value in box],
                "area": round(box[2] * box[3], 2),
                "iscrowd": 0,
                "score": round(float(found["scores"][row]), 5),
            }
            if found["masks"] is not None:
                mask = found["masks"][row]
                entry["segmentation"] = {**mask, "counts": mask["counts"].decode("ascii")}
            annotations.append(entry)
        return annotations

    def _draw(self, path: Path, pixels: np.ndarray, prediction: Prediction) -> None:
        classes = self._predictor.classes
        if isinstance(prediction, dict):
            shown = prediction["scores"] >= self._settings.picture_score
            picture = draw_instances(pixels, chosen(prediction, shown), classes)
        else:
            picture = draw_mask(pixels, prediction, classes)
        make_folder(path.parent)
        with atomic(path) as temporary:
            picture.save(temporary, "PNG")
