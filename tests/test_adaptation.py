"""Adaptation: which images it trains on, what it keeps, what it leaves, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from builders import RUNTIME, TINY_ARGS, TINY_NAME, tiny_encoder, tiny_mae
from commands import QUIET, run_command
from conftest import Runs
from launched import moce_words, torchrun
from PIL import Image

import moce
from moce.customization.adaptation import (
    HeldOutError,
    default_steps,
    mixed_rows,
    split_task,
)
from moce.customization.related_images import draw_related
from moce.data.load import load_images
from moce.runs.files import read_tensors
from moce.runs.model import read_config, read_metrics
from moce.training import trainer

QUICK = {"adapt_steps": 8, "adapt_batch_size": 16, **RUNTIME}


def test_default_steps_grow_with_large_tasks_only() -> None:
    assert default_steps(100, 128, 0.5) == default_steps(1000, 128, 0.0) == 700
    assert default_steps(100_000, 128, 0.5) == 7813  # each image five times


@pytest.mark.parametrize(("count", "held_out"), [(3, 0), (10, 1), (100, 10), (50_000, 1000)])
def test_task_images_train_or_are_held_out(count: int, held_out: int) -> None:
    own, watched = split_task(count, seed=0)
    assert len(watched) == held_out and sorted(own + watched) == list(range(count))
    assert split_task(count, seed=0) == (own, watched)


def test_related_images_follow_the_tasks_histogram() -> None:
    clusters = np.arange(300) % 3
    drawn = draw_related(clusters, [30, 10, 0], 80, seed=0)
    assert Counter(clusters[drawn].tolist()) == {0: 60, 1: 20}
    assert len(set(drawn)) == 80
    everything = draw_related(clusters, [1, 1, 1], 10_000, seed=0)
    assert len(everything) == 300  # a cluster gives no more than it has


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
@pytest.mark.parametrize(("task", "pool"), [(10, 100), (100, 10), (7, 13)])
def test_the_pool_has_its_share_and_every_image_occurs(task: int, pool: int, share: float) -> None:
    rows = mixed_rows(task, pool, share)
    assert set(rows) == set(range(task + pool))
    of_pool = sum(row >= task for row in rows) / len(rows)
    assert of_pool == pytest.approx(share, abs=0.05)


def test_without_a_pool_only_the_task_trains() -> None:
    assert mixed_rows(5, 0, 0.5) == [0, 1, 2, 3, 4]


def test_the_best_state_is_kept(runs: Runs) -> None:
    mae = tiny_mae()
    images = load_images(str(runs.task), (16, 16))
    watch = HeldOutError(mae, tiny_encoder(), images, torch.device("cpu"), "float32")
    best = watch()["held_out"]
    kept = {name: value.clone() for name, value in mae.state_dict().items()}
    with torch.no_grad():
        for parameter in mae.parameters():
            parameter.add_(1.0)
    assert watch()["held_out"] > best
    assert watch.restore_best() == pytest.approx(best)
    assert all(torch.equal(value, kept[name]) for name, value in mae.state_dict().items())


def test_a_backbone_is_adapted_and_loads_with_timm(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "backbone"
    result = moce.customize(runs.moce, runs.task, out=out, data=runs.data, **QUICK)
    names = {path.name for path in out.iterdir()}
    expected = {"README.md", "adaptation.json", "config.json", "config.yaml", "metrics.jsonl"}
    assert names == expected | {"model.safetensors", "selection.json", "chart.png", "timings.jsonl"}
    done = json.loads((out / "adaptation.json").read_text())
    assert done["steps"] == 8 and done["pool_images"] > 0
    assert done["task_images"] + done["held_out"] > 0
    assert done["error_after"] <= done["error_before"]
    assert "adapted: 8 steps" in (out / "README.md").read_text()
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 9))
    assert all("held_out" in row for row in read_metrics(out))
    page = moce.report(out, out=tmp_path / "report.html")
    assert "Adapted backbone" in page.page.read_text() and "Unfinished" not in page.page.read_text()
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 16, 16)).isfinite().all()
    plain = moce.customize(runs.moce, runs.task, out=tmp_path / "plain", **RUNTIME)
    changed, as_chosen = (read_tensors(f / "model.safetensors") for f in (out, plain.folder))
    assert result.choice == plain.choice
    assert any(not torch.equal(changed[name], as_chosen[name]) for name in changed)


def test_test_images_never_train(runs: Runs, tmp_path: Path) -> None:
    """The same backbone, bit for bit, whatever the test images show."""
    shutil.copytree(runs.task, tmp_path / "task")
    choose = {"strategy": "generalist"}
    first = moce.customize(runs.moce, tmp_path / "task", out=tmp_path / "a", **QUICK, **choose)
    tests = sorted((tmp_path / "task" / "test").rglob("*.png"))
    assert tests
    for path in tests:
        Image.new("RGB", (16, 16), "red").save(path)
    second = moce.customize(runs.moce, tmp_path / "task", out=tmp_path / "b", **QUICK, **choose)
    one, other = (read_tensors(r.folder / "model.safetensors") for r in (first, second))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def interrupted(runs: Runs, out: Path, monkeypatch) -> Path:
    """An adaptation that was stopped after its second checkpoint."""
    save, saved = trainer.CheckpointWriter.save, []

    def stop(*arguments: object) -> None:
        save(*arguments)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.CheckpointWriter, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        moce.customize(runs.moce, runs.task, out=out, **QUICK)
    monkeypatch.undo()
    return out


def test_an_interrupted_adaptation_resumes_to_the_bit(
    runs: Runs, tmp_path: Path, monkeypatch
) -> None:
    whole = moce.customize(runs.moce, runs.task, out=tmp_path / "whole", **QUICK)
    interrupted(runs, tmp_path / "again", monkeypatch)
    again = moce.customize(runs.moce, runs.task, out=tmp_path / "again", resume=True, **QUICK)
    one, other = (read_tensors(r.folder / "model.safetensors") for r in (whole, again))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert read_metrics(whole.folder) == read_metrics(again.folder)


def test_a_resumed_adaptation_must_be_the_same(runs: Runs, tmp_path: Path, monkeypatch) -> None:
    out = interrupted(runs, tmp_path / "out", monkeypatch)
    for changes, words in (
        ({"adapt_steps": 9}, "steps was 8, is 9"),
        ({"adapt_lr": 0.5}, "base_lr was"),
        ({"data": runs.data}, "data was None"),
        ({"strategy": "generalist"}, "choice was"),
    ):
        with pytest.raises(moce.MoceError, match=words):
            values = {**QUICK, **changes}
            moce.customize(runs.moce, runs.task, out=out, resume=True, **values)
    moce.customize(runs.moce, runs.task, out=out, resume=True, **QUICK)
    with pytest.raises(moce.MoceError, match="is finished; use --overwrite"):
        moce.customize(runs.moce, runs.task, out=out, resume=True, **QUICK)


def test_config_says_what_was_adapted_to_what(runs: Runs, tmp_path: Path) -> None:
    result = moce.customize(runs.moce, runs.task, out=tmp_path / "a", data=runs.data, **QUICK)
    config = read_config(result.folder)
    assert (config["run"], config["images"]) == (str(runs.moce), str(runs.task))
    assert (config["data"], config["pool_share"]) == (str(runs.data), 0.5)
    assert result.choice is not None and config["choice"] == result.choice.strategy


def test_unreadable_images_are_listed_whichever_side_they_are_on(
    runs: Runs, tmp_path: Path
) -> None:
    """A pool image of the same name as a task's image does not change what the task trains on."""
    shutil.copytree(runs.task / "train", tmp_path / "task")
    shutil.copytree(runs.task / "train", tmp_path / "pool")
    first = sorted((tmp_path / "pool").rglob("*.png"))[0]
    first.write_bytes(b"no image")
    result = moce.customize(
        runs.moce, tmp_path / "task", out=tmp_path / "a", data=tmp_path / "pool", **QUICK
    )
    count = len(list((tmp_path / "task").rglob("*.png")))
    assert result.adaptation is not None
    scored = 6  # a fifth of each class, which probe would score
    assert result.adaptation.task_images + result.adaptation.held_out == count - scored
    (skipped,) = (tmp_path / "a" / "skipped.jsonl").read_text().splitlines()
    assert first.name in skipped


