"""Detectors and segmenters learn: far beyond what background alone, or chance, would score."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import RUNTIME
from conftest import Runs
from dense_folders import write_mask
from PIL import Image

import moce
import moce.commands.demo
from moce.evaluation.results import read_rows

SIZE = 32
COLORS = {1: (230, 40, 40), 2: (40, 60, 230)}  # of bricks and of balls
COMMON = {**RUNTIME, "image_size": SIZE, "jitter": (0.9, 1.1), "layer_decay": 1.0, "drop_path": 0}


def write_shapes(root: Path, train: int = 64, test: int = 16) -> tuple[Path, Path]:
    """Bricks and balls on noise, as COCO boxes and as masks of pixels: two folders."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        images, objects = [], []
        for number in range(count):
            pixels = rng.integers(60, 200, (SIZE, SIZE, 1)).repeat(3, 2)
            mask = np.zeros((SIZE, SIZE), np.uint8)
            for kind in rng.permutation([1, 2]).tolist():
                side = int(rng.integers(10, 15))
                left, top = (int(v) for v in rng.integers(0, SIZE - side, 2))
                rows, columns = np.mgrid[:SIZE, :SIZE]
                near = [
                    abs(at - start - side / 2) < side / 2
                    for at, start in ((rows, top), (columns, left))
                ]
                inside = near[0] & near[1]
                if (mask[inside] > 0).any():
                    continue
                mask[inside], pixels[inside] = kind, COLORS[kind]
                box = [left, top, side, side]
                entry = {"id": len(objects) + 1, "image_id": number, "category_id": kind}
                objects.append({**entry, "bbox": box, "area": side**2, "iscrowd": 0})
            name = f"{number}.png"
            for folder in (root / "coco" / split, root / "masks" / "images" / split):
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            write_mask(root / "masks" / "masks" / split / name, mask)
            images.append({"id": number, "file_name": name, "height": SIZE, "width": SIZE})
        categories = [{"id": 1, "name": "brick"}, {"id": 2, "name": "ball"}]
        content = {"images": images, "annotations": objects, "categories": categories}
        path = root / "coco" / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root / "coco", root / "masks"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "upernet"])
def test_a_segmenter_learns(
    kind: str, runs: Runs, shapes: tuple[Path, Path], tmp_path: Path
) -> None:
    head = {"kind": kind, "dim": 16}
    given = {**COMMON, "batch_size": 8, "base_lr": 0.1, "warmup": 0.1, "head_args": head}
    found = moce.finetune(runs.mae, shapes[1], out=tmp_path / "run", steps=120, **given)
    figures = read_rows(tmp_path / "run")[0]["figures"]
    assert found.metric == "miou" and found.value > 0.7
    assert min(figures["iou/1"], figures["iou/2"]) > 0.5


@pytest.mark.slow
def test_a_detector_learns(runs: Runs, shapes: tuple[Path, Path], tmp_path: Path) -> None:
    head = {"dim": 16, "scales": [2, 1], "anchor_scale": 4, "depth": 0, "proposals": 32}
    given = {**COMMON, "batch_size": 8, "base_lr": 0.1, "warmup": 0.1, "head_args": head}
    moce.finetune(runs.mae, shapes[0], out=tmp_path / "run", steps=150, **given)
    figures = read_rows(tmp_path / "run")[0]["figures"]
    assert figures["box_ap50"] > 0.5


@pytest.mark.slow
def test_the_dense_demo_leaves_a_segmenter_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(moce.commands.demo.SEGMENT, "steps", 4)
    monkeypatch.setattr(moce.commands.demo, "DENSE_EPOCHS", 0.1)
    out = tmp_path / "demo"
    found = moce.demo(out=out, dense=True, threads=1, device="cpu")
    assert [row["metric"] for row in found.rows] == ["miou"]
    assert set(found.rows[0]["classes"]) == {"background", "digit", "clothes"}
    names = {path.name for path in out.iterdir()}
    assert names == {"mae", "scenes", "segmenter", "report.html", "demo.json"}
    page = found.report.read_text()
    assert "mIoU" in page and "Examples" in page
    moce.demo(out=out, dense=True, threads=1, device="cpu", overwrite=True)
