"""Packed files and unusual encoders in finetune, evaluate, headroom, report and export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from builders import CLUSTERS, HEADROOM, PRETRAIN, RUNTIME, TINY_ARGS, TRAIN, customize
from commands import QUIET, run_command
from conftest import Runs
from test_channels import write_arrays
from torch.testing import assert_close

import moce
from moce.evaluation.task import load_task
from moce.models.encoder import encode_tokens, pool_tokens
from moce.runs.files import read_lines
from moce.weights.from_runs import load_backbone, load_mae

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def packed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The images and the labeled task of `runs`, packed at their own size."""
    folder = tmp_path_factory.mktemp("packed")
    return tuple(
        moce.pack(data, size=32, out=folder / f"{name}.moce").file
        for name, data in (("data", runs.data), ("task", runs.task))
    )


@pytest.fixture
def file(runs: Runs, tmp_path: Path) -> Path:
    """The MAE of `runs` as a file of weights."""
    return moce.convert(runs.mae, out=tmp_path / "mae.safetensors").file


# --- packed files -----------------------------------------------------------------------------------


def test_a_packed_task_is_the_folders(runs: Runs, packed) -> None:
    one, other = (load_task(str(data), (3, 16, 16)) for data in (runs.task, packed[1]))
    assert torch.equal(one.train.take(slice(None)), other.train.take(slice(None)))
    assert np.array_equal(one.test_labels, other.test_labels) and one.classes == other.classes


def test_finetune_scores_a_packed_task_as_the_folder(runs: Runs, packed, tmp_path: Path) -> None:
    settings = {"steps": 2, "batch_size": 16, "rand_augment": "", **RUNTIME}
    values = [
        moce.finetune(runs.backbone, data, out=tmp_path / str(n), **settings).value
        for n, data in enumerate((runs.task, packed[1]))
    ]
    assert values[0] == values[1]
    one, other = (moce.runs.files.read_tensors(tmp_path / n / "model.safetensors") for n in "01")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_evaluate_takes_packed_tasks(runs: Runs, packed, tmp_path: Path) -> None:
    tasks = [{"name": "folder", "data": str(runs.task)}, {"name": "packed", "data": str(packed[1])}]
    suite = tmp_path / "suite.yaml"
    suite.write_text(json.dumps({"name": "s", "tasks": tasks, "probe": {"solver": "lbfgs"}}))
    words = ["evaluate", suite, "--backbones", f"mae={runs.mae},moce={runs.moce}", *QUIET]
    assert run_command([*words, "--out", tmp_path / "out"]) == 0
    rows = read_lines(tmp_path / "out" / "rows.jsonl")
    values = {(row["task"], row["backbone"]): row["values"] for row in rows}
    for name in ("mae", "moce"):
        assert values["folder", name] == values["packed", name]


