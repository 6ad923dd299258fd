"""Detectors and segmenters end to end: fine-tuned, resumed, loaded without moce, applied, compared."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import QUICK_TUNING, RUNTIME, copy_run
from commands import one_line, run_command
from conftest import Runs
from dense_folders import class_values, write_coco, write_image, write_mask
from launched import moce_words, torchrun
from PIL import Image
from test_training import same_losses, same_weights, stop_after

import moce
from moce.dense.predictor import load_predictor
from moce.dense.readers import read_dense
from moce.errors import Interrupted, MoceError
from moce.evaluation.results import read_rows
from moce.evaluation.suite import read_suite
from moce.runs.files import read_tensors
from moce.runs.model import read_metrics

CPU = torch.device("cpu")
TUNING = {**RUNTIME, "image_size": 32, "batch_size": 4, "steps": 4, "base_lr": 0.1, "log_every": 1}
HEAD = {"dim": 8, "scales": [1, 0.5], "anchor_scale": 4, "depth": 0, "proposals": 16}
DETECT = {**TUNING, "head_args": HEAD}
SEGMENT = {**TUNING, "head_args": {"dim": 8}}


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("boxes"), count=4)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, one of which is bright in the images, too."""
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 8), ("val", 3)):
        for number in range(count):
            values = class_values(number + 100 * (split == "val"), (0, 1, 2, 255))
            write_mask(root / "masks" / split / f"{number}.png", values)
            path = write_image(root / "images" / split / f"{number}.png")
            pixels = np.asarray(Image.open(path)) // 4 + np.where(values == 1, 180, 0)[..., None]
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def detector(runs: Runs, boxes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("detector") / "run"
    moce.finetune(runs.mae, boxes, out=out, **DETECT)
    return out


@pytest.fixture(scope="module")
def segmenter(runs: Runs, classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("segmenter") / "run"
    moce.finetune(runs.mae, classes, out=out, **SEGMENT)
    return out


# --- training ------------------------------------------------------------------------------------


def test_a_detector_is_what_coco_labels_ask_for(detector: Path) -> None:
    (row,) = read_rows(detector)
    info = json.loads((detector / "model.json").read_text())
    assert info["kind"] == "detector" and info["network"]["masks"]
    assert row["metric"] == "box_ap" and row["values"] == [row["figures"]["box_ap"]]
    assert row["labels"] == 4 and {"mask_ap", "box_ap50", "box_ap/cat"} <= row["figures"].keys()
    assert Image.open(detector / "examples.png").width > 300


def test_a_segmenter_is_what_masks_ask_for(segmenter: Path) -> None:
    (row,) = read_rows(segmenter)
    assert json.loads((segmenter / "model.json").read_text())["kind"] == "segmenter"
    assert row["metric"] == "miou" and row["labels"] == 8
    assert {"pixel_accuracy", "iou/0", "iou/2"} <= row["figures"].keys()


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_stopped_run_resumes_to_the_bit(
    task: str, runs: Runs, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """torchvision samples proposals by the global generator; drop path draws from it, too."""
    straight: Path = request.getfixturevalue("detector" if task == "detect" else "segmenter")
    data = request.getfixturevalue("boxes" if task == "detect" else "classes")
    given = DETECT if task == "detect" else SEGMENT
    watcher = stop_after(tmp_path / "run", 2)
    with pytest.raises(Interrupted):
        moce.finetune(runs.mae, data, out=tmp_path / "run", **given)
    watcher.join()
    moce.finetune(runs.mae, data, out=tmp_path / "run", resume=True, **given)
    same_losses(straight, tmp_path / "run")
    same_weights(straight, tmp_path / "run")


def test_boxes_keep_their_precision_in_bf16(runs: Runs, boxes: Path, tmp_path: Path) -> None:
    """Fabric casts what a network is called with; the losses would be of boxes rounded to 8 bits."""
    given = {**DETECT, "steps": 1, "drop_path": 0.0}
    for precision in ("float32", "bf16"):
        moce.finetune(
            runs.mae, boxes, out=tmp_path / precision, **{**given, "precision": precision}
        )
    rows = [read_metrics(tmp_path / precision)[0] for precision in ("float32", "bf16")]
    for name in ("loss_objectness", "loss_rpn_box_reg", "loss_classifier"):
        assert rows[1][name] == pytest.approx(rows[0][name], rel=0.05), name


def test_a_frozen_backbone_stays_as_it_was(runs: Runs, classes: Path, tmp_path: Path) -> None:
    linear = {**SEGMENT, "freeze": "backbone", "head_args": {"kind": "linear"}}
    moce.finetune(runs.mae, classes, out=tmp_path / "run", **linear)
    tuned = read_tensors(tmp_path / "run" / "model.safetensors")
    before = read_tensors(runs.mae / "model.safetensors")
    name = "blocks.2.mlp.fc1.weight"
    assert torch.equal(tuned[f"features.vit.{name}"], before[f"encoder.{name}"])
    assert tuned["head.classify.weight"].shape == (3, 32, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_two_processes_train_as_one(
    task: str, runs: Runs, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = request.getfixturevalue("boxes" if task == "detect" else "classes")
    settings = DETECT if task == "detect" else SEGMENT
    given = {**settings, "backbone": runs.mae, "data": data, "drop_path": 0.0}
    alone, together = tmp_path / "alone", tmp_path / "together"
    moce.finetune(**given, out=alone)
    process = torchrun(*moce_words("finetune", {**given, "out": together}))
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    first, second = (read_tensors(run / "model.safetensors") for run in (alone, together))
    for name, value in first.items():
        if not name.endswith("qkv.bias"):
            assert torch.allclose(value, second[name], atol=1e-4), name
    assert read_rows(alone)[0]["figures"] == pytest.approx(
        read_rows(together)[0]["figures"], abs=0.02
    )


# --- loading -------------------------------------------------------------------------------------

WITHOUT_MOCE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moce":
            raise ImportError("moce is not installed")
sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import torch
from network import load
image = torch.arange(3 * 32 * 32).reshape(3, 32, 32) % 256 / 255
with torch.inference_mode():
    detector, segmenter = map(load, sys.argv[1:])
    print(type(detector).__name__, float(detector([image])[0]["boxes"].double().sum()))
    print(type(segmenter).__name__, float(segmenter(image[None])[0].double().sum()))
"""


@pytest.mark.slow
def test_folders_load_without_moce(detector: Path, segmenter: Path) -> None:
    words = [sys.executable, "-c", WITHOUT_MOCE, str(detector), str(segmenter)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    image = torch.arange(3 * 32 * 32).reshape(3, 32, 32) % 256 / 255
    with torch.inference_mode():
        boxes = load_predictor(str(detector), CPU, "float32").network([image])[0]["boxes"]
        logits = load_predictor(str(segmenter), CPU, "float32").network(image[None])[0]
    names, sums = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert names == ("MaskRCNN", "Segmenter")
    expected = [float(found.double().sum()) for found in (boxes, logits)]
    assert [float(total) for total in sums] == pytest.approx(expected, rel=1e-4)


# --- predict -------------------------------------------------------------------------------------


def test_detections_are_coco_json_and_pictures(detector: Path, boxes: Path, tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    out = tmp_path / "out"
    found = moce.predict(
        detector,
        boxes / "val2017",
        out=out,
        min_score=0.0,
        picture_score=0.0,
        pictures=2,
        **RUNTIME,
    )
    assert (found.task, found.images, found.skipped) == ("detect", 4, 0)
    coco = COCO(str(out / "predictions.json"))
    assert [category["name"] for category in coco.loadCats([1, 2, 3])] == ["cat", "dog", "owl"]
    annotations = coco.loadAnns(coco.getAnnIds())
    assert annotations and all(0 <= entry["score"] <= 1 for entry in annotations)
    assert coco.annToMask(annotations[0]).shape == (30, 40)
    assert len(list((out / "predicted_pictures").rglob("*.png"))) == 2
    moce.predict(detector, boxes / "val2017", out=out, overwrite=True, min_score=1.0, **RUNTIME)
    assert json.loads((out / "predictions.json").read_text())["annotations"] == []


def test_masks_are_pngs_of_the_images_size(segmenter: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_image(images / "a" / "1.png", 70, 33)
    write_image(images / "2.jpg", 20, 90)
    (images / "3.png").write_bytes(b"no image")
    out = tmp_path / "out"
    found = moce.predict(segmenter, images, out=out, **RUNTIME)
    assert (found.images, found.skipped) == (2, 1)
    assert "3.png" in (out / "skipped.jsonl").read_text()
    mask = Image.open(out / "predicted_masks" / "a" / "1.png")
    assert mask.size == (70, 33) and mask.mode == "P" and np.asarray(mask).max() <= 2
    assert Image.open(out / "predicted_masks" / "2.png").size == (20, 90)
    assert (out / "classes.txt").read_text() == "0\n1\n2\n"


def test_predicted_masks_are_labels_of_their_images(segmenter: Path, tmp_path: Path) -> None:
    for name in ("train/1.png", "val/2.jpg"):
        write_image(tmp_path / "images" / name, 70, 33)
    moce.predict(segmenter, tmp_path / "images", out=tmp_path / "out", **RUNTIME)
    (tmp_path / "out" / "classes.txt").write_text("sky\nsea\nland\n")
    source = read_dense(str(tmp_path / "images"), "segment", tmp_path / "out" / "predicted_masks")
    assert (source.task, source.classes) == ("segment", ["sky", "sea", "land"])
    assert [sample.split for sample in source.samples] == ["train", "val"]
    written = Image.open(tmp_path / "out" / "predicted_masks" / "val" / "2.png")
    np.testing.assert_array_equal(source.samples[1].target(), np.asarray(written))


def test_windows_cover_an_image_and_agree_with_one_look(segmenter: Path) -> None:
    """Of an image as large as the network's, the prediction is the network's own."""
    predictor = load_predictor(str(segmenter), CPU, "float32")
    image = np.random.default_rng(0).integers(0, 256, (3, 32, 32), np.uint8)
    (found,) = predictor([image])
    with torch.inference_mode():
        logits = predictor.network(torch.from_numpy(image)[None].float() / 255)[0]
    assert (found == logits.argmax(0).numpy()).all()
    (wide,) = predictor([np.concatenate([image] * 3, axis=2)])
    assert wide.shape == (32, 96)


def test_classes_are_a_table(runs: Runs, tmp_path: Path) -> None:
    tuned = moce.finetune(runs.backbone, runs.task, out=tmp_path / "run", **QUICK_TUNING)
    assert tuned.metric == "accuracy"
    moce.predict(tmp_path / "run", runs.task / "test", out=tmp_path / "out", **RUNTIME)
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    right = np.mean([row["class"] == row["id"].split("/")[0] for row in rows])
    assert len(rows) == 24 and right == pytest.approx(tuned.value)


# --- evaluate ------------------------------------------------------------------------------------


def test_suites_have_dense_tasks_beside_classification(
    runs: Runs, boxes: Path, classes: Path, tmp_path: Path
) -> None:
    without = {name: v for name, v in TUNING.items() if name not in RUNTIME}
    suite = {
        "name": "mixed",
        "labels": 4,
        "probe": {"solver": "lbfgs"},
        "detect": {**without, "head_args": HEAD},
        "segment": {**without, "head_args": {"dim": 8}},
        "tasks": [
            {"name": "digits", "data": str(runs.task)},
            {"name": "boxes", "data": str(boxes), "task": "detect"},
            {"name": "classes", "data": str(classes), "task": "segment"},
        ],
    }
    path = tmp_path / "suite.yaml"
    path.write_text(json.dumps(suite))
    backbones = (f"mae={runs.mae}", f"moce={runs.moce}")
    out = tmp_path / "out"
    given = {"protocols": ("linear", "finetune"), "tasks": ("boxes", "classes"), **RUNTIME}
    moce.evaluate(path, out=out, backbones=backbones, **given)
    rows = {(row["task"], row["protocol"], row["backbone"]): row for row in read_rows(out)}
    assert {key[:2] for key in rows} == {
        *(("boxes", "detect"), ("classes", "segment"), ("classes", "segment_linear")),
    }
    chosen = rows["boxes", "detect", "moce"]
    assert chosen["choice"]["votes"] and chosen["labels"] == 4 and "mask_ap" in chosen["figures"]
    assert (out / chosen["examples"]).is_file()
    before = (out / "rows.jsonl").read_text()
    moce.evaluate(path, out=out, backbones=backbones, resume=True, **given)
    assert (out / "rows.jsonl").read_text() == before
    text = moce.report(out, out=tmp_path / "report.html").page.read_text()
    for word in ("box AP", "mIoU", "cat", "data:image/png;base64"):
        assert word in text


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--strategy", "fsdp"], "not sharded: use --strategy ddp"),
        (["--mixup", 0.5], "leave out --mixup: task detect does not use it"),
        (["--lr-grid", "1e-3,1e-2"], "leave out --lr-grid: task detect does not use it"),
        (["--image-size", 30], "no multiple of two patches of 4 pixels; give 24 or 32"),
        (["--head-args", "{dims: 3}"], "head_args: unknown setting 'dims'"),
        (["--head-args", "{dim:16}"], "YAML: {dim:16} ('dim:16' needs a space after the colon)"),
        (["--task", "segment"], "no masks of pixels in"),
    ],
)
def test_mistakes_are_refused(
    words: list[object], expected: str, runs: Runs, boxes: Path, tmp_path: Path, capsys
) -> None:
    base: list[object] = ["finetune", runs.mae, boxes, "--out", tmp_path / "out", "--threads", 1]
    size: list[object] = [] if "--image-size" in words else ["--image-size", 32]
    assert run_command([*base, *size, *words]) == 2
    assert expected in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_suite_with_settings_of_classification_is_refused(tmp_path: Path) -> None:
    suite = {"name": "s", "tasks": [{"name": "t", "data": "d", "task": "segment"}]}
    path = tmp_path / "suite.yaml"
    path.write_text(json.dumps({**suite, "segment": {"lr_grid": [0.1, 1.0]}}))
    with pytest.raises(MoceError, match="leave out --lr-grid: task segment does not use it"):
        read_suite(path, tmp_path)


def test_only_fine_tuned_models_predict(runs: Runs, tmp_path: Path, capsys) -> None:
    assert run_command(["predict", runs.mae, runs.task, "--out", tmp_path / "out"]) == 2
    error = one_line(capsys.readouterr().err)
    assert "(kind 'mae'), which moce cluster" in error and error.endswith("of moce finetune")
    assert not (tmp_path / "out").exists()


def test_truth_that_changed_does_not_resume(
    detector: Path, runs: Runs, boxes: Path, tmp_path: Path
) -> None:
    run, data = copy_run(detector, tmp_path / "run"), copy_run(boxes, tmp_path / "boxes")
    (run / "model.json").unlink()
    path = data / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = content["annotations"][1:]
    path.write_text(json.dumps(content))
    with pytest.raises(MoceError, match="data was"):
        moce.finetune(runs.mae, data, out=run, resume=True, **DETECT)
