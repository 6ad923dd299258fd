"""What must hold on an accelerator too; run with -m gpu where there is one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from builders import (
    CLUSTERS,
    PRETRAIN,
    RUNTIME,
    TRAIN,
    customize,
    demo_images,
    tiny_encoder,
    tiny_mae,
    tiny_moce,
)
from torch.testing import assert_close

import moce
from moce.config import PretrainSettings, TrainSettings
from moce.data.augment import normalize
from moce.data.loader import fetch
from moce.data.rng import Stream, keyed_normal, keyed_uniform
from moce.inference.features import extract_features
from moce.runs.files import read_tensors
from moce.runs.model import read_metrics
from moce.training.objectives import MAEObjective, MoCEObjective
from moce.training.trainer import Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = {"device": "cuda"}


def test_all_objectives_follow_the_cpu(runs, tmp_path: Path) -> None:
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


@contextmanager
def waits_counted() -> Iterator[list[str]]:
    """The waits for the GPU within, as torch's warnings tell of them."""
    found: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found += [str(w.message) for w in caught if "synchronizing" in str(w.message)]


@pytest.mark.parametrize(("method", "most"), [("mae", 0), ("moce", 1)])
def test_micro_batches_do_not_wait_for_the_gpu(method: str, most: int) -> None:
    """But once in a forward pass with experts: how many images each has decides its slice."""
    device, images, mae = torch.device("cuda"), demo_images(), tiny_mae()
    if method == "mae":
        settings = PretrainSettings(data="-", out="-")
        objective = MAEObjective("mae", mae, tiny_encoder(), images, settings)
    else:
        settings = TrainSettings(data="-", mae="-", out="-")
        clusters = torch.arange(len(images)) % CLUSTERS
        objective = MoCEObjective(tiny_moce(mae), tiny_encoder(), images, clusters, settings)
    model, rows = objective.model.to(device).train(), torch.arange(8)
    for number in range(2):  # the first sends what is kept
        step = Step(number, rows)
        with waits_counted() as waits:
            batch = fetch(images, rows, torch.zeros_like(rows), device)
            objective.loss(model, batch, step)["loss"].backward()
    assert len(waits) <= most, waits


def test_numbers_are_the_same_on_the_gpu() -> None:
    rows, epochs = torch.arange(50), torch.arange(50) % 3
    there = rows.cuda(), epochs.cuda()
    for draw in (keyed_uniform, keyed_normal):
        assert_close(draw(3, Stream.MASK, *there, 9).cpu(), draw(3, Stream.MASK, rows, epochs, 9))
    pixels = demo_images().pixels[:4]
    images = normalize(pixels.cuda(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).cpu()
    assert_close(images, normalize(pixels, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))


def test_features_come_back_in_order() -> None:
    images, mae = demo_images(), tiny_mae()
    options = {"pooling": "mean", "batch_size": 7}
    spec = tiny_encoder()
    here = extract_features(mae.encoder, spec, images, device=torch.device("cpu"), **options)
    there = extract_features(mae.encoder, spec, images, device=torch.device("cuda"), **options)
    assert not there.is_cuda
    assert_close(there, here, rtol=1e-3, atol=1e-3)
