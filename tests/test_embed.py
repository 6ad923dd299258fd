"""moce embed: one feature per image in a parquet file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from builders import RUNTIME, picture

import moce
from moce.data.load import load_images
from moce.errors import MoceError
from moce.inference.features import extract_features
from moce.weights.from_runs import load_backbone


def embedded(file: Path) -> np.ndarray:
    return np.stack(pyarrow.parquet.read_table(file)["embedding"].to_numpy())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_features_are_those_that_probes_read(pooling: str, runs, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "task.parquet"
    given = {"pooling": pooling, "batch_size": 7, **RUNTIME}
    result = moce.embed(runs.backbone, runs.task, out=out, **given)
    table = pyarrow.parquet.read_table(out)
    images, backbone = load_images(str(runs.task), (16, 16)), load_backbone(str(runs.backbone))
    assert table["id"].to_pylist() == images.ids
    assert table["label"].to_pylist() == images.labels
    assert set(table["split"].to_pylist()) == {"train", "test"}
    said = f"embedding all {len(images)} images, 24 of them test images (column split)"
    assert said in capsys.readouterr().err
    device = torch.device("cpu")
    expected = extract_features(backbone.vit, backbone.spec, images, device=device, pooling=pooling)
    assert np.allclose(embedded(out), expected.numpy(), atol=1e-6)
    assert (result.images, result.width) == (len(images), 32)
    assert [path.name for path in out.parent.iterdir()] == ["task.parquet"]


def test_unreadable_images_are_left_out_and_named(runs, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    picture().save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no image")
    result = moce.embed(runs.mae, folder, out=tmp_path / "a.parquet", **RUNTIME)
    assert [name for name, _ in result.skipped] == ["bad.png"]
    assert "skipped bad.png" in capsys.readouterr().err
    assert len(embedded(tmp_path / "a.parquet")) == 1


def test_without_test_images_nothing_is_said_of_them(runs, tmp_path: Path, capsys) -> None:
    moce.embed(runs.mae, runs.task / "test", out=tmp_path / "a.parquet", **RUNTIME)
    assert "embedding all" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("a.npy", {}, "ends in .parquet"),
        ("there.parquet", {}, "--overwrite"),
        ("folder.parquet", {"overwrite": True}, "is a folder"),
        ("a.parquet", {"backbone": "nowhere/at/all"}, "no backbone"),
        ("a.parquet", {"data": "nowhere"}, "no such images"),
    ],
)
def test_mistakes_are_refused(name: str, changes: dict, message: str, runs, tmp_path) -> None:
    (tmp_path / "there.parquet").write_text("mine")
    (tmp_path / "folder.parquet").mkdir()
    given = {"backbone": runs.mae, "data": runs.task, "out": tmp_path / name, **RUNTIME, **changes}
    with pytest.raises(MoceError, match=message):
        moce.embed(**given)
    assert (tmp_path / "there.parquet").read_text() == "mine"
    assert not (tmp_path / "a.parquet").exists()


def test_experts_must_be_chosen_first(runs, tmp_path: Path) -> None:
    with pytest.raises(MoceError, match="moce customize"):
        moce.embed(runs.moce, runs.task, out=tmp_path / "a.parquet", **RUNTIME)
