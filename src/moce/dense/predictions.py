"""Predictions as files that other tools read: COCO JSON, PNG masks, and the names of their classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moce.dense import rle
from moce.dense.metrics import xywh
from moce.dense.pictures import class_colors
from moce.dense.types import IGNORE
from moce.runs.files import atomic, write_json, write_text

Predicted = tuple[str, int | None, tuple[int, int], Mapping[str, Any]]


def write_coco(
    path: Path,
    predicted: Iterable[Predicted],
    classes: Sequence[str],
    category_ids: Sequence[int] | None = None,
) -> None:
    """Write objects as COCO JSON; its annotations, with scores, are COCO's list of results, too.

    predicted: for every image its id, COCO's number of it if it has one, (h, w), and a prediction
    as `DetectionMetric.add` takes it. category_ids: COCO's numbers of the classes; default 1, 2, ...
    """
    numbers = list(category_ids or range(1, len(classes) + 1))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place, (name, image_id, size, prediction) in enumerate(predicted, 1):
        number = place if image_id is None else image_id
        images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        for row in range(len(prediction["scores"])):
            entry = _entry(prediction, row, numbers)
            annotations.append({"id": len(annotations) + 1, "image_id": number, **entry})
    categories = [{"id": n, "name": name} for n, name in zip(numbers, classes, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(path, content)


def _entry(prediction: Mapping[str, Any], row: int, numbers: Sequence[int]) -> dict[str, Any]:
    box = xywh(prediction["boxes"][row])
    entry: dict[str, Any] = {
        "category_id": numbers[int(prediction["labels"][row])],
        "bbox": [round(value, 3) for value in box],
        "score": round(float(prediction["scores"][row]), 6),
        "area": round(box[2] * box[3], 3),
        "iscrowd": 0,
    }
    if prediction.get("masks"):
        mask = prediction["masks"][row]
        entry["area"] = float(rle.areas([mask])[0])
        counts = mask["counts"]
        text = counts.decode("ascii") if isinstance(counts, bytes) else counts
        entry["segmentation"] = {"size": [int(n) for n in mask["size"]], "counts": text}
    return entry


def write_mask(path: Path, mask: np.ndarray, num_classes: int) -> None:
    """Write the class of every pixel, [h, w], as a PNG: the values are the classes, colored by a palette."""
    image = Image.fromarray(mask.astype(np.uint8))
    palette = np.zeros((IGNORE + 1, 3), np.uint8)
    palette[:num_classes] = class_colors(num_classes)
    palette[IGNORE] = 255
    image.putpalette(palette.tobytes())
    with atomic(path) as temporary:
        image.save(temporary, "PNG", optimize=True)


def write_class_names(path: Path, classes: Sequence[str]) -> None:
    """Write classes.txt: the name of class 0 in the first line, and so on."""
    write_text(path, "".join(f"{name}\n" for name in classes))
