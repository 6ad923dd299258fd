"""Evaluations of adapted backbones: what they train on, what they leave, how they resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import RUNTIME
from conftest import Runs
from PIL import Image

import moce
from moce.evaluation.task import load_task
from moce.runs.files import read_tensors
from moce.runs.model import read_config
from moce.training import trainer

QUICK = {"adapt_steps": 8, "adapt_batch_size": 16}


def evaluate(task: Path, out: Path, *backbones: str, **settings: Any) -> list[dict[str, Any]]:
    tasks = [{"name": "digits", "data": str(task)}]
    content = {"name": "s", "labels": 12, "probe": {"solver": "lbfgs"}, "tasks": tasks}
    suite = out.parent / "suite.yaml"
    suite.write_text(yaml.safe_dump(content))
    values = {**RUNTIME, **QUICK, **settings}
    return moce.evaluate(suite, backbones=backbones, out=out, **values).rows


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return read_tensors(out / "adapted" / name / "digits" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_adapted_backbones_are_compared(runs: Runs, tmp_path: Path) -> None:
    """From an MAE run and from experts, with a pool; each has a folder as customize leaves it."""
    out = tmp_path / "out"
    backbones = (
        f"mae={runs.mae}", f"mae_adapted={runs.mae}@adapt", f"moce={runs.moce}",
        f"route_adapted={runs.moce}@route+adapt",
    )  # fmt: skip
    pool = {"adapt_data": runs.data, "adapt_clusters": runs.clusters}
    protocols = ("linear", "knn")
    rows = evaluate(runs.task, out, *backbones, protocols=protocols, **pool)
    assert len(rows) == 8
    by_name = {row["backbone"]: row for row in rows if row["protocol"] == "linear"}
    assert by_name["mae"]["adaptation"] is None and by_name["mae_adapted"]["choice"] is None
    assert by_name["route_adapted"]["choice"]["strategy"] == "route"
    train = len(load_task(str(runs.task), (3, 16, 16)).train)
    for name in ("mae_adapted", "route_adapted"):
        done = by_name[name]["adaptation"]
        assert done["steps"] == 8 and done["pool_images"] > 0
        assert done["task_images"] + done["held_out"] == train
        folder = out / "adapted" / name / "digits"
        names = {path.name for path in folder.iterdir()}
        assert {"README.md", "adaptation.json", "config.yaml", "model.safetensors"} <= names
        assert "state" not in names
        alone = moce.probe(folder, runs.task, solver="lbfgs", num_labels=12, **RUNTIME)
        assert by_name[name]["values"] == pytest.approx(alone.values, abs=1e-6)
    table = (out / "results.md").read_text()
    assert "mae_adapted" in table


def test_adapt_means_adapting_the_choice_of_auto(runs: Runs, tmp_path: Path) -> None:
    evaluate(runs.task, tmp_path / "out", f"a={runs.moce}@adapt", f"b={runs.moce}@auto+adapt")
    assert same(weights(tmp_path / "out", "a"), weights(tmp_path / "out", "b"))


@pytest.mark.parametrize("split", [True, False])
def test_test_images_adapt_nothing(runs: Runs, tmp_path: Path, split: bool) -> None:
    """The same backbones, bit for bit, whatever the test images show: of a folder, or of a fifth."""
    source = runs.task if split else runs.task / "train"
    shutil.copytree(source, tmp_path / "task")
    tests = load_task(str(tmp_path / "task"), (3, 16, 16)).test.ids
    names = [f"a={runs.mae}@adapt", f"b={runs.moce}@adapt"]
    evaluate(tmp_path / "task", tmp_path / "one", *names)
    for name in tests:
        Image.new("RGB", (16, 16), "red").save(tmp_path / "task" / name)
    evaluate(tmp_path / "task", tmp_path / "other", *names)
    for name in ("a", "b"):
        assert same(weights(tmp_path / "one", name), weights(tmp_path / "other", name))


def test_an_interrupted_evaluation_resumes_its_adaptation(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (f"a={runs.mae}", f"b={runs.mae}@adapt")
    whole = evaluate(runs.task, tmp_path / "whole", *names)
    save, saved = trainer.CheckpointWriter.save, []

    def stop(*arguments: object) -> None:
        save(*arguments)
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.CheckpointWriter, "save", stop)
    with pytest.raises(moce.errors.Interrupted):
        evaluate(runs.task, tmp_path / "out", *names)
    monkeypatch.undo()
    again = evaluate(runs.task, tmp_path / "out", *names, resume=True)
    assert [row["values"] for row in again] == [row["values"] for row in whole]
    assert same(weights(tmp_path / "whole", "b"), weights(tmp_path / "out", "b"))
    made = (tmp_path / "out" / "adapted" / "b" / "digits" / "adaptation.json").stat().st_mtime_ns
    more = evaluate(runs.task, tmp_path / "out", *names, resume=True, protocols=("knn",))
    assert len(more) == 4  # probed by another protocol, not adapted again
    kept = tmp_path / "out" / "adapted" / "b" / "digits" / "adaptation.json"
    assert kept.stat().st_mtime_ns == made
    with pytest.raises(moce.MoceError, match="adapt_steps was 8, is 9"):
        evaluate(runs.task, tmp_path / "out", *names, resume=True, adapt_steps=9)


def test_an_adapted_backbone_is_fine_tuned(runs: Runs, tmp_path: Path) -> None:
    rows = evaluate(runs.task, tmp_path / "out", f"a={runs.moce}@adapt", protocols=("finetune",))
    assert rows[0]["adaptation"]["steps"] == 8 and rows[0]["choice"]["votes"]
    tuned = read_config(tmp_path / "out" / "finetune" / "a" / "digits" / "0")
    assert tuned["backbone"] == str(tmp_path / "out" / "adapted" / "a" / "digits")


@pytest.mark.slow
def test_weights_of_other_libraries_are_adapted(runs: Runs, tmp_path: Path) -> None:
    """An exported folder has no decoder: it gets a fresh one, of the usual size."""
    few = {"adapt_steps": 1, "adapt_batch_size": 2}
    rows = evaluate(runs.task, tmp_path / "out", f"a={runs.backbone}@adapt", **few)
    assert rows[0]["adaptation"]["steps"] == 1
    before = read_tensors(runs.backbone / "model.safetensors")
    after = weights(tmp_path / "out", "a")
    assert after.keys() == before.keys() and not same(before, after)


@pytest.mark.parametrize(
    ("backbone", "settings", "words"),
    [
        ("mae", {}, "no backbone is adapted .*leave out --adapt-batch-size and --adapt-steps"),
        ("mae@route+adapt", {}, "no experts to select: give @adapt"),
        ("moce@best_route+adapt", {}, "@best_route.adapt is not one of"),
        ("mae@adapt", {"adapt_data": "data"}, "--adapt-data needs --adapt-clusters RUN"),
        ("moce@adapt", {"adapt_clusters": "clusters"}, "leave out --adapt-clusters"),
        ("mae@adapt", {"adapt_steps": 0}, "adapt_steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    runs: Runs, tmp_path: Path, backbone: str, settings: dict[str, Any], words: str
) -> None:
    run, _, selection = backbone.partition("@")
    reference = f"{getattr(runs, run)}{'@' if selection else ''}{selection}"
    given = {k: getattr(runs, v) if isinstance(v, str) else v for k, v in settings.items()}
    with pytest.raises(moce.MoceError, match=words) as caught:
        evaluate(runs.task, tmp_path / "out", f"a={reference}", **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_first_moce_column_has_the_strategy_not_the_adapted_one(
    runs: Runs, tmp_path: Path
) -> None:
    names = (f"a={runs.moce}@generalist+adapt", f"b={runs.moce}@route")
    evaluate(runs.task, tmp_path / "out", *names)
    assert "route," in (tmp_path / "out" / "results.md").read_text()
    assert json.loads((tmp_path / "out" / "rows.jsonl").read_text().splitlines()[0])["adaptation"]
