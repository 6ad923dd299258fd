"""moce probe: what frozen features are worth on a labelled task."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from moce.config import ProbeSettings
from moce.features import extract_features, input_size
from moce.hardware import prepare
from moce.loading import load_backbone
from moce.runs import open_folder, write_json, write_skipped
from moce.training.progress import say
from moce.transfer.probe import knn_predictions, linear_predictions
from moce.transfer.task import draw_labels, load_task


@dataclass
class ProbeResult:
    """values: accuracy in 0..1 of every draw of labels; mean and std of them."""

    backbone: str
    task: str
    protocol: str
    metric: str
    labels: int
    values: list[float]
    mean: float
    std: float

    def summary(self) -> str:
        return (
            f"{self.protocol} probe of {self.backbone} on {self.task}: accuracy "
            f"{100 * self.mean:.1f} ± {100 * self.std:.1f} % "
            f"({len(self.values)} draws of {self.labels} labels)"
        )


def run(settings: ProbeSettings) -> ProbeResult:
    device, precision = prepare(settings)
    backbone = load_backbone(settings.backbone)
    task = load_task(settings.data, input_size(backbone.vit))
    train, test = (
        extract_features(
            backbone.vit,
            backbone.spec,
            images,
            device=device,
            precision=precision,
            pooling=settings.pooling,
            batch_size=settings.batch_size,
        ).numpy()
        for images in (task.train, task.test)
    )
    values, labels = [], 0
    for draw in range(settings.draws):
        rows = draw_labels(task.train_labels, settings.num_labels, settings.seed + draw)
        labels = len(rows)
        seen = (train[rows], task.train_labels[rows], test)
        if settings.kind == "linear":
            predicted = linear_predictions(*seen)
        else:
            predicted = knn_predictions(*seen, settings.neighbours)
        values.append(float((predicted == task.test_labels).mean()))
    result = ProbeResult(
        backbone=settings.backbone,
        task=settings.data,
        protocol=settings.kind,
        metric="accuracy",
        labels=labels,
        values=values,
        mean=float(np.mean(values)),
        std=float(np.std(values)),
    )
    if settings.out is not None:
        folder = open_folder(settings.out, settings)
        write_skipped(folder, task.skipped, say)
        write_json(folder / "results.json", asdict(result))
    return result