def test_another_clustering_is_not_taken_for_the_runs_own(runs: Runs, tmp_path: Path) -> None:
    other = tmp_path / "clusters"
    moce.cluster(runs.data, mae=runs.mae, out=other, num_clusters=5, **RUNTIME)
    with pytest.raises(moce.MoceError, match=r"not the clustering that .* was trained with"):
        moce.customize(
            runs.moce, runs.task, out=tmp_path / "a", data=runs.data, clusters=other, **QUICK
        )
    assert not (tmp_path / "a").exists()


def test_the_command_line_adapts(runs: Runs, tmp_path: Path, capsys) -> None:
    words = ["customize", runs.moce, runs.task, "--out", tmp_path / "a", *QUIET]
    assert run_command([*words, "--adapt-steps", "3", "--adapt-batch-size", "16"]) == 0
    assert "adapted: 3 steps" in capsys.readouterr().out
    assert run_command([*words, "--adapt-steps", "many", "--overwrite"]) == 2
    assert "adapt_steps" in capsys.readouterr().err


def test_an_mae_is_adapted_too(runs: Runs, tmp_path: Path) -> None:
    """So that MAE+ gets the same offer as the mixture."""
    result = moce.customize(
        runs.mae, runs.task, out=tmp_path / "a", data=runs.data, clusters=runs.clusters, **QUICK
    )
    assert result.choice is None and result.adaptation is not None
    assert result.adaptation.pool_images > 0 and "adapted" in result.summary()
    assert not (tmp_path / "a" / "selection.json").exists()
    probed = moce.probe(tmp_path / "a", runs.task, solver="lbfgs", **RUNTIME)
    assert 0 < probed.mean <= 1