def test_headroom_and_report_take_packed_images_and_a_file_of_weights(
    runs: Runs, packed, file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("moce.commands.headroom.SMALLEST_GROUP", 8)
    found = [
        moce.headroom(
            data,
            mae=mae,
            clusters=runs.clusters,
            out=tmp_path / f"h{n}",
            **{**HEADROOM, "steps": 4},
        )
        for n, (data, mae) in enumerate(((packed[0], file), (packed[0], runs.mae)))
    ]
    assert found[0].gain == found[1].gain  # the file holds the run's own weights
    clusters, mixture = tmp_path / "clusters", tmp_path / "moce"
    moce.cluster(packed[0], mae=file, out=clusters, num_clusters=4, **RUNTIME)
    moce.train(packed[0], mae=file, clusters=clusters, out=mixture, steps=2, **TRAIN)
    moce.report(runs.mae, clusters, mixture, out=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "the images are gone" not in page and "data:image" in page


# --- files of weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["timm", "torch", "transformers"])
def test_a_file_of_weights_is_exported(kind: str, file: Path, runs: Runs, tmp_path: Path) -> None:
    folder = moce.export(file, format=kind, out=tmp_path / "out").folder
    again = moce.export(runs.mae, format=kind, out=tmp_path / "again").folder
    one, other = (moce.runs.files.read_tensors(f / "model.safetensors") for f in (folder, again))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_export_takes_settings_that_a_file_lacks(runs: Runs, tmp_path: Path, capsys) -> None:
    """The number of heads cannot be inferred from weights of an unusual width."""
    vit = load_mae(runs.mae)[1].encoder
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    words = ["export", tmp_path / "vit.pth", "--out", tmp_path / "out"]
    assert run_command(words) == 2
    assert "--model-args" in capsys.readouterr().err
    assert run_command([*words, "--model-args", '{"num_heads": 2}']) == 0
    found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert_close(found.forward_features(images), vit.eval().forward_features(images), **CLOSE)


@SLOW
def test_onnx_through_the_command(runs: Runs, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    words = ["export", runs.moce, "--strategy", "generalist", "--format", "onnx"]
    assert run_command([*words, "--out", tmp_path / "out"]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    bank = moce.load(runs.moce)
    sizes = bank.model.cluster_sizes.long()
    vit = bank.backbone(bank.choose(sizes, bank.clusters.similarity, "generalist"))
    images = torch.randn(3, 3, 16, 16)
    features, tokens = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = encode_tokens(vit, images)
    assert_close(torch.from_numpy(tokens), expected, atol=1e-4, rtol=1e-4)
    pooled = pool_tokens(vit, expected, "mean")
    assert_close(torch.from_numpy(features), pooled, atol=1e-4, rtol=1e-4)


# --- unusual encoders, from images to the exported folder ---------------------------------------------------

ENCODERS = {
    "four channels": {"in_chans": 4},
    "thirteen channels": {"in_chans": 13},
    "no class token": {"class_token": False},
    "SwiGLU, registers, LayerScale": {"init_values": 0.1, "reg_tokens": 2},
    "drop path": {"drop_path_rate": 0.3},
}
SWIGLU = "vit_giant_patch14_reg4_dinov2"
FAST = (
    "SwiGLU, registers, LayerScale",
)  # thirteen channels: test_channels.py does nearly the same


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=SLOW) for n in ENCODERS]
)
def test_unusual_encoders_go_from_packed_images_to_an_exported_folder(name: str, tmp_path) -> None:
    args = {**TINY_ARGS, **ENCODERS[name]}
    channels = args.get("in_chans", 3)
    data = write_arrays(tmp_path / "data.npz", channels)
    pack = moce.pack(data, size=16, channels=channels, out=tmp_path / "data.moce").file
    mae, clusters, bank, backbone = (tmp_path / n for n in ("mae", "clusters", "moce", "backbone"))
    settings = {**PRETRAIN, "model_args": args}
    if "SwiGLU" in name:
        settings["model"] = SWIGLU
    moce.pretrain(pack, out=mae, steps=2, **settings)
    moce.cluster(pack, mae=mae, out=clusters, num_clusters=CLUSTERS, **RUNTIME)
    moce.train(pack, mae=mae, clusters=clusters, out=bank, steps=3, **TRAIN)
    losses = [row["loss"] for row in read_lines(bank / "metrics.jsonl")]
    assert np.isfinite(losses).all()
    before = load_mae(mae)[1].encoder.state_dict()
    trained = moce.load(bank).model.experts
    moved = [
        not torch.equal(value, before[f"blocks.{block}.mlp.{part}"])
        for block, layer in zip((1, 3), trained, strict=True)
        for expert in layer.experts
        for part, value in expert.state_dict().items()
        if part.endswith("weight")
    ]
    assert any(moved)
    customize(bank, pack, out=backbone)
    images = torch.rand(2, channels, 16, 16)
    ours = load_backbone(str(backbone))
    theirs = timm.create_model(f"local-dir:{backbone}", pretrained=True).eval()
    vit = ours.vit.eval()
    assert_close(theirs(images), pool_tokens(vit, encode_tokens(vit, images), "mean"), **CLOSE)
    out = moce.export(bank, strategy="generalist", format="torch", out=tmp_path / "torch").folder
    again = moce.export(out, out=tmp_path / "again").folder
    vit = timm.create_model(f"local-dir:{again}", pretrained=True).eval()
    assert vit(images).isfinite().all() and vit.in_chans == channels
