"""moce probe: score frozen features on a labeled task."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from moce.commands.setup import hint_few_steps, open_output, pixel_store, prepare
from moce.config import ProbeSettings
from moce.config.usage import check_used
from moce.evaluation.metrics import choose_metric, confusion_counts, score
from moce.evaluation.probe import Probe, is_sgd
from moce.evaluation.sgd_probe import steps_of
from moce.evaluation.task import draw_labels, load_task
from moce.models.encoder import input_shape
from moce.runs.files import write_json
from moce.runs.model import write_skipped
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
        spread, shown = "", f"{self.labels} labels"
        if draws > 1:
            spread, shown = f" ± {100 * self.std:.1f}", f"{draws} draws of {shown}"
        return (
            f"{self.protocol} probe of {self.backbone} on {self.task}: {self.metric} "
            f"{100 * self.mean:.1f}{spread} % ({shown})"
        )


def run(settings: ProbeSettings) -> ProbeResult:
    check_used(settings, settings)
    device, precision = prepare(settings)
    backbone = load_backbone(settings.backbone)
    shape = input_shape(backbone.vit)
    task = load_task(settings.data, shape, pixel_store(settings), settings.max_skipped)
    metric = choose_metric(settings.metric, task)
    draws = [
        draw_labels(task.train_labels, settings.num_labels, settings.seed, number)
        for number in range(settings.draws)
    ]
    if is_sgd(settings):
        hint_few_steps(settings, steps_of(settings, len(draws[0]))[0], ADVICE)
    probe = Probe(backbone, task, settings, device, precision)
    classify = probe.classifier()
    all_scores = [classify(rows, number) for number, rows in enumerate(draws)]
    values = [score(metric, scores, task.test_labels) for scores in all_scores]
    result = ProbeResult(
        backbone=settings.backbone,
        task=settings.data,
        protocol=settings.kind,
        solver=settings.solver if settings.kind == "linear" else None,
        pooling=probe.pooling,
        metric=metric,
        labels=len(draws[0]),
        values=values,
        mean=float(np.mean(values)),
        std=float(np.std(values)),
        confusion=confusion_counts(all_scores, task),
    )
    if settings.out is not None:
        folder = open_output(settings)
        write_skipped(folder, task.skipped, log)
        write_json(folder / "results.json", asdict(result))
    return result