def test_python_adapts_as_the_command_does(runs: Runs, tmp_path: Path) -> None:
    """The same weights from the same images; nothing is left behind."""
    out = moce.customize(runs.moce, runs.task, out=tmp_path / "a", data=runs.data, **QUICK).folder
    bank = moce.load(runs.moce)
    options = {"adapt_steps": 8, "adapt_batch_size": 16}
    vit = bank.customize(runs.task, data=runs.data, **options)
    known = read_tensors(out / "model.safetensors")
    assert all(torch.equal(value, known[name]) for name, value in vit.state_dict().items())
    labeled = bank.customize(str(runs.task), num_classes=3, **options)
    assert labeled(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_python_adapts_to_images_in_memory(runs: Runs) -> None:
    bank = moce.load(runs.moce)
    images = load_images(str(runs.task / "train"), (16, 16))
    arrays = [image.permute(1, 2, 0).numpy() for image in images.pixels]
    options = {"adapt_steps": 4, "adapt_batch_size": 8}
    first, second = (bank.customize(form, **options) for form in (images.pixels, arrays))
    plain = bank.customize(arrays)
    states = [model.state_dict() for model in (first, second, plain)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())
    with pytest.raises(moce.MoceError, match="steps"):
        bank.customize(arrays, adapt_steps=-1)


def test_weights_of_other_libraries_are_adapted(runs: Runs, tmp_path: Path) -> None:
    moce.convert(runs.mae, out=tmp_path / "mae.safetensors")
    result = moce.customize(
        tmp_path / "mae.safetensors",
        runs.task,
        out=tmp_path / "a",
        model=TINY_NAME,
        model_args=TINY_ARGS,
        decoder_heads=2,
        **QUICK,
    )
    assert result.adaptation is not None and result.adaptation.pool_images == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapt_steps": 0, "adapt_lr": 1e-3}, "leave out .*--adapt-lr"),
        ({"clusters": "x"}, "leave out --clusters"),
        ({"adapt_steps": -1}, "adapt_steps"),
        ({"model": "vit_tiny_patch16_224"}, "model comes from the run"),
        ({"data": "no such images"}, "no such images|no images"),
    ],
)
def test_what_cannot_be_is_refused(runs: Runs, tmp_path: Path, changes, words: str) -> None:
    with pytest.raises(moce.MoceError, match=words):
        moce.customize(runs.moce, runs.task, out=tmp_path / "out", **{**QUICK, **changes})
    assert not (tmp_path / "out").exists()


def test_an_mae_needs_steps_and_clusters(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(moce.MoceError, match="kind 'mae'"):
        moce.customize(runs.mae, runs.task, out=tmp_path / "out", **RUNTIME)
    with pytest.raises(moce.MoceError, match="--data needs --clusters"):
        moce.customize(runs.mae, runs.task, out=tmp_path / "out", data=runs.data, **QUICK)


@pytest.mark.slow
def test_two_processes_adapt_as_one_does(runs: Runs, tmp_path: Path) -> None:
    """With a pool; the best state, which one process alone keeps, is what is written."""
    values = {"run": runs.moce, "images": runs.task, "data": runs.data, **QUICK}
    one = moce.customize(**{**values, "out": tmp_path / "one"})
    two = torchrun(*moce_words("customize", {**values, "out": tmp_path / "two"}))
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors
    first, second = (read_tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in first.items():
        if not name.endswith("qkv.bias"):  # AdamW makes whole steps of rounding errors of keys
            torch.testing.assert_close(value, second[name], atol=1e-4, rtol=1e-4)
    done = json.loads((tmp_path / "two" / "adaptation.json").read_text())
    assert one.adaptation is not None
    assert done == pytest.approx(asdict(one.adaptation), abs=1e-4)
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]
