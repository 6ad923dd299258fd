"""All stages through the real command line, and exactly what each one leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from builders import TINY_ARGS, TINY_NAME, write_images, write_task

from moce.cli import main
from moce.evaluation.results import read_rows
from moce.runs.assignments import read_assignments
from moce.runs.files import read_tensors
from moce.runs.model import read_metrics

QUIET = ["--device", "cpu", "--precision", "float32", "--threads", "1"]
FIT = ["--batch-size", "32", "--base-lr", "1e-2", "--log-every", "2", *QUIET]


def moce(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def left_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def training_files(steps: int) -> set[str]:
    checkpoint = f"state/step_{steps:09d}.safetensors"
    written = {"config.yaml", "metrics.jsonl", "timings.jsonl", "model.json", "model.safetensors"}
    return written | {"state/inputs.json", checkpoint}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every stage on images in folders, one of them broken."""
    root = tmp_path_factory.mktemp("end_to_end")
    data, task = write_images(root / "data", per_source=24), write_task(root / "task")
    (data / "broken.png").write_bytes(b"no image")
    model = ["--model", TINY_NAME, "--model-args", json.dumps(TINY_ARGS)]
    decoder = ["--decoder-dim", 16, "--decoder-depth", 1, "--decoder-heads", 2]
    moce("pretrain", data, "--out", root / "mae", *model, *decoder, "--epochs", 2, *FIT)
    moce(
        "cluster",
        data,
        "--mae",
        root / "mae",
        "--out",
        root / "clusters",
        "--num-clusters",
        6,
        *QUIET,
    )
    stage2 = ["train", data, "--mae", root / "mae", "--epochs", 2, *FIT]
    moce(*stage2, "--clusters", root / "clusters", "--num-experts", 3, "--out", root / "moce")
    moce(*stage2, "--method", "mae", "--out", root / "mae_plus")
    moce("customize", root / "moce", task / "train", "--out", root / "backbone", *QUIET)
    moce(
        "probe",
        root / "backbone",
        task,
        "--out",
        root / "probe",
        "--draws",
        2,
        "--num-labels",
        12,
        *QUIET,
    )
    moce(
        "finetune",
        root / "backbone",
        task,
        "--out",
        root / "tuned",
        "--epochs",
        2,
        *FIT,
        "--batch-size",
        8,
    )
    return root


def test_every_run_leaves_exactly_these_files(root: Path) -> None:
    assert left_in(root / "mae") == training_files(6) | {"skipped.jsonl"}
    assert left_in(root / "moce") == training_files(6) | {"skipped.jsonl"}
    assert left_in(root / "mae_plus") == training_files(6) | {"skipped.jsonl"}
    assert left_in(root / "clusters") == {
        "assignments.parquet", "config.yaml", "metrics.jsonl", "model.json", "model.safetensors",
        "skipped.jsonl", "timings.jsonl",
    }  # fmt: skip
    assert left_in(root / "backbone") == {
        "README.md", "chart.png", "config.json", "model.safetensors", "selection.json"
    }  # fmt: skip
    assert left_in(root / "probe") == {"config.yaml", "rows.jsonl"}
    assert left_in(root / "tuned") == training_files(6) | {
        "README.md", "chart.png", "config.json", "rows.jsonl"
    }  # fmt: skip
    made = {"mae", "clusters", "moce", "mae_plus", "backbone", "probe", "tuned"}
    assert {path.name for path in root.iterdir()} == made | {"data", "task"}  # no temporary files


def test_broken_image_is_listed_everywhere_and_used_nowhere(root: Path) -> None:
    for run in ("mae", "clusters", "moce", "mae_plus"):
        (line,) = (root / run / "skipped.jsonl").read_text().splitlines()
        assert json.loads(line)["id"] == "broken.png"
        assert json.loads((root / run / "model.json").read_text())["images"] == 96
    assert "broken.png" not in read_assignments(root / "clusters").to_dict()
    assert len(read_assignments(root / "clusters").to_dict()) == 96


def checkout_revision() -> str:
    """What git says of the checkout that the tests are in."""
    command = ["git", "-C", str(Path(__file__).parents[1]), "describe", "--always"]
    done = subprocess.run([*command, "--abbrev=12"], capture_output=True, text=True)
    return done.stdout.strip()


def test_every_run_says_what_it_is_and_how_it_was_made(root: Path) -> None:
    kinds = {
        "mae": "mae",
        "clusters": "clusters",
        "moce": "moce",
        "mae_plus": "mae",
        "tuned": "classifier",
    }
    for run, kind in kinds.items():
        info = json.loads((root / run / "model.json").read_text())
        assert info["kind"] == kind
        assert {"moce", "torch", "timm", "python"} <= info["versions"].keys()
        assert (
            info["metrics"] and info["git_revision"].removesuffix("-dirty") == checkout_revision()
        )
        config = yaml.safe_load((root / run / "config.yaml").read_text())
        assert (config["device"], config["precision"]) == ("cpu", "float32")  # resolved


def test_weights_are_finite_and_no_run_holds_a_pickle(root: Path) -> None:
    for run in ("mae", "clusters", "moce", "mae_plus", "backbone", "tuned"):
        for name, value in read_tensors(root / run / "model.safetensors").items():
            assert torch.isfinite(value.float()).all(), (run, name)
    suffixes = {path.suffix for path in root.rglob("*") if path.is_file()}
    assert not suffixes & {".pt", ".pth", ".pkl", ".bin", ".npy", ".ckpt"}


def test_both_second_stages_take_the_same_steps_from_the_same_start(root: Path) -> None:
    moce_rows, mae_rows = (read_metrics(root / run) for run in ("moce", "mae_plus"))
    assert [row["step"] for row in moce_rows] == [row["step"] for row in mae_rows] == [2, 4, 6]
    assert [row["lr"] for row in moce_rows] == [row["lr"] for row in mae_rows]


def test_mixture_is_self_contained(root: Path, tmp_path: Path) -> None:
    """Neither the MAE run nor the clusters are needed any more."""
    alone = tmp_path / "alone"
    (root / "moce").rename(alone)
    try:
        moce("customize", alone, root / "task" / "train", "--out", tmp_path / "backbone", *QUIET)
    finally:
        alone.rename(root / "moce")
    one, other = (
        read_tensors(f / "model.safetensors") for f in (root / "backbone", tmp_path / "backbone")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_results_are_accuracies(root: Path) -> None:
    (probe,), (tuned,) = read_rows(root / "probe"), read_rows(root / "tuned")
    assert len(probe["values"]) == 2 and all(0 <= value <= 1 for value in probe["values"])
    assert (probe["protocol"], tuned["protocol"]) == ("linear", "finetune")
    assert 0 <= tuned["values"][0] <= 1 and len(tuned["classes"]) == 3


@pytest.mark.parametrize(
    "command", [["-m", "moce"], ["-c", "import moce.cli, sys; sys.exit(moce.cli.main())"]]
)
def test_entry_points_run(command: list[str]) -> None:
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("moce ")


def test_installed_command_runs() -> None:
    script = Path(sys.executable).with_name("moce")
    done = subprocess.run([script, "pretrain", "/no/such/folder"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "out" in done.stderr
