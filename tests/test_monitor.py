"""Measuring while training: what is measured, when, and that the training does not notice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import RUNTIME, copy_run, customize, write_images
from commands import World, one_line, run_command
from conftest import Runs
from PIL import Image
from test_training import run_command as train
from test_training import same_weights, stop_after

import moce
from moce.commands import monitoring
from moce.commands.monitoring import interval
from moce.config import PretrainSettings
from moce.data.load import open_images
from moce.errors import Interrupted
from moce.evaluation.monitor import MOST_PICTURES, Monitor, summary_of
from moce.inference.features import extract_features
from moce.inference.rankme import rankme
from moce.models.encoder import fit_of
from moce.runs.model import read_metrics
from moce.training.metrics import picture_steps
from moce.training.monitoring import evaluating
from moce.weights.from_runs import load_backbone

GIVEN = {"steps": 8, "monitor_every": 4, "save_every": 4}
MEASURED = {"rankme", "monitor"}


@pytest.fixture(scope="module")
def monitored(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By command, a run that was measured before its first, after its fourth and after its last step."""
    folder = tmp_path_factory.mktemp("monitored")
    task = (str(runs.task),)
    train("pretrain", runs, folder / "pretrain", monitor=task, tensorboard=True, **GIVEN)
    train("moce", runs, folder / "moce", monitor=task, **GIVEN)
    return {name: folder / name for name in ("pretrain", "moce")}


def measured_steps(run: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run) if MEASURED & row.keys()]


# --- training does not notice ---------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pretrain", "moce"])
def test_training_is_the_same_without_measurements(
    command: str, runs: Runs, monitored: dict[str, Path], tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    train(command, runs, plain, steps=8, save_every=4)
    same_weights(plain, monitored[command])
    rows = [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in read_metrics(monitored[command])
    ]
    assert rows[0] == {"step": 0, "epoch": 0.0}
    assert rows[1:] == read_metrics(plain)
    assert not measured_steps(plain) and not (plain / "reconstructions").exists()


def test_a_network_trains_on_as_it_did() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.BatchNorm1d(2))
    net[1].eval()
    with evaluating(net, torch.device("cpu")):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net] == [True, False, True]


