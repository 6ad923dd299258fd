"""Image data sets and subsets, in memory, temporary files and packed files; how they are decoded."""

from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import RUNTIME, customize, middle, picture, write_images
from commands import QUIET, run_command
from conftest import Runs
from rich.console import Console

import moce
from moce.data.dataset import ImageDataset
from moce.data.from_python import as_image_dataset
from moce.data.load import decode_all, decode_into, load_images
from moce.data.loader import all_on_device
from moce.data.readers.factory import open_source
from moce.data.readers.packed import PixelReader, open_packed
from moce.errors import MoceError
from moce.evaluation.task import load_task
from moce.runs.files import read_lines
from moce.runtime.progress import meter

SIZE = (16, 16)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images, and unreadable ones before, between and after them."""
    root = write_images(tmp_path_factory.mktemp("images") / "data", per_source=5)
    for name in ("0.png", "kmnist.png", "zz.png"):
        (root / name).write_bytes(b"")
    return root


@pytest.fixture(params=["memory", "file", "packed in memory", "packed"])
def images(request, folder: Path, tmp_path: Path, monkeypatch) -> ImageDataset:
    """The same images, wherever they are kept."""
    kept, data = request.param, folder
    if "packed" in kept:
        data = moce.pack(folder, size=16, out=tmp_path / "a.moce").file
    if "memory" not in kept:
        monkeypatch.setattr("moce.data.load.MEMORY_SHARE", 0.0)
    return load_images(str(data), SIZE, tmp_path / "pixels")


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """[20, 3, 16, 16], decoded one by one."""
    samples = open_source(str(folder))
    pixels = np.zeros((len(samples), 3, *SIZE), np.uint8)
    good = [row for row, e in enumerate(samples) if decode_into(pixels, row, e) is None]
    return torch.from_numpy(pixels[good])


def test_a_set_and_its_subsets_give_the_pixels_of_their_rows(
    images: ImageDataset, expected
) -> None:
    assert images.shape == (20, 3, 16, 16) and len(images.skipped) == 3
    assert torch.equal(images.take(slice(None)), expected)
    assert torch.equal(images.take(slice(18, 25)), expected[18:])
    rows = torch.tensor([7, 0, 7, 19])
    assert torch.equal(images.take(rows), expected[rows])
    part = images.subset(range(19, 3, -2))
    assert part.ids == images.ids[19:3:-2] and part.shape == (8, 3, 16, 16)
    assert torch.equal(part.take(torch.tensor([1, 0])), expected[[17, 19]])
    assert torch.equal(part.take(slice(2, 4)), expected[[15, 13]])
    again = part.subset([3, 0])
    assert again.ids == [images.ids[13], images.ids[19]]
    assert torch.equal(again.take(slice(None)), expected[[13, 19]])
    assert images.subset(range(20)) is images
    assert len(images.subset([]).take(slice(None))) == 0


def test_subsets_are_not_copied(images: ImageDataset) -> None:
    part = images.subset([1, 2, 5]).subset([0, 1])
    assert part.stored.data_ptr() == images.stored.data_ptr()
    with pytest.raises(ValueError, match="take"):
        part.pixels  # noqa: B018


def test_rows_that_are_not_there_are_errors(images: ImageDataset) -> None:
    """In a packed file the index follows the pixels; it must not be read as an image."""
    for part, row in ((images, 20), (images.subset([3, 4]), 2)):
        with pytest.raises(IndexError):
            part.take(torch.tensor([row]))


def test_a_subset_on_a_device_has_only_its_own_pixels(
    images: ImageDataset, expected, monkeypatch
) -> None:
    monkeypatch.setattr("moce.data.loader.COPY_BYTES", 3 * 16 * 16 * 3)  # three at a time
    part = all_on_device(images.subset(range(1, 20, 2)), CPU)
    assert torch.equal(part.pixels, expected[1::2]) and part.ids == images.ids[1::2]
    assert torch.equal(part.take(torch.tensor([4, 1])), expected[[9, 3]])


# --- decoding -----------------------------------------------------------------------------------------


def test_no_more_images_are_queued_than_the_threads_need(folder: Path, monkeypatch) -> None:
    """A million queued images would fill gigabytes."""
    monkeypatch.setattr("moce.data.load.worker_threads", lambda: 2)
    monkeypatch.setattr("moce.data.load.AHEAD_PER_THREAD", 3)
    samples = open_source(str(folder))[1:2] * 50
    given = []

    class Counted(list):
        def __iter__(self):
            for sample in samples:
                given.append(sample)
                yield sample

    hold, started = threading.Event(), threading.Event()

    def decode(pixels, row, sample):
        started.set()
        assert hold.wait(20)
        return None, None

    monkeypatch.setattr("moce.data.load._decode_one", decode)
    thread = threading.Thread(target=decode_all, args=(Counted(samples), np.zeros((1, 1, 1, 1))))
    thread.start()
    assert started.wait(20)
    thread.join(0.2)
    assert len(given) <= 3 * 2 + 1
    hold.set()
    thread.join(20)
    assert len(given) == 50


def test_long_decoding_shows_progress(folder: Path, monkeypatch, capsys) -> None:
    load_images(str(folder), SIZE)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("moce.runtime.progress.LINE_EVERY", 0.0)
    monkeypatch.setattr("moce.data.load.REPORT_EVERY", 10)
    load_images(str(folder), SIZE)
    progress = capsys.readouterr().err
    assert "read images 10/23" in progress and "s left, 2 unreadable" in progress


def test_a_bar_waits_until_it_is_worth_it(monkeypatch) -> None:
    for wait, shown in ((60.0, False), (0.0, True)):
        screen = io.StringIO()
        monkeypatch.setattr(
            "moce.runtime.progress.console", Console(file=screen, force_terminal=True)
        )
        with meter("read images", 10, wait=wait) as progress:
            progress.advance(count=10)
        assert ("read images" in screen.getvalue()) == shown
        assert shown or not screen.getvalue()


def test_images_that_do_not_fit_into_memory_go_to_a_temporary_file(
    folder: Path, tmp_path: Path, monkeypatch, expected
) -> None:
    monkeypatch.setattr("moce.data.load.MEMORY_SHARE", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    images = as_image_dataset(folder, SIZE)
    assert torch.equal(images.take(slice(None)), expected) and not list(tmp_path.iterdir())
    with pytest.raises(MoceError, match="moce pack"):
        load_images(str(folder), SIZE)


# --- packed files -------------------------------------------------------------------------------------


def test_reads_that_come_in_pieces_are_put_together(
    folder: Path, tmp_path: Path, expected, monkeypatch
) -> None:
    """Some systems give a few bytes at a time."""
    file = moce.pack(folder, size=16, out=tmp_path / "a.moce").file
    reader = PixelReader(file, open_packed(file).shape)
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, start: preadv(file, [buffers[0][:100]], start)
    )
    assert torch.equal(reader.read([3, 19]), expected[[3, 19]])
    with file.open("r+b") as cut:
        cut.truncate(4096 + 3 * 768 + 200)
    with pytest.raises(MoceError, match="cut short at image 3"):
        reader.read([3])


def test_a_packed_task_of_the_encoders_size_is_not_decoded(
    runs: Runs, tmp_path: Path, monkeypatch
) -> None:
    """Larger ones are, into a file where the memory has no room."""
    usual, share = load_task(str(runs.task), (3, *SIZE)), "moce.data.load.MEMORY_SHARE"
    monkeypatch.setattr(share, 0.0)
    for size in (16, 20):
        file = moce.pack(runs.task, size=size, out=tmp_path / f"{size}.moce").file
        task = load_task(str(file), (3, *SIZE), tmp_path / "pixels")
        assert task.train.shape == (24, 3, size, size) and not (tmp_path / "pixels").exists()
        if size == 16:
            assert task.train.reader is not None and task.test.reader is task.train.reader
            assert torch.equal(task.test.take(slice(None)), usual.test.pixels)
        assert (task.train.ids, task.test.ids) == (usual.train.ids, usual.test.ids)
        assert np.array_equal(task.test_labels, usual.test_labels)


# --- commands that need no memory for all pixels -----------------------------------------------------------


def test_probe_evaluate_and_customize_take_more_images_than_memory(
    runs: Runs, tmp_path: Path, monkeypatch
) -> None:
    """The same results from pixels in temporary files, which are removed."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    suite = tmp_path / "suite.yaml"
    task = {"name": "t", "data": str(runs.task)}
    suite.write_text(json.dumps({"name": "s", "tasks": [task], "probe": {"solver": "lbfgs"}}))
    found = []
    for share in (0.4, 0.0):
        monkeypatch.setattr("moce.data.load.MEMORY_SHARE", share)
        out = tmp_path / f"out{share}"
        kwargs = {"kind": "knn", **RUNTIME}
        probes = [
            moce.probe(runs.backbone, runs.task, **kwargs),
            moce.probe(runs.backbone, runs.task, out=out / "knn", **kwargs),
        ]
        customized = [
            customize(runs.moce, runs.task, out=out / strategy, strategy=strategy).choice
            for strategy in ("route", "probe")
        ]
        words = ["evaluate", suite, "--backbones", f"mae={runs.mae}", *QUIET]
        assert run_command([*words, "--out", out / "evaluate"]) == 0
        rows = read_lines(out / "evaluate" / "rows.jsonl")
        found.append(
            (
                [probe.values for probe in probes],
                [choice.route for choice in customized],
                [row["values"] for row in rows],
                sorted(path.name for path in out.iterdir()),
            )
        )
    assert found[0] == found[1]
    assert not list(temporary.iterdir())


