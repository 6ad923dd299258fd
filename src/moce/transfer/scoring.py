"""How a classifier's scores on the test images become a result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moce.config import Metric
from moce.errors import MoceError
from moce.transfer.metrics import confusion
from moce.transfer.task import Task


def choose_metric(wanted: Metric | None, task: Task) -> Metric:
    """The metric of a task: the wanted one, or what fits its labels.

    Raises MoceError if the wanted one is for other labels than the task has.
    """
    fitting: tuple[Metric, ...] = ("map11",) if task.multi_label else ("accuracy", "mean_per_class")
    if wanted is None:
        return fitting[0]
    if wanted not in fitting:
        kind = "several labels" if task.multi_label else "one label"
        raise MoceError(
            f"metric {wanted} does not fit {task.name}, whose images have {kind} each; "
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
