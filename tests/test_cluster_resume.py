"""moce cluster resumes after a kill or signal at any moment with the same result; streamed features."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builders import RUNTIME, planted_features, shake, tiny_spec, unit_rows, write_images

import moce
from moce.clustering import balanced_kmeans as balanced
from moce.clustering import checkpoint, feature_store, sinkhorn
from moce.clustering.feature_store import FeatureFile, mean_of
from moce.commands import cluster
from moce.errors import Interrupted, MoceError
from moce.models.cluster_model import unit
from moce.runs.files import CHECKSUM, checksum, read_tensors, write_tensors
from moce.runs.model import read_info, read_metrics, write_model

COMPARED = ("model.safetensors", "assignments.parquet", "metrics.jsonl")


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing cleans up."""


@pytest.fixture(autouse=True)
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """160 images are few: with a sample of 64 they are clustered in both stages."""
    monkeypatch.setattr(balanced, "SAMPLE", 8)


@dataclass
class Inputs:
    data: Path
    mae: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """160 images and an MAE that was never trained."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    spec = tiny_spec()
    mae = spec.build()
    shake(mae, 0.05)
    (root / "mae").mkdir()
    write_model(root / "mae", "mae", mae.state_dict(), {"spec": spec.to_dict(), "images": 0})
    return Inputs(write_images(root / "data"), root / "mae")


def run(inputs: Inputs, out: Path, **changes: object):
    options = {"mae": inputs.mae, "num_clusters": 8, "batch_size": 16, **RUNTIME, **changes}
    return moce.cluster(inputs.data, out=out, **options)


def counted(function: Callable, last: int, then: Callable[[], None]) -> Callable:
    """The function; its call number `last` is followed by `then`."""
    calls = 0

    def wrapped(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        result = function(*arguments, **options)
        if calls == last:
            then()
        return result

    return wrapped


def kill() -> None:
    raise Killed


def same(one: Path, other: Path) -> None:
    for name in COMPARED:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# When to kill: after so many calls of a function of a module or class.
MOMENTS = [
    (feature_store.FeatureFile, "_sync", 1),
    (feature_store.FeatureFile, "_sync", 4),
    (feature_store, "mean_of", 1),
    (feature_store, "save_file", 1),
    (feature_store, "save_file", 2),
    (feature_store, "unit", 3),
    (checkpoint, "write_tensors", 1),
    (checkpoint, "write_tensors", 4),
    (cluster, "save_iteration", 5),
    (balanced, "balanced_potentials", 6),
    (cluster, "write_assignments", 1),
    (cluster, "write_model", 1),
]


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balanced, "SAMPLE", 8)
        out = tmp_path_factory.mktemp("straight") / "run"
        run(inputs, out)
    return out


@pytest.mark.parametrize(("place", "name", "number"), MOMENTS)
def test_killed_run_ends_like_an_uninterrupted_one(
    inputs, straight: Path, tmp_path: Path, monkeypatch, place, name: str, number: int
) -> None:
    monkeypatch.setattr(feature_store, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(feature_store, "CHUNK_SIZE", 48)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, counted(getattr(place, name), number, kill))
        with pytest.raises(Killed):
            run(inputs, tmp_path / "run")
    again = run(inputs, tmp_path / "run", resume=True)
    same(straight, tmp_path / "run")
    assert not (tmp_path / "run" / "state").exists()
    assert sum(again.sizes) == 160


def test_a_packed_file_is_resumed_at_the_right_row(inputs, tmp_path: Path, monkeypatch) -> None:
    """Its rows are read by number, so those of a slice must not be counted from zero."""
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", 0.0)
    monkeypatch.setattr(feature_store, "SAVE_EVERY", 0.0)
    packed = Inputs(moce.pack(inputs.data, size=16, out=tmp_path / "images.moce").file, inputs.mae)
    run(packed, tmp_path / "straight")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureFile, "_sync", counted(FeatureFile._sync, 4, kill))
        with pytest.raises(Killed):
            run(packed, tmp_path / "run")
    run(packed, tmp_path / "run", resume=True)
    same(tmp_path / "straight", tmp_path / "run")


def test_features_are_not_extracted_twice(inputs, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "save_iteration", counted(checkpoint.save_iteration, 1, kill))
        with pytest.raises(Killed):
            run(inputs, tmp_path / "run")
    monkeypatch.setattr(cluster, "feature_batches", lambda *a, **k: pytest.fail("extracted again"))
    run(inputs, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("place", "name", "number", "words"),
    [(feature_store.FeatureFile, "tensor", 1, "iteration 0,"), (cluster, "save_iteration", 3, "iteration 3,"),
     (cluster, "feature_width", 1, "16 of 160 features")],
)  # fmt: skip
def test_signal_saves_and_names_the_command_to_resume(
    inputs, straight: Path, tmp_path: Path, monkeypatch, place, name, number: int, words: str
) -> None:
    send = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(place, name, counted(getattr(place, name), number, send))
        with pytest.raises(Interrupted, match="--resume") as stopped:
            run(inputs, tmp_path / "run")
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    assert words.split()[1] in str(stopped.value)
    run(inputs, tmp_path / "run", resume=True)
    same(straight, tmp_path / "run")


def test_corrupt_state_is_reported_and_ignored(
    inputs, straight: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "save_iteration", counted(checkpoint.save_iteration, 3, kill))
        with pytest.raises(Killed):
            run(inputs, tmp_path / "run")
    kept = tmp_path / "run" / "state" / checkpoint.FILE
    content = bytearray(kept.read_bytes())
    content[-5] ^= 1
    kept.write_bytes(bytes(content))
    capsys.readouterr()
    run(inputs, tmp_path / "run", resume=True)
    assert f"{kept.name} is corrupt; the iterations start over" in capsys.readouterr().err
    same(straight, tmp_path / "run")


def test_state_of_version_0_1_0_is_read(tmp_path: Path) -> None:
    tensors = {name: torch.rand(3) for name in ("centroids", "potentials", "guide")}
    tensors["assignment"] = torch.arange(5, dtype=torch.int32)
    numbers = {"stage": 1, "number": 2, "step": 7, "settled": True, "moved": 0.25}
    metadata = {"round": json.dumps(numbers), CHECKSUM: checksum(tensors)}
    (tmp_path / "state").mkdir()
    write_tensors(tmp_path / "state" / checkpoint.OLD_FILE, tensors, metadata)
    state = checkpoint.load_iteration(tmp_path, 5, torch.device("cpu"))
    assert state is not None and (state.step, state.converged, state.moved) == (7, True, 0.25)
    assert torch.equal(state.potentials, tensors["potentials"])
    assert torch.equal(state.assignment, tensors["assignment"])


def test_resuming_a_finished_run_gives_its_result(inputs, straight: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    result = run(inputs, straight, resume=True)
    assert sum(result.sizes) == 160 and result.iterations == len(read_metrics(straight))
    assert before == {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}


def test_a_missed_tolerance_is_logged(inputs, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(balanced, "FINAL_BALANCE_STEPS", 1)
    run(inputs, tmp_path / "run", marginal_tolerance=1e-9)
    assert "not to the 0.0% of --marginal-tolerance" in capsys.readouterr().err
    assert read_info(tmp_path / "run")["metrics"]["marginal_error"] > 1e-9


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux")
def test_nobody_maps_the_features_when_their_file_goes(inputs, tmp_path: Path, monkeypatch) -> None:
    """On NFS, or Windows, it could not go; one that stays all the same does not fail the run."""
    maps: list[str] = []

    def stuck(path: Path, ignore_errors: bool) -> None:
        assert ignore_errors
        maps.append(Path("/proc/self/maps").read_text())

    monkeypatch.setattr("moce.commands.cluster.shutil.rmtree", stuck)
    run(inputs, tmp_path / "run")
    assert len(maps) == 1 and str(tmp_path) not in maps[0]
    monkeypatch.undo()
    run(inputs, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "state").exists()


def test_iterations_are_logged_without_times(straight: Path) -> None:
    rows = read_metrics(straight)
    assert {row["stage"] for row in rows} == {0, 1}
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[0].keys() == {"step", "stage", "moved", "marginal_error", "similarity"}


# --- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [0, 10**9])
def test_scores_without_a_cache_give_the_same_clusters(
    inputs, straight: Path, tmp_path: Path, monkeypatch, cache: int
) -> None:
    monkeypatch.setattr(sinkhorn, "CACHE_BYTES", cache)
    run(inputs, tmp_path / "run")
    same(straight, tmp_path / "run")


def test_small_chunks_give_the_same_clusters() -> None:
    features, _ = planted_features(10, 60, 24, 0.08)
    one, other = (balanced.balanced_kmeans(features, 10, chunk_size=size) for size in (4096, 32))
    assert torch.equal(one.assignment, other.assignment)
    assert torch.allclose(one.centroids, other.centroids, atol=1e-5)


def test_features_in_a_file_are_those_in_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(feature_store, "CHUNK_SIZE", 7)
    raw = unit_rows(50, 8) * 3 + 2
    file = FeatureFile(tmp_path, 50, 8)
    file.fill(raw.split(16), lambda: False)
    mean = file.center()
    assert torch.equal(mean, mean_of(raw))
    assert torch.equal(file.tensor(), unit(raw, mean))
    again = FeatureFile(tmp_path, 50, 8)
    assert again.done == 50 and torch.equal(again.center(), mean)
    assert torch.equal(again.tensor(), unit(raw, mean))


def test_features_that_the_disk_has_no_room_for_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(MoceError, match="more than is free"):
        FeatureFile(tmp_path, 50, 8)


def test_a_file_that_is_cut_short_is_filled_again(tmp_path: Path) -> None:
    raw = unit_rows(50, 8)
    FeatureFile(tmp_path, 50, 8).fill(raw.split(16), lambda: False)
    path = tmp_path / "state" / "features-0-of-1"
    path.write_bytes(path.read_bytes()[:-1])
    assert FeatureFile(tmp_path, 50, 8).done == 0


def test_model_file_reads(straight: Path) -> None:
    assert read_tensors(straight / "model.safetensors")["sizes"].sum() == 160
