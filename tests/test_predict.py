"""moce predict for classifiers: top classes as CSV, JSON lines and parquet, part by part."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import timm
import torch
from builders import QUICK_TUNING
from commands import one_line, run_command

import moce
from moce.commands import predict_classes
from moce.data.augment import normalize
from moce.data.load import load_images
from moce.runs.model import read_info

QUIET = {"device": "cpu", "precision": "float32", "threads": 1}


@pytest.fixture(scope="module")
def model(runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "model"
    moce.finetune(runs.backbone, runs.task, out=out, **QUICK_TUNING)
    return out


def expected(model: Path, data: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """ids, probabilities by timm alone, and classes."""
    images = load_images(str(data), (16, 16))
    vit = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    cfg = vit.pretrained_cfg
    with torch.no_grad():
        logits = vit(normalize(images.take(slice(None)), tuple(cfg["mean"]), tuple(cfg["std"])))
    return list(images.ids), logits.softmax(dim=1).numpy(), read_info(model)["classes"]


def test_every_format_has_the_models_probabilities(
    model: Path, runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts of 7 images, which do not show in the table."""
    monkeypatch.setattr(predict_classes, "PART", 7)
    ids, probabilities, classes = expected(model, runs.task)
    best = np.argsort(-probabilities, axis=1)[:, :2]
    for kind in ("csv", "jsonl", "parquet"):
        out = tmp_path / kind
        result = moce.predict(model, runs.task, out=out, format=kind, top_k=2, **QUIET)
        assert (result.images, result.skipped) == (len(ids), 0)
    with (tmp_path / "csv" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ids
    assert [row["class"] for row in rows] == [classes[n] for n in best[:, 0]]
    assert [row["class_2"] for row in rows] == [classes[n] for n in best[:, 1]]
    lines = (tmp_path / "jsonl" / "predictions.jsonl").read_text().splitlines()
    table = pyarrow.parquet.read_table(tmp_path / "parquet" / "predictions.parquet").to_pylist()
    top = np.take_along_axis(probabilities, best, axis=1)
    for found in (list(map(json.loads, lines)), table):
        assert [row["id"] for row in found] == ids
        assert [row["classes"][0] for row in found] == [row["class"] for row in rows]
        np.testing.assert_allclose([row["probabilities"] for row in found], top, atol=2e-6)


def test_a_packed_file_and_one_image(model: Path, runs, tmp_path: Path) -> None:
    _, probabilities, _ = expected(model, runs.task)
    moce.pack(runs.task, out=tmp_path / "a.moce", size=16)
    moce.predict(model, tmp_path / "a.moce", out=tmp_path / "a", format="parquet", **QUIET)
    found = pyarrow.parquet.read_table(tmp_path / "a" / "predictions.parquet").to_pylist()
    values = [row["probabilities"][0] for row in found]
    np.testing.assert_allclose(values, probabilities.max(axis=1), atol=2e-6)
    image = next(path for path in runs.task.rglob("*.png"))
    assert moce.predict(model, image, out=tmp_path / "b", **QUIET).images == 1


def test_unreadable_images_are_counted_and_too_many_refused(
    model: Path, runs, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_classes, "PART", 2)
    images = tmp_path / "images"
    images.mkdir()
    for number, path in enumerate(sorted(runs.task.rglob("*.png"))[:4]):
        (images / f"{number}.png").write_bytes(path.read_bytes() if number < 2 else b"broken")
    words = ["predict", model, images, "--out", tmp_path / "x", "--device", "cpu"]
    assert run_command([*words, "--max-skipped", 0.25]) == 2
    assert "2 of 4 images cannot be read" in one_line(capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "x" / "predictions.csv").exists()
    assert run_command([*words, "--overwrite"]) == 0
    assert "predicted 2 images (2 unreadable)" in capsys.readouterr().out
    assert len((tmp_path / "x" / "skipped.jsonl").read_text().splitlines()) == 2


def test_more_classes_than_there_are(model: Path, runs, tmp_path: Path, capsys) -> None:
    classes = read_info(model)["classes"]
    moce.predict(model, runs.task, out=tmp_path / "x", format="jsonl", top_k=99, **QUIET)
    line = (tmp_path / "x" / "predictions.jsonl").read_text().splitlines()[0]
    assert sorted(json.loads(line)["classes"]) == sorted(classes)
    assert f"the model has {len(classes)} classes" in capsys.readouterr().err
