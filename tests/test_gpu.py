"""What must hold on an accelerator too; run with -m gpu where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import CLUSTERS, PRETRAIN, RUNTIME, TRAIN, customize
from torch.testing import assert_close

import moce
from moce.runs import read_metrics, read_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = {"device": "cuda"}


def test_every_stage_follows_the_cpu(runs, tmp_path: Path) -> None:
    """Float32 losses and features agree; masks, crops and gate noise are the same on both."""
    moce.pretrain(runs.data, out=tmp_path / "mae", epochs=2, **{**PRETRAIN, **CUDA})
    ours, reference = read_metrics(tmp_path / "mae"), read_metrics(runs.mae)
    assert_close([r["loss"] for r in ours], [r["loss"] for r in reference], rtol=1e-3, atol=1e-4)
    where = {**RUNTIME, **CUDA}
    moce.cluster(runs.data, mae=runs.mae, out=tmp_path / "clusters", num_clusters=CLUSTERS, **where)
    moce.train(
        runs.data,
        mae=runs.mae,
        clusters=runs.clusters,
        out=tmp_path / "moce",
        epochs=2,
        **{**TRAIN, **CUDA},
    )
    ours, reference = read_metrics(tmp_path / "moce"), read_metrics(runs.moce)
    assert_close([r["loss"] for r in ours], [r["loss"] for r in reference], rtol=1e-3, atol=1e-4)
    customize(runs.moce, runs.task, out=tmp_path / "backbone", **CUDA)
    weights = (
        read_tensors(f / "model.safetensors") for f in (tmp_path / "backbone", runs.backbone)
    )
    assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_bf16_trains(runs, tmp_path: Path) -> None:
    moce.pretrain(
        runs.data, out=tmp_path / "mae", epochs=2, **{**PRETRAIN, **CUDA, "precision": "bf16"}
    )
    assert read_metrics(tmp_path / "mae")[-1]["loss"] < read_metrics(tmp_path / "mae")[0]["loss"]
