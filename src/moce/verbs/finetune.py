"""moce finetune: train a backbone end to end on a labelled task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moce.config import FinetuneSettings
from moce.customization.export import write_timm_folder
from moce.features import input_size
from moce.loading import load_backbone
from moce.runs import write_json, write_model, write_skipped
from moce.training.loop import fit
from moce.training.progress import say
from moce.transfer.finetune import build_classifier, finetune_stage, predict
from moce.transfer.task import draw_labels, load_task
from moce.verbs.start import open_run, pixel_store, settle


@dataclass
class FinetuneResult:
    """run: the folder, which timm loads as local-dir:RUN; accuracy: top-1 on the test images, 0..1."""

    run: Path
    accuracy: float
    labels: int

    def summary(self) -> str:
        return f"accuracy {100 * self.accuracy:.1f} % from {self.labels} labels: {self.run}"


def run(settings: FinetuneSettings) -> FinetuneResult:
    settings, device = settle(settings)
    backbone = load_backbone(settings.backbone)
    task = load_task(settings.data, input_size(backbone.vit), pixel_store(settings))
    open_run(settings)
    write_skipped(settings.out, task.skipped, say)
    rows = draw_labels(task.train_labels, settings.num_labels, settings.seed)
    vit = build_classifier(backbone, len(task.classes), settings.drop_path)
    stage = finetune_stage(
        vit, backbone.spec, task.train.subset(rows.tolist()), task.train_labels[rows], settings
    )
    fit(stage, settings, device, settings.precision)
    predicted = predict(vit, backbone.spec, task.test, device, settings.precision)
    accuracy = float((predicted == task.test_labels).mean())
    vit.cpu()
    head = {"num_classes": len(task.classes), "global_pool": "avg", "fc_norm": True}
    write_timm_folder(settings.out, vit, backbone.spec, **head)
    results = {"accuracy": accuracy, "labels": len(rows), "classes": task.classes}
    write_json(settings.out / "results.json", results)
    info = {"spec": backbone.spec.to_dict(), "metrics": {"accuracy": accuracy}, **results}
    write_model(settings.out, "classifier", vit.state_dict(), info)
    return FinetuneResult(settings.out, accuracy, len(rows))
