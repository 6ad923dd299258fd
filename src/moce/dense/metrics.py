"""COCO's average precision of boxes and masks; the confusion matrix of semantic segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from moce.dense import rle
from moce.dense.types import IGNORE, Instances
from moce.errors import MoceError
from moce.runtime.distributed import all_gather, all_reduce

Prediction = Mapping[str, Any]
Kind = Literal["bbox", "segm"]
PREFIX: dict[Kind, str] = {"bbox": "box", "segm": "mask"}
# COCO's twelve figures, in the order of its evaluation.
STATISTICS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)


class DetectionMetric:
    """COCO's average precision and recall, over the images of all processes.

    classes: their names; has_masks: masks are judged beside boxes.
    """

    def __init__(self, classes: Sequence[str], has_masks: bool) -> None:
        self.classes, self.has_masks = list(classes), has_masks
        self._images: dict[str, tuple[tuple[int, int], dict[str, Any], Instances]] = {}

    def add(
        self, sample_id: str, size: tuple[int, int], prediction: Prediction, truth: Instances
    ) -> None:
        """Add an image of size (h, w); one that was added before is replaced.

        prediction: boxes [m, 4] as those of Instances, scores [m], labels [m] and, with masks,
        masks: m RLEs. Arrays or tensors on the CPU.
        """
        plain = {name: np.asarray(prediction[name]) for name in ("boxes", "scores", "labels")}
        masks = list(prediction["masks"]) if self.has_masks else None
        self._images[sample_id] = (size, {**plain, "masks": masks}, truth)

    def compute(self) -> dict[str, float]:
        """box_ap, box_ap50, ..., box_ar_100, and box_ap/CLASS; with masks mask_ap, ... too. All in 0..1.

        What nothing in the truth counts for, such as box_ap_small without small objects, is left
        out. All processes have to call it. Raises MoceError without faster-coco-eval.
        """
        images = {k: v for shard in all_gather(self._images) for k, v in shard.items()}
        ordered = [images[name] for name in sorted(images)]  # equal scores keep this order
        kinds: list[Kind] = ["bbox", "segm"] if self.has_masks else ["bbox"]
        return {k: v for kind in kinds for k, v in self._figures(ordered, kind).items()}

    def _figures(self, images: list[Any], kind: Kind) -> dict[str, float]:
        result = evaluate_coco(
            _truth(images, self.classes, self.has_masks), _results(images, kind), kind
        )
        prefix = PREFIX[kind]
        figures = {f"{prefix}_{n}": v for n, v in zip(STATISTICS, result[0], strict=True)}
        by_class = zip(self.classes, result[1], strict=True)
        figures |= {f"{prefix}_ap/{name}": value for name, value in by_class}
        return {name: float(value) for name, value in figures.items() if value >= 0}


def evaluate_coco(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: Kind
) -> tuple[list[float], list[float]]:
    """COCO's twelve figures, and the AP of each category; -1 where nothing in the truth counts."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        raise MoceError("COCO's metric needs a library: pip install 'moce[dense]'") from None
    if not truth["annotations"]:
        return [-1.0] * len(STATISTICS), [-1.0] * len(truth["categories"])
    library_truth = COCO(truth)
    evaluation = COCOeval_faster(library_truth, _load_results(library_truth, results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # all sizes, most detections
    by_class = [_mean_of_valid(precision[:, :, k]) for k in range(precision.shape[2])]
    return [float(value) for value in evaluation.stats[: len(STATISTICS)]], by_class


def _load_results(truth: Any, results: list[dict[str, Any]]) -> Any:
    if results:
        return truth.loadRes(results)
    empty = type(truth)()  # loadRes refuses an empty list
    empty.dataset = {**truth.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _mean_of_valid(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _truth(images: list[Any], classes: Sequence[str], has_masks: bool) -> dict[str, Any]:
    """The truth as COCO's JSON holds it; images and categories are numbered from 1."""
    annotations: list[dict[str, Any]] = []
    for number, (_, _, truth) in enumerate(images, 1):
        for row, area in enumerate(areas_of(truth)):
            entry: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": int(truth.classes[row]) + 1,
                "bbox": xywh(truth.boxes[row]),
                "area": float(area),
                "iscrowd": int(truth.crowd[row]),
            }
            if has_masks and truth.masks is not None:
                entry["segmentation"] = truth.masks[row]
            annotations.append(entry)
    return {
        "images": [
            {"id": number, "height": size[0], "width": size[1]}
            for number, (size, _, _) in enumerate(images, 1)
        ],
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(classes, 1)],
    }


def areas_of(truth: Instances) -> np.ndarray:
    """[n] float64: the areas that the source states, else those of the masks, else of the boxes."""
    if truth.areas is not None:
        return truth.areas
    if truth.masks is not None:
        return rle.areas(truth.masks)
    boxes = truth.boxes.astype(np.float64)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def xywh(box: np.ndarray) -> list[float]:
    """COCO's x, y, width, height of a box x1, y1, x2, y2."""
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]


def _results(images: list[Any], kind: Kind) -> list[dict[str, Any]]:
    results = []
    for number, (_, prediction, _) in enumerate(images, 1):
        for row, score in enumerate(prediction["scores"]):
            entry: dict[str, Any] = {
                "image_id": number,
                "category_id": int(prediction["labels"][row]) + 1,
                "score": float(score),
            }
            if kind == "bbox":
                entry["bbox"] = xywh(prediction["boxes"][row])
            else:  # with a box beside it, its area would be taken for the mask's
                entry["segmentation"] = prediction["masks"][row]
            results.append(entry)
    return results


class SegmentationMetric:
    """How often each class is predicted for each, over the pixels of all images and processes."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self._counts = np.zeros((len(classes), len(classes)), np.int64)

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """prediction, truth: [h, w] integers; pixels whose truth is `IGNORE` do not count.

        Raises ValueError if the shapes differ or a class does not exist.
        """
        if prediction.shape != truth.shape:
            raise ValueError(f"a prediction {prediction.shape} of a mask {truth.shape}")
        counted, number = truth != IGNORE, len(self.classes)
        rows, columns = truth[counted].astype(np.int64), prediction[counted].astype(np.int64)
        for values in (rows, columns):
            if values.size and (values.min() < 0 or values.max() >= number):
                raise ValueError(f"classes {values.min()} to {values.max()} of {number}")
        pairs = np.bincount(rows * number + columns, minlength=number**2)
        self._counts += pairs.reshape(number, number)

    @property
    def confusion(self) -> np.ndarray:
        """[C, C] int64: pixels by true class (rows) and predicted class. All processes have to call it."""
        return all_reduce(torch.from_numpy(self._counts.copy())).numpy()

    def compute(self) -> dict[str, float]:
        """miou, pixel_accuracy, mean_accuracy and iou/CLASS, in 0..1. All processes have to call it.

        miou is the mean over the classes that occur in the truth or in a prediction, mean_accuracy
        over those in the truth; the others are left out.
        """
        confusion = self.confusion
        right, true = confusion.diagonal(), confusion.sum(1)
        union = true + confusion.sum(0) - right
        iou = {n: r / u for n, r, u in zip(self.classes, right, union, strict=True) if u}
        if not true.sum():
            return {}
        return {
            "miou": float(np.mean(list(iou.values()))),
            "pixel_accuracy": float(right.sum() / true.sum()),
            "mean_accuracy": float(np.mean(right[true > 0] / true[true > 0])),
            **{f"iou/{name}": float(value) for name, value in iou.items()},
        }
