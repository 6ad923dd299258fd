"""Accuracy, mean per-class accuracy, 11-point mAP and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_curve, recall_score

from moce.config import Metric
from moce.errors import MoceError
from moce.evaluation.task import Task

METRICS: tuple[str, ...] = get_args(Metric)
RECALL_LEVELS = np.linspace(0, 1, 11)


def score(metric: str, scores: np.ndarray, labels: np.ndarray) -> float:
    """The value of a metric, 0..1.

    scores: [n, C] floats, higher for likelier classes. labels: [n] class numbers for accuracy
    (top-1) and mean_per_class (the mean of every occurring class's accuracy); [n, C] of 0 and 1
    for map11 (VOC2007's 11-point interpolated average precision, mean over occurring classes).
    Raises MoceError if the metric is unknown or does not fit the labels.
    """
    if metric not in METRICS:
        raise MoceError(f"no metric '{metric}' (valid: {', '.join(METRICS)})")
    if metric == "map11":
        if labels.ndim != 2:
            raise MoceError("metric map11 needs several labels per image; use accuracy")
        return _mean_average_precision(scores, labels)
    if labels.ndim != 1:
        raise MoceError(f"metric {metric} needs one label per image; use map11")
    best = scores.argmax(axis=1)
    if metric == "mean_per_class":
        return float(recall_score(labels, best, labels=np.unique(labels), average="macro"))
    return float((best == labels).mean())


def confusion(scores: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """[C, C] int64 counts of images by true class (rows) and best-scored class (columns).

    scores: [n, C]; labels: [n] class numbers.
    """
    return confusion_matrix(labels, scores.argmax(axis=1), labels=range(num_classes))


def _mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    occurring = np.flatnonzero(labels.any(axis=0))
    if len(occurring) == 0:
        raise MoceError("metric map11 needs an image with a label")
    return float(
        np.mean([_average_precision(scores[:, number], labels[:, number]) for number in occurring])
    )


def _average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """One class against the rest. scores: [n]; truth: [n] of 0 and 1.

    The mean, over the recalls 0, 0.1 .. 1, of the best precision at that recall or a higher one.
    """
    precision, recall, _ = precision_recall_curve(truth, scores)
    precision, recall = precision[:-1], recall[:-1]  # scikit-learn appends precision 1 at recall 0
    # Recalls are fractions: 3/10 has to reach the level 0.3, which no float hits exactly.
    return float(np.mean([precision[recall >= level - 1e-9].max() for level in RECALL_LEVELS]))


def choose_metric(wanted: Metric | None, task: Task) -> Metric:
    """The metric of a task: the requested one, or the default for its labels.

    Raises MoceError if the requested one does not fit the task's labels.
    """
    fitting: tuple[Metric, ...] = ("map11",) if task.multi_label else ("accuracy", "mean_per_class")
    if wanted is None:
        return fitting[0]
    if wanted not in fitting:
        kind = "several labels" if task.multi_label else "one label"
        raise MoceError(
            f"metric {wanted} does not fit {task.name}, whose images have {kind} each: "
            f"use {' or '.join(fitting)}"
        )
    return wanted


def confusion_counts(draws: Sequence[np.ndarray], task: Task) -> list[list[int]] | None:
    """Test images by true class (rows) and predicted class, [C][C], summed over the draws.

    draws: scores [m, C] each. None where images have several labels.
    """
    if task.multi_label:
        return None
    counts = [confusion(scores, task.test_labels, len(task.classes)) for scores in draws]
    return np.sum(counts, axis=0).tolist()


def recalls(counts: list[list[int]], classes: Sequence[str]) -> dict[str, float]:
    """Test images of a class found to be of it, in %, by its name. counts: of `confusion_counts`."""
    return {
        name: 100 * row[number] / max(1, sum(row))
        for number, (name, row) in enumerate(zip(classes, counts, strict=True))
    }
