"""Bad input that once did harm or caused a traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import CLUSTERS, RUNTIME, copy_run, write_images
from PIL import Image

import moce
from moce.cli import main
from moce.data.load import load_images
from moce.runs.model import read_info

QUIET = ["--device", "cpu", "--precision", "float32", "--threads", "1"]
TINY = [
    *("--model", "vit_tiny_patch16_224", "--img-size", "16", "--decoder-dim", "16"),
    *("--decoder-depth", "1", "--decoder-heads", "2", "--epochs", "0.1", "--batch-size", "32"),
    *QUIET,
]
ARGS = "{patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """Assert that a command is refused; returns the line."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in lines[-1]
    return lines[-1]


def test_a_failed_replacement_leaves_the_old_run(runs, tmp_path: Path, capsys) -> None:
    clusters = copy_run(runs.clusters, tmp_path / "clusters")
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(20):
        Image.new("RGB", (16, 16), "red").save(copies / f"{number}.png")
    words = ["cluster", copies, "--mae", runs.mae, "--out", clusters, "--overwrite", *QUIET]
    assert "distinct" in refused(capsys, *words, "--num-clusters", 3)
    assert read_info(clusters)["kind"] == "clusters"
    broken, old = (
        copy_run(runs.clusters, tmp_path / "broken"),
        copy_run(runs.moce, tmp_path / "old"),
    )
    (broken / "assignments.parquet").unlink()
    words = ["train", runs.data, "--mae", runs.mae, "--clusters", broken, "--out", old]
    assert "assignments" in refused(capsys, *words, "--overwrite", "--num-experts", 2, *QUIET)
    assert read_info(old)["kind"] == "moce"


def test_the_report_does_not_replace_weights(runs, tmp_path: Path, capsys) -> None:
    run = copy_run(runs.mae, tmp_path / "run")
    before = (run / "model.safetensors").read_bytes()
    assert "not an HTML page" in refused(capsys, "report", run, "--out", run / "model.safetensors")
    assert (run / "model.safetensors").read_bytes() == before


def test_resume_does_not_write_among_other_files(runs, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    words = ["pretrain", runs.data, "--out", tmp_path, "--resume", *TINY, "--model-args", ARGS]
    assert "no run to resume" in refused(capsys, *words)


@pytest.mark.parametrize("content", ["", "[1, 2]", "[1"])
def test_a_corrupt_config_is_refused_in_one_line(
    runs, tmp_path: Path, capsys, content: str
) -> None:
    run = copy_run(runs.mae, tmp_path / "run")
    (run / "config.yaml").write_text(content)
    assert "config.yaml" in refused(capsys, "pretrain", runs.data, "--out", run, "--resume")


def test_missing_metrics_are_reported(runs, tmp_path: Path, capsys) -> None:
    run = copy_run(runs.mae, tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert "metrics.jsonl" in refused(capsys, "pretrain", runs.data, "--out", run, "--resume")


def test_floats_of_an_unknown_range_are_skipped_with_a_reason(tmp_path: Path) -> None:
    write_images(tmp_path, per_source=1)
    pixels = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    Image.fromarray(pixels).save(tmp_path / "share.tiff")
    Image.fromarray(300 * pixels).save(tmp_path / "counts.tiff")
    images = load_images(str(tmp_path), (16, 16))
    assert [name for name, _ in images.skipped] == ["counts.tiff"]
    assert "0..1" in images.skipped[0][1]


def test_a_mirrored_array_is_an_array(runs) -> None:
    bank = moce.load(runs.moce)
    pixels = load_images(str(runs.task), (16, 16)).pixels.numpy()
    mirrored = np.ascontiguousarray(pixels[:, :, :, ::-1])
    assert bank.select(pixels[:, :, :, ::-1]).votes == bank.select(mirrored).votes
    with pytest.raises(moce.MoceError):
        bank.select(pixels.astype(object))
    with pytest.raises(moce.MoceError, match="threshold"):
        bank.select(pixels, threshold=7)


def test_the_home_folder_is_expanded_without_a_shell(runs, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = moce.cluster(
        runs.data, mae=runs.mae, out="~/clusters", num_clusters=CLUSTERS, **RUNTIME
    )
    assert result.run == tmp_path / "clusters" and read_info(tmp_path / "clusters")


def test_the_output_folder_itself_stays(runs, tmp_path: Path) -> None:
    """It may be a mount point: only its contents are replaced."""
    (tmp_path / "out").mkdir()
    for options in ({}, {"overwrite": True}):
        inode = (tmp_path / "out").stat().st_ino
        moce.cluster(
            runs.data,
            mae=runs.mae,
            out=tmp_path / "out",
            num_clusters=CLUSTERS,
            **RUNTIME,
            **options,
        )
        assert (tmp_path / "out").stat().st_ino == inode
