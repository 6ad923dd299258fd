"""AP agrees with pycocotools; mIoU with scikit-learn; both do not depend on the number of processes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_folders import HEIGHT, WIDTH, disc, write_coco
from launched import torchrun
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import balanced_accuracy_score, jaccard_score

from moce.dense import rle
from moce.dense.metrics import PREFIX, STATISTICS, DetectionMetric, SegmentationMetric
from moce.dense.readers import read_dense
from moce.dense.types import IGNORE, Instances


def guess(truth: Instances, seed: int) -> dict:
    """Predictions near the truth, with wrong classes, doubles and false alarms among them."""
    rng = np.random.default_rng(seed)
    boxes, labels, masks = [], [], []
    for row in range(len(truth)):
        for _ in range(2):
            moved = truth.boxes[row] + rng.normal(0, 1.2, 4)
            boxes.append(moved)
            labels.append(truth.classes[row] if rng.random() < 0.8 else rng.integers(3))
            center = (moved[:2] + moved[2:]) / 2
            masks.append(disc(*center, rng.uniform(2, 6)))
    boxes.append([2, 2, 11, 12])
    labels.append(2)
    masks.append(disc(6, 6, 4))
    return {
        "boxes": torch.tensor(np.array(boxes, np.float32)),
        "scores": torch.tensor(rng.uniform(size=len(boxes)).round(1)),  # equal scores, too
        "labels": torch.tensor(np.array(labels)),
        "masks": rle.encode(np.stack(masks)),
    }


def many_images() -> list[tuple]:
    """Arguments of `DetectionMetric.add` for seven images."""
    rng, images = np.random.default_rng(5), []
    for number in range(7):
        masks = rle.encode(
            np.stack([disc(*rng.uniform(8, 24, 2), rng.uniform(3, 7)) for _ in range(3)])
        )
        classes, crowd = rng.integers(0, 3, 3), np.zeros(3, bool)
        truth = Instances(rle.boxes(masks), classes, tuple(masks), crowd)
        guessed = {k: np.asarray(v) for k, v in guess(truth, number).items() if k != "masks"}
        guessed["masks"] = guess(truth, number)["masks"]
        images.append((f"{number}.png", (HEIGHT, WIDTH), guessed, truth))
    return images


def many_masks() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(6)
    return [(rng.integers(0, 3, (8, 9)), rng.integers(0, 3, (8, 9))) for _ in range(5)]


def official(folder: Path, source, predictions: dict, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """pycocotools' twelve figures, and the AP of every category, from COCO's own file."""
    results = []
    for sample in source.samples:
        guessed = predictions[sample.id]
        for row in range(len(guessed["boxes"])):
            x1, y1, x2, y2 = guessed["boxes"][row].tolist()
            entry = {
                "image_id": sample.image_id,
                "category_id": source.category_ids[int(guessed["labels"][row])],
                "score": float(guessed["scores"][row]),
            }
            if kind == "bbox":
                entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            else:
                entry["segmentation"] = guessed["masks"][row]
            results.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(folder / "annotations/instances_val2017.json")
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    by_class = [p[p > -1].mean() if (p > -1).any() else -1 for p in np.moveaxis(precision, 2, 0)]
    return evaluation.stats, np.array(by_class)


def test_ap_of_boxes_and_masks_is_that_of_pycocotools(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "coco", ("val2017",), count=12)
    source = read_dense(str(folder), None)
    predictions = {s.id: guess(s.target(), n) for n, s in enumerate(source.samples)}
    metric = DetectionMetric(source.classes, source.has_masks)
    for sample in source.samples:
        metric.add(sample.id, sample.size, predictions[sample.id], sample.target())
    found = metric.compute()
    for kind in ("bbox", "segm"):
        figures, by_class = official(folder, source, predictions, kind)
        assert 0.05 < figures[0] < 0.9  # neither all right nor all wrong
        names = [f"{PREFIX[kind]}_{name}" for name in STATISTICS]
        names += [f"{PREFIX[kind]}_ap/{name}" for name in source.classes]
        for name, value in zip(names, [*figures, *by_class], strict=True):
            assert found.get(name, -1) == pytest.approx(value, abs=1e-6), name
    assert "box_ap_large" not in found and "box_ap/owl" not in found  # nothing in the truth


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    job = torchrun(Path(__file__).with_name("run_dense_metrics.py"), tmp_path / "figures.json")
    assert job.wait(300) == 0, job.stderr and job.stderr.read()
    detection, segmentation = (
        DetectionMetric(["a", "b", "c"], True),
        SegmentationMetric(["x", "y", "z"]),
    )
    for image in reversed(many_images()):  # in another order
        detection.add(*image)
    for prediction, truth in many_masks():
        segmentation.add(prediction, truth)
    found = {**detection.compute(), **segmentation.compute()}
    assert json.loads((tmp_path / "figures.json").read_text()) == found
    assert 0 < found["mask_ap"] < 1 and 0 < found["miou"] < 1


def test_truth_predicted_is_perfect_and_nothing_predicted_is_zero() -> None:
    masks = np.stack([disc(10, 10, 5), disc(30, 20, 6)])
    packed = rle.encode(masks)
    boxes = rle.boxes(packed)
    truth = Instances(boxes, np.array([0, 1]), tuple(packed), np.zeros(2, bool))
    right = {"boxes": boxes, "scores": np.ones(2), "labels": np.array([0, 1]), "masks": packed}
    none = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0), "masks": []}
    for prediction, expected in ((right, 1.0), (none, 0.0)):
        metric = DetectionMetric(["a", "b"], True)
        metric.add("x", (HEIGHT, WIDTH), prediction, truth)
        found = metric.compute()
        for name in ("box_ap", "mask_ap", "box_ap/b", "mask_ap75"):
            assert found[name] == pytest.approx(expected, abs=1e-6)


def test_without_any_truth_there_are_no_figures() -> None:
    metric = DetectionMetric(["a"], False)
    empty = Instances(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), None, np.zeros(0, bool))
    metric.add("x", (9, 9), {"boxes": [[1, 1, 3, 3]], "scores": [0.5], "labels": [0]}, empty)
    assert metric.compute() == {}


def test_iou_and_accuracy_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    classes = ["sky", "sea", "sand", "never"]
    metric = SegmentationMetric(classes)
    truths = [rng.integers(0, 3, (9, 11)) for _ in range(4)]
    guesses = [np.where(rng.random((9, 11)) < 0.6, t, rng.integers(0, 3, (9, 11))) for t in truths]
    for truth in truths:
        truth[rng.random(truth.shape) < 0.1] = IGNORE
    for truth, prediction in zip(truths, guesses, strict=True):
        metric.add(prediction, truth)
    y, p = np.concatenate(truths).ravel(), np.concatenate(guesses).ravel()
    y, p = y[y != IGNORE], p[y != IGNORE]
    found = metric.compute()
    by_class = jaccard_score(y, p, average=None)
    assert [found[f"iou/{name}"] for name in classes[:3]] == pytest.approx(by_class.tolist())
    assert found["miou"] == pytest.approx(by_class.mean()) and "iou/never" not in found
    assert found["pixel_accuracy"] == pytest.approx((y == p).mean())
    assert found["mean_accuracy"] == pytest.approx(balanced_accuracy_score(y, p))


def test_a_class_that_does_not_exist_or_another_shape_raises() -> None:
    metric = SegmentationMetric(["a", "b"])
    with pytest.raises(ValueError, match="of 2"):
        metric.add(np.full((2, 2), 2), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match="of 2"):
        metric.add(np.zeros((2, 2), int), np.full((2, 2), -1))
    with pytest.raises(ValueError, match="of a mask"):
        metric.add(np.zeros((2, 3), int), np.zeros((3, 2), int))
