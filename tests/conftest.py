"""Run folders made once, by the commands, and read by many tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from builders import CLUSTERS, PRETRAIN, RUNTIME, TRAIN, customize, write_images, write_task

import moce

torch.set_num_threads(1)


@dataclass
class Runs:
    """data: a folder of images; task: a labeled one; the others: run folders. Only to be read."""

    data: Path
    task: Path
    mae: Path
    clusters: Path
    moce: Path
    backbone: Path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    made = Runs(
        data=write_images(root / "data"),
        task=write_task(root / "task"),
        mae=root / "mae",
        clusters=root / "clusters",
        moce=root / "moce",
        backbone=root / "backbone",
    )
    moce.pretrain(made.data, out=made.mae, epochs=2, **PRETRAIN)
    moce.cluster(made.data, mae=made.mae, out=made.clusters, num_clusters=CLUSTERS, **RUNTIME)
    moce.train(made.data, mae=made.mae, clusters=made.clusters, out=made.moce, epochs=2, **TRAIN)
    customize(made.moce, made.task, out=made.backbone)
    return made


@pytest.fixture(params=[1, 3])
def threads(request) -> Iterator[int]:
    """Threads of torch: one, and several, so that worker threads are used."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
