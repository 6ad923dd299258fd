"""The demo, reduced to seconds: every step, the exact files it leaves, the form of its results."""

import json
from pathlib import Path

import pytest

import moce
from moce.commands.demo import ENCODER
from moce.evaluation.results import read_rows
from moce.reporting.results_table import results_table
from moce.runs.model import read_info

RUN = {"config.yaml", "metrics.jsonl", "timings.jsonl", "model.json", "model.safetensors", "state"}
TASKS = ("digits", "vehicles")
SETTINGS = {
    "tasks": TASKS,
    "pretrain_epochs": 0.1,
    "train_epochs": 0.1,
    "num_clusters": 8,
    "num_experts": 2,
    "num_labels": 40,
    "draws": 2,
    "adapt_steps": 2,
    "finetune_epochs": 1,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "run"
    moce.demo(out=out, **SETTINGS)
    return out


@pytest.mark.slow
def test_it_leaves_ordinary_run_folders(demo: Path) -> None:
    names = {path.name for path in demo.iterdir()}
    runs = {"mae", "clusters", "moce", "mae_plus", "evaluation"}
    assert names == runs | {"suite.yaml", "report.html", "demo.json"}
    for name in ("mae", "moce", "mae_plus"):
        assert {path.name for path in (demo / name).iterdir()} == RUN
    kinds = [read_info(demo / name)["kind"] for name in ("mae", "clusters", "moce", "mae_plus")]
    assert kinds == ["mae", "clusters", "moce", "mae"]


@pytest.mark.slow
def test_moce_and_mae_plus_had_equal_steps_and_data(demo: Path) -> None:
    moce_run, mae_plus = (read_info(demo / name) for name in ("moce", "mae_plus"))
    assert moce_run["images"] == mae_plus["images"] == 5100
    last = [
        json.loads((demo / name / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        for name in ("moce", "mae_plus")
    ]
    assert last[0] == last[1] > 0


@pytest.mark.slow
def test_results_have_the_promised_form(demo: Path) -> None:
    rows = read_rows(demo / "evaluation")
    tuned = ("mae_plus", "moce")
    adapted = ("mae_plus_adapted", "moce_adapted")
    probed = ("mae", "random", "best_strategy", *tuned, *adapted)
    expected = {(task, name, "linear", 2) for task in TASKS for name in probed}
    expected |= {(task, name, "finetune", 2) for task in TASKS for name in tuned}
    found = {(r["task"], r["backbone"], r["protocol"], len(r["values"])) for r in rows}
    assert found == expected
    assert all(0 <= value <= 1 for row in rows for value in row["values"])
    table = results_table(rows)
    assert "digits" in table and "vehicles" in table and "regret" in table
    seconds = json.loads((demo / "demo.json").read_text())["seconds"]
    assert list(seconds) == ["mae", "clusters", "moce", "mae_plus", "probes", "finetune", "report"]


@pytest.mark.slow
def test_its_runs_customize_any_task(demo: Path) -> None:
    bank = moce.load(demo / "moce")
    choice = bank.select("demo:emoji")
    assert sum(choice.votes.values()) == sum(choice.cluster_histogram) == 252  # no test images
    assert bank.customize("demo:emoji").num_features == ENCODER["embed_dim"]
    classifier = bank.customize("demo:emoji", num_classes=4)
    assert classifier.head.out_features == 4


@pytest.mark.slow
def test_a_second_run_shows_what_is_there(demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    result = moce.demo(out=demo, reuse=True, **SETTINGS)
    assert result.rows == read_rows(demo / "evaluation")
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before
