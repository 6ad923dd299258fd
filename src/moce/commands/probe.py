"""moce probe: score frozen features on a labeled task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moce.commands.setup import hint_few_steps, open_output, pixel_file, prepare
from moce.config import ProbeSettings
from moce.config.usage import check_used
from moce.errors import counted
from moce.evaluation.evaluator import Evaluator
from moce.evaluation.metrics import choose_metric
from moce.evaluation.probe import choose_pooling, is_sgd
from moce.evaluation.results import make_row, write_rows
from moce.evaluation.sgd_probe import steps_of
from moce.evaluation.task import load_task
from moce.models.encoder import fit_of, input_shape
from moce.runs.model import write_config, write_skipped
from moce.runtime.progress import log
from moce.weights.from_runs import load_backbone

ADVICE = "see recipes/probe_small.yaml, or use --solver lbfgs"


@dataclass
class ProbeResult:
    """values: the metric, 0..1, of every draw of labels; mean and std are over the draws.

    solver: None for kind knn. confusion: test images by true and predicted class, summed over the
    draws; None if images have several labels.
    """

    backbone: str
    task: str
    protocol: str
    solver: str | None
    pooling: str
    metric: str
    labels: int
    values: list[float]
    mean: float
    std: float
    confusion: list[list[int]] | None

    def summary(self) -> str:
        draws = len(self.values)
        spread, labels = "", counted(self.labels, "label")
        if draws > 1:
            spread, labels = f" ± {100 * self.std:.1f}", f"{draws} draws of {labels}"
        return (
            f"{self.protocol} probe of {self.backbone} on {self.task}: {self.metric} "
            f"{100 * self.mean:.1f}{spread} % ({labels})"
        )


def run(settings: ProbeSettings) -> ProbeResult:
    check_used(settings, settings)
    device, precision = prepare(settings)
    backbone = load_backbone(settings.backbone)
    shape = input_shape(backbone.vit)
    task = load_task(
        settings.data, shape, pixel_file(settings), settings.max_skipped, fit_of(backbone.vit)
    )
    metric = choose_metric(settings.metric, task)
    evaluator = Evaluator(task, metric, settings, device, precision)
    labels = len(evaluator.draws[0])
    if is_sgd(settings):
        hint_few_steps(settings, steps_of(settings, labels)[0], ADVICE)
    outcome = evaluator.probe(backbone)
    found: dict[str, Any] = {
        "backbone": settings.backbone,
        "task": settings.data,
        "protocol": settings.kind,
        "solver": settings.solver if settings.kind == "linear" else None,
        "pooling": choose_pooling(settings, backbone),
        "metric": metric,
        "labels": labels,
        "values": outcome.values,
        "confusion": outcome.confusion,
    }
    if settings.out is not None:
        folder = open_output(settings)
        updates = {"device": device.type, "precision": precision}
        write_config(folder, settings.model_copy(update=updates))
        write_skipped(folder, task.skipped, log)
        row = make_row(**found, data=settings.data, reference=settings.backbone)
        write_rows(folder, [row])
    else:
        for name, reason in task.skipped:
            log(f"skipped {name}: {reason}")
    mean, std = float(np.mean(outcome.values)), float(np.std(outcome.values))
    return ProbeResult(**found, mean=mean, std=std)
