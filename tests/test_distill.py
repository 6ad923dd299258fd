"""moce distill: a student that learns its teacher's features, and is then a backbone like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from builders import RUNTIME, batch
from commands import one_line, run_command
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

import moce
from moce.data.augment import normalize
from moce.data.load import load_images
from moce.models.encoder import encode_tokens, pool_tokens
from moce.models.student import as_map
from moce.runs.model import read_metrics
from moce.training import distillation
from moce.weights.from_runs import load_backbone

SMALL = {
    **RUNTIME,
    "model": "vit_tiny_patch16_224",
    "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "batch_size": 32,
    "base_lr": 3e-2,
    "log_every": 5,
}


def features(vit, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return pool_tokens(vit, encode_tokens(vit, images), "mean")


def test_a_student_learns_what_its_teacher_sees(runs, tmp_path: Path) -> None:
    """It ends near its teacher, tells apart what the teacher does, and probes like a backbone."""
    out = tmp_path / "student"
    result = moce.distill(runs.backbone, runs.data, out=out, epochs=30, **SMALL)
    first, *_, last = read_metrics(out)
    assert last["pooled"] < 0.3 * first["pooled"] and last["patches"] < first["patches"]
    assert result.similarity == 1 - last["pooled"]
    teacher, student = load_backbone(str(runs.backbone)), load_backbone(str(out))
    assert student.vit.patch_embed.img_size == teacher.vit.patch_embed.img_size
    pixels = pixels_of(runs)
    own = features(student.vit, normalize(pixels, student.spec.mean, student.spec.std))
    theirs = features(teacher.vit, normalize(pixels, teacher.spec.mean, teacher.spec.std))
    between = lambda f: cosine_similarity(f[:, None] - f.mean(0), f[None] - f.mean(0), dim=2)  # noqa: E731
    pairs = torch.stack([between(own).flatten(), between(theirs).flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.5
    assert 0 <= moce.probe(out, runs.task, solver="lbfgs", **RUNTIME).mean <= 1


def test_a_student_is_measured_while_it_learns(runs, tmp_path: Path) -> None:
    out = tmp_path / "student"
    moce.distill(runs.backbone, runs.data, out=out, steps=5, monitor=(str(runs.task),), **SMALL)
    rows = [row for row in read_metrics(out) if "monitor" in row]
    assert [row["step"] for row in rows] == [0, 5]
    probed = moce.probe(out, runs.task, solver="lbfgs", **RUNTIME).mean
    assert rows[-1]["monitor"]["task"]["linear"] == probed
    assert not (out / "reconstructions").exists()  # a student fills nothing in


def test_only_plain_vits_are_measured(runs, tmp_path: Path, capsys) -> None:
    words = ["distill", runs.backbone, runs.data, "--out", tmp_path / "out", "--model", "resnet10t"]
    assert run_command([*words, "--model-args", "{}", "--steps", 1, "--monitor", runs.task]) == 2
    assert "leave out --monitor" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def pixels_of(runs) -> torch.Tensor:
    """Some of the training images, [64, 3, 16, 16] uint8."""
    return load_images(str(runs.data), (16, 16)).take(slice(64))


def test_the_folder_loads_in_timm_and_keeps_no_checkpoint(runs, tmp_path: Path) -> None:
    out = tmp_path / "student"
    moce.distill(runs.backbone, runs.data, out=out, steps=1, **SMALL)
    assert not (out / "state").exists() and (out / "distillation.json").is_file()
    vit = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images, _, _ = batch(3)
    with torch.no_grad():
        assert_close(vit(images), features(load_backbone(str(out)).vit, images))
    assert "distilled by moce" in (out / "README.md").read_text()


def test_any_timm_model_can_be_a_student(runs, tmp_path: Path) -> None:
    out = tmp_path / "cnn"
    settings = {**SMALL, "model": "test_resnet", "model_args": {}, "base_lr": 4e-3}
    moce.distill(runs.backbone, runs.data, out=out, epochs=4, **settings)
    first, *_, last = read_metrics(out)
    assert last["pooled"] < first["pooled"]
    net = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images, _, _ = batch(2)
    assert net.pretrained_cfg["input_size"] == (3, 16, 16)
    assert net(images).shape == (2, net.num_features)


def test_a_resumed_distillation_ends_as_a_straight_one(
    runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {**SMALL, "steps": 6, "save_every": 2}
    moce.distill(runs.backbone, runs.data, out=tmp_path / "straight", **given)
    loss = distillation.DistillObjective.loss

    def fail_at_4(self, model, images, step):
        if step.number == 4:
            raise RuntimeError("killed")
        return loss(self, model, images, step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(distillation.DistillObjective, "loss", fail_at_4)
        moce.distill(runs.backbone, runs.data, out=tmp_path / "b", **given)
    moce.distill(runs.backbone, runs.data, out=tmp_path / "b", resume=True, **given)
    straight, resumed = (load_file(tmp_path / n / "model.safetensors") for n in ("straight", "b"))
    assert_close(resumed, straight, rtol=0, atol=0)


def test_maps_of_channels_last_and_first_are_the_same() -> None:
    net = torch.nn.Module()
    net.num_features = 5
    features = torch.rand(2, 5, 3, 4)
    assert_close(as_map(net, features), features)
    assert_close(as_map(net, features.permute(0, 2, 3, 1)), features)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "vit_nothing"], "timm has no model 'vit_nothing'"),
        (["--model-args", "{depth: 0.5}"], "timm cannot build"),
    ],
)
def test_mistakes(flags: list[str], message: str, runs, tmp_path: Path, capsys) -> None:
    words = ["distill", runs.backbone, runs.data, "--out", tmp_path / "x", "--device", "cpu"]
    status = run_command([*words, "--threads", 1, *flags])
    printed = capsys.readouterr().err
    assert status == 2 and message in one_line(printed)
    assert not (tmp_path / "x").exists()
