"""Tasks whose images have several labels each, and metrics for labels of one kind or the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import QUICK_TUNING as QUICK
from builders import RUNTIME, tiny_encoder
from torch import nn

import moce
from moce.commands import finetune as finetune_command
from moce.commands import probe as probe_command
from moce.config import FinetuneSettings
from moce.data.loader import Batch
from moce.errors import MoceError
from moce.evaluation.finetune import FinetuneObjective
from moce.evaluation.results import read_rows
from moce.evaluation.task import load_task
from moce.training.trainer import Step


@pytest.fixture
def several(runs, monkeypatch):
    """The task with a fourth label, "round or not", beside its three classes."""
    task = load_task(str(runs.task), (3, 16, 16))
    task.multi_label, task.classes = True, [*task.classes, "first two"]
    for name in ("train_labels", "test_labels"):
        one = np.eye(4, dtype=np.float32)[getattr(task, name)]
        one[:, 3] = one[:, 0] + one[:, 1]
        setattr(task, name, one)
    for command in (finetune_command, probe_command):
        monkeypatch.setattr(command, "load_task", lambda *_, **__: task)
    return task


def test_several_labels_are_fine_tuned_by_binary_cross_entropy(several, runs) -> None:
    vit = tiny_encoder().build(num_classes=4, global_pool="avg")
    nn.init.zeros_(vit.head.weight)
    values = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}
    settings = FinetuneSettings(backbone="b", data="d", out=Path("o"), **values)
    objective = FinetuneObjective(
        vit, tiny_encoder(), several.train, several.train_labels, settings
    )
    rows = torch.arange(8)
    batch = Batch(rows, torch.zeros(8, dtype=torch.int64), several.train.pixels[rows])
    step = Step(0, rows)
    loss = objective.loss(vit, objective.prepared(batch, step), step)["loss"]
    assert loss.item() == pytest.approx(np.log(2), abs=1e-5)  # every answer at even odds


def test_several_labels_go_through_every_protocol(several, runs, tmp_path: Path) -> None:
    result = moce.finetune(runs.backbone, runs.task, out=tmp_path / "run", lr_grid=(1e-3,), **QUICK)
    (content,) = read_rows(tmp_path / "run")
    assert result.metric == content["metric"] == "map11" and content["values"] == [result.value]
    assert content["confusion"] is None
    for values in ({"epochs": 2, "batch_size": 8}, {"solver": "lbfgs"}, {"kind": "knn"}):
        probed = moce.probe(runs.backbone, runs.task, draws=2, num_labels=12, **values, **RUNTIME)
        assert probed.metric == "map11" and probed.confusion is None
        assert all(0 < value <= 1 for value in probed.values)


@pytest.mark.parametrize("name", ["sampling", "class_weights"])
def test_several_labels_cannot_be_balanced(several, runs, tmp_path: Path, name: str) -> None:
    with pytest.raises(
        MoceError, match=f"may have several classes each.*--{name.replace('_', '-')}"
    ):
        moce.finetune(runs.backbone, runs.task, out=tmp_path / "run", **{name: "balanced"}, **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_metric_for_other_labels_is_refused(several, runs, tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="map11"):
        moce.probe(runs.backbone, runs.task, metric="accuracy", **RUNTIME)
    several.multi_label = False
    with pytest.raises(MoceError, match="accuracy"):
        moce.finetune(runs.backbone, runs.task, out=tmp_path / "run", metric="map11", **QUICK)
    assert not (tmp_path / "run").exists()


def test_mean_per_class_is_a_metric_of_one_label(runs) -> None:
    values = {"solver": "lbfgs", **RUNTIME}
    result = moce.probe(runs.backbone, runs.task, metric="mean_per_class", **values)
    counts = np.array(result.confusion)
    assert result.mean == pytest.approx((counts.diagonal() / counts.sum(axis=1)).mean())
