"""moce cluster, started by torchrun: what two processes find is what one finds, stopped or not."""

from __future__ import annotations

import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from builders import RUNTIME, copy_run, write_images
from launched import moce_lines, moce_words, torchrun, wait_until

import moce
from moce.clustering import balanced_kmeans as balanced
from moce.runs.files import read_tensors
from moce.runs.model import read_metrics

CLOSE = 1e-5
EPSILON = 0.005  # of the clusterings
# 8 clusters, a sample of 64 of 160 images: both stages. A pass that sleeps leaves time to be stopped.
PROGRAM = """
import sys
import time
import moce.clustering.balanced_kmeans as balanced
from moce.cli import main

def slowly(*arguments, balanced_potentials=balanced.balanced_potentials, **options):
    time.sleep({pause})
    return balanced_potentials(*arguments, **options)

balanced.SAMPLE, balanced.balanced_potentials = 8, slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balanced, "SAMPLE", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """161 images, which do not divide by two."""
    folder = write_images(tmp_path_factory.mktemp("odd") / "data")
    extra = write_images(folder.with_name("more"), per_source=1, offset=40)
    next(extra.rglob("*.png")).rename(folder / "last.png")
    return folder


def program(folder: Path, pause: float) -> Path:
    path = folder / "clustering.py"
    path.write_text(PROGRAM.format(pause=pause))
    return path


def settings(data: Path, runs, out: Path) -> dict:
    return {
        **RUNTIME,
        "data": data,
        "mae": runs.mae,
        "out": out,
        "num_clusters": 8,
        "batch_size": 16,
    }


def assert_same(one: Path, other: Path) -> None:
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    assignments = [pq.read_table(run / "assignments.parquet") for run in (one, other)]
    assert assignments[0].equals(assignments[1])
    tensors = [read_tensors(run / "model.safetensors") for run in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, values in tensors[0].items():
        # Potentials are added to cosines over epsilon: rounding is as much larger there.
        atol = CLOSE / EPSILON if name == "potentials" else CLOSE
        assert torch.allclose(values, tensors[1][name], atol=atol, rtol=CLOSE), name
    rows = [read_metrics(run) for run in (one, other)]
    assert len(rows[0]) == len(rows[1]) > 2
    for row, again in zip(*rows, strict=True):
        assert row == pytest.approx(again, abs=CLOSE)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(data: Path, runs, tmp_path: Path) -> None:
    moce.cluster(**settings(data, runs, tmp_path / "one"))
    words = moce_words("cluster", settings(data, runs, tmp_path / "two"))[2:]
    process = torchrun(program(tmp_path, 0.0), *words)
    printed, output = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert printed.count("8 clusters of ") == 1  # the first process alone talks
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_stopped_by_sigterm_and_resumed_by_two_and_by_one(data: Path, runs, tmp_path: Path) -> None:
    moce.cluster(**settings(data, runs, tmp_path / "whole"))
    out = tmp_path / "stopped"
    process = torchrun(
        program(tmp_path, 0.5), *moce_words("cluster", settings(data, runs, out))[2:]
    )
    wait_until(lambda: len(read_metrics(out)) > 1)
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=600)
    assert process.returncode != 0
    assert len(moce_lines(output)) == 1 and "--resume" in moce_lines(output)[0], output
    copied = copy_run(out, tmp_path / "copied")
    words = moce_words("cluster", {**settings(data, runs, out), "resume": True})[2:]
    process = torchrun(program(tmp_path, 0.0), *words)
    _, output = process.communicate(timeout=600)
    assert process.returncode == 0, output
    moce.cluster(**settings(data, runs, copied), resume=True)
    assert_same(tmp_path / "whole", out)
    assert_same(tmp_path / "whole", copied)


@pytest.mark.slow
def test_too_many_clusters_are_refused_once(data: Path, runs, tmp_path: Path) -> None:
    wrong = {**settings(data, runs, tmp_path / "run"), "num_clusters": 500}
    process = torchrun(*moce_words("cluster", wrong))
    _, output = process.communicate(timeout=600)
    assert process.returncode != 0
    assert (
        len(moce_lines(output)) == 1
        and "500 clusters need as many distinct images" in moce_lines(output)[0]
    ), output
    assert not (tmp_path / "run").exists()