# --- streams --------------------------------------------------------------------------------------


def test_a_stream_is_read_block_by_block_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moce.data.from_python.BLOCK", 4)
    drawn = []

    def stream():
        for number in range(9):
            drawn.append(number)
            yield picture((number * 20, 0, 0)) if number != 4 else np.zeros((3, 3, 7), np.uint8)

    images = as_image_dataset(stream(), SIZE)
    assert drawn == list(range(9))
    assert images.ids == ["0", "1", "2", "3", "5", "6", "7", "8"]
    assert [name for name, _ in images.skipped] == ["4"]
    assert [middle(pixels)[0] for pixels in images.pixels] == [
        20 * int(name) for name in images.ids
    ]


def test_a_stream_customizes_as_a_list_does(runs) -> None:
    bank, listed = moce.load(runs.moce), sorted((runs.task / "train").rglob("*.png"))
    one, other = bank.select(listed), bank.select(path for path in listed)
    assert one.cluster_histogram == other.cluster_histogram


@pytest.mark.parametrize(
    ("items", "message"),
    [((), "no readable image among the 0"), ([np.zeros((3, 3, 7), np.uint8)], "among the 1"),
     ([7], "image 0 is a int")],
)  # fmt: skip
def test_a_stream_without_images_is_refused(items, message: str) -> None:
    with pytest.raises(MoceError, match=message):
        as_image_dataset(iter(items), SIZE)