@pytest.mark.parametrize(("command", "rows"), [("pretrain", 3), ("moce", 6)])
def test_a_resumed_run_measures_once_what_it_would_have(
    command: str, rows: int, runs: Runs, monitored: dict[str, Path], tmp_path: Path, capfd
) -> None:
    """Stopped before its first checkpoint is due, and after a measurement."""
    out, task = tmp_path / "stopped", (str(runs.task),)
    watcher = stop_after(out, rows)
    with pytest.raises(Interrupted):
        train(command, runs, out, monitor=task, **GIVEN)
    watcher.join()
    told = capfd.readouterr().err
    assert re.search(
        r"stopping after (step \d of 8|measuring at step \d), then saving; Ctrl-C again", told
    )
    train(command, runs, out, resume=True, **GIVEN)  # the task is recorded
    straight = monitored[command]
    same_weights(straight, out)
    assert (out / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()
    assert measured_steps(out) == [0, 4, 8]
    pictures = [picture_steps(run) for run in (straight, out)]
    assert list(pictures[0]) == list(pictures[1]) == [0, 4, 8]
    for step, path in pictures[0].items():
        assert path.read_bytes() == pictures[1][step].read_bytes()


def test_a_run_that_lost_its_state_starts_over_alone(
    runs: Runs, monitored: dict[str, Path], tmp_path: Path
) -> None:
    """Killed before its first checkpoint: the row before the first step is there already."""
    out = copy_run(monitored["pretrain"], tmp_path / "out")
    (out / "model.json").unlink()
    for path in (out / "state").glob("step_*"):
        path.unlink()
    train("pretrain", runs, out, resume=True, **GIVEN)
    text = (monitored["pretrain"] / "metrics.jsonl").read_text()
    assert (out / "metrics.jsonl").read_text() == text


# --- what is measured -----------------------------------------------------------------------------


def test_scores_are_those_of_a_probe(
    runs: Runs, monitored: dict[str, Path], tmp_path: Path
) -> None:
    """Of the encoder, and of the backbone that a mixture gives the task."""
    backbone = tmp_path / "backbone"
    choice = customize(monitored["moce"], runs.task, out=backbone)
    assert (
        read_metrics(monitored["moce"])[-1]["monitor"]["task"]["strategy"] == choice.choice.strategy
    )
    for run, reference in (("pretrain", monitored["pretrain"]), ("moce", backbone)):
        last = read_metrics(monitored[run])[-1]["monitor"]["task"]
        for kind in ("knn", "linear"):
            solver = {"solver": "lbfgs"} if kind == "linear" else {}
            found = moce.probe(reference, runs.task, kind=kind, **solver, **RUNTIME)
            assert last[kind] == found.mean


def test_rank_is_that_of_the_final_features(runs: Runs, monitored: dict[str, Path]) -> None:
    """The images are few, so the sample holds all of them."""
    backbone = load_backbone(str(monitored["pretrain"]))
    images = open_images(str(runs.data), fit_of(backbone.vit))
    features = extract_features(backbone.vit, backbone.spec, images, device=torch.device("cpu"))
    last = read_metrics(monitored["pretrain"])[-1]
    assert last["rankme"] == pytest.approx(rankme(features), rel=1e-4)
    assert 1 < last["rankme"] < backbone.vit.embed_dim


def test_pictures_are_files_of_three_rows(monitored: dict[str, Path]) -> None:
    for run in monitored.values():
        pictures = picture_steps(run)
        sizes = {Image.open(path).size for path in pictures.values()}
        assert sizes == {(8 * (16 + 2) + 2, 3 * (16 + 2) + 2)}
        assert len({path.read_bytes() for path in pictures.values()}) == len(pictures) == 3


def test_tensorboard_has_scores_and_pictures(monitored: dict[str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = monitored["pretrain"]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    linear = [row["monitor"]["task"]["linear"] for row in read_metrics(run) if "monitor" in row]
    found = events.Scalars("monitor/task/linear")
    assert [event.value for event in found] == pytest.approx(linear)
    assert [event.step for event in found] == [0, 4, 8]
    assert [event.step for event in events.Images("reconstructions")] == [0, 4, 8]


def test_several_tasks_are_summed_up_in_a_line() -> None:
    one = {"knn": 0.5, "linear": 0.25}
    row = {"rankme": 12.345, "monitor": {"birds": one}}
    assert summary_of(row) == "birds: k-NN 50.0 %, linear 25.0 %"
    row["monitor"]["cars"] = {"knn": 0.7, "linear": 0.75}
    assert summary_of(row) == "2 tasks: k-NN 60.0 %, linear 50.0 %"
    assert summary_of({"rankme": 2.0}) == "RankMe 2.0"


# --- when -----------------------------------------------------------------------------------------


def monitor(every: int, log_every: int, total: int, from_start: bool = True) -> Any:
    made = SimpleNamespace(every=every, log_every=log_every, total=total, from_start=from_start)
    made.apart = max(every, log_every)
    return made


def rows_of(log_every: int, total: int) -> list[int]:
    return [0, *(step for step in range(1, total + 1) if step % log_every == 0 or step == total)]


@pytest.mark.parametrize(
    ("every", "log_every", "total", "expected"),
    [
        (4, 1, 10, [0, 4, 8, 10]),
        (4, 4, 10, [0, 4, 8, 10]),
        (30, 20, 100, [0, 40, 60, 100]),  # the first row at or after 30, 60 and 90
        (1, 20, 50, [0, 20, 40, 50]),
        (100, 20, 50, [0, 50]),
    ],
)
def test_measurements_are_parts_of_rows(
    every: int, log_every: int, total: int, expected: list[int]
) -> None:
    made = monitor(every, log_every, total)
    assert [step for step in rows_of(log_every, total) if Monitor.due(made, step)] == expected
    assert not Monitor.due(monitor(every, log_every, total, from_start=False), 0)


@pytest.mark.parametrize("log_every", [1, 7, 20])
@pytest.mark.parametrize("every", [1, 3, 50])
@pytest.mark.parametrize("total", [1, 19, 400, 3001])
def test_pictures_are_few_and_have_both_ends(total: int, every: int, log_every: int) -> None:
    made = monitor(every, log_every, total)
    measured = [step for step in rows_of(log_every, total) if Monitor.due(made, step)]
    pictured = [step for step in measured if Monitor._pictured(made, step)]
    assert len(pictured) <= MOST_PICTURES
    assert pictured[0] == 0 and pictured[-1] == total
    assert len(pictured) >= min(len(measured), MOST_PICTURES // 2)


def asked(**given: Any) -> PretrainSettings:
    return PretrainSettings(data="photos", out=Path("out"), **{"batch_size": 256, **given})


def test_without_being_asked_it_costs_one_percent() -> None:
    assert interval(asked(), total=100, count=512) is None
    for total in (400, 1_000, 20_000, 10**6):
        every = interval(asked(), total, count=512)
        assert every is not None
        assert total // every * 512 <= 0.01 * total * 256
        assert 2 <= total // every <= 10
    assert interval(asked(monitor=("birds",)), 101, 512) == 11
    assert interval(asked(monitor_every=7), 100, 512) == 7


def test_a_long_run_has_ranks_and_pictures_unasked(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(monitoring, "SHARE", 1.0)
    train("pretrain", runs, tmp_path / "run", steps=12)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "rankme" in row] == [6, 12]
    assert not any("monitor" in row for row in rows)
    told = capsys.readouterr().err
    assert "every 6 steps (2 times): RankMe on 160 images, and pictures" in told
    assert "about 1 % of the time" in told


# --- what is told and refused ---------------------------------------------------------------------


def test_the_header_tells_the_cost(runs: Runs, tmp_path: Path, capsys) -> None:
    world = World(runs, tmp_path)
    words = world.pretrain(None, "--monitor", runs.task, "--log-every", 1)
    assert run_command(words) == 0
    told = capsys.readouterr().err
    assert "every 1 step (1 time): k-NN and linear probe on task (24 + 24 images); RankMe" in told
    assert "in all" in told and "before training: task: k-NN " in told


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("no/such/folder", "no/such/folder"),
        ("images", "has no labels"),
        ("data", "two tasks are named"),
    ],
)
def test_a_task_that_cannot_be_probed_is_refused_first(
    task: str, reason: str, runs: Runs, tmp_path: Path, capsys
) -> None:
    world = World(runs, tmp_path)
    given = {
        "images": world.images("a.png", "b.png", "c.png"),
        "data": f"{runs.task},{runs.task}/",
    }.get(task, task)
    assert run_command(world.pretrain(None, "--monitor", given)) == 2
    assert reason in one_line(capsys.readouterr().err)
    assert not world.out.exists()


def test_a_task_inside_the_output_is_not_overwritten(runs: Runs, tmp_path: Path, capsys) -> None:
    out = copy_run(runs.mae, tmp_path / "out")
    write_images(out / "task", per_source=2)
    world = World(runs, tmp_path)
    assert run_command(world.pretrain(None, "--monitor", out / "task", "--overwrite")) == 2
    assert "holds the input monitor" in one_line(capsys.readouterr().err)
    assert (out / "task").is_dir() and json.loads((out / "model.json").read_text())


# --- the report -----------------------------------------------------------------------------------


def test_the_report_shows_curves_and_three_pictures(
    monitored: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    moce.report(*monitored.values(), out=out)
    page = out.read_text()
    assert "While training" in page and "Task task" in page and "Rank of the features" in page
    for run, label in (("pretrain", "MAE"), ("moce", "MoCE")):
        last = read_metrics(monitored[run])[-1]["monitor"]["task"]
        scores = f"{label}: k-NN {100 * last['knn']:.1f} %, linear {100 * last['linear']:.1f} %"
        assert scores in page
        for step in (0, 4, 8):
            assert f"filled in by {label} at step {step:09d}" in page


def test_the_report_marks_the_weights_that_are_kept(runs: Runs, tmp_path: Path) -> None:
    train("finetune", runs, tmp_path / "tuned", epochs=3, keep_best=True)
    moce.report(tmp_path / "tuned", out=tmp_path / "report.html")
    rows = [row for row in read_metrics(tmp_path / "tuned") if "val" in row]
    best = max(rows, key=lambda row: row["val"])
    expected = f"{100 * best['val']:.1f} % after epoch {best['epoch']:g}."
    assert expected in (tmp_path / "report.html").read_text()
