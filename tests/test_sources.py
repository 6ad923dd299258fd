"""Sources of images: parquet files, labeled tasks, the embedded set."""

from __future__ import annotations

import hashlib
import io
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from builders import middle, picture
from PIL import Image

from moce.data.load import load_images
from moce.data.readers.factory import open_source
from moce.data.readers.lists import plain_path
from moce.data.readers.parquet import demo_table, demo_tasks
from moce.errors import MoceError
from moce.evaluation.task import draw_labels, load_task

SIZE = (16, 16)


# --- parquet --------------------------------------------------------------------------------------


def encoded(color) -> bytes:
    buffer = io.BytesIO()
    picture(color).save(buffer, "PNG")
    return buffer.getvalue()


COLORS = [(200, 30, 60), (10, 220, 90), (5, 6, 240)]


@pytest.mark.parametrize("struct", [True, False])
def test_parquet_with_bytes_or_structs(tmp_path: Path, struct: bool) -> None:
    content = [encoded(color) for color in COLORS]
    column = [{"bytes": data, "path": "x"} for data in content] if struct else content
    columns = {
        "image": column,
        "id": [7, 8, 9],
        "label": [1, 0, 1],
        "split": ["train"] * 2 + ["val"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    images = load_images(str(tmp_path / "a.parquet"), SIZE)
    assert [tuple(middle(pixels)) for pixels in images.pixels] == COLORS
    assert (images.ids, images.labels) == (["7", "8", "9"], ["1", "0", "1"])
    assert images.splits == ["train", "train", "val"]


def test_parquet_rows_without_bytes_are_skipped(tmp_path: Path) -> None:
    columns = {"image": [encoded(COLORS[0]), None, b"junk"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    images = load_images(str(tmp_path / "a.parquet"), SIZE)
    assert images.ids == ["0"] and [name for name, _ in images.skipped] == ["1", "2"]


@pytest.mark.parametrize(
    "columns",
    [{"pixels": [b"x"]}, {"image": [3]}, {"image": [{"path": "x"}]}, {"image": [["a"]]}],
)
def test_parquet_without_encoded_images_is_refused(tmp_path: Path, columns: dict) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(MoceError, match="image"):
        load_images(str(tmp_path / "a.parquet"), SIZE)


# --- labeled tasks -------------------------------------------------------------------------------


def test_task_without_splits_holds_out_a_fifth_of_each_class(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for number in range(10):
            picture((number, 0, 0)).save(tmp_path / label / f"{number}.png")
    task, again = (load_task(str(tmp_path), (3, *SIZE)) for _ in range(2))
    assert task.classes == ["cat", "dog"]
    assert np.bincount(task.train_labels).tolist() == [8, 8]
    assert np.bincount(task.test_labels).tolist() == [2, 2]
    assert not set(task.train.ids) & set(task.test.ids)
    assert task.train.ids == again.train.ids


def test_label_draws_are_even_over_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 4])
    rows = draw_labels(labels, 21, seed=1)
    assert len(set(rows.tolist())) == 21
    assert np.bincount(labels[rows]).max() <= 9 and np.bincount(labels[rows])[2] == 4
    assert not np.array_equal(rows, draw_labels(labels, 21, seed=2))
    assert np.array_equal(rows, draw_labels(labels, 21, seed=1))
    assert len(draw_labels(labels, None, 0)) == len(draw_labels(labels, 999, 0)) == 84


def test_tasks_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    picture().save(tmp_path / "cat" / "1.png")
    with pytest.raises(MoceError, match="one image"):
        load_task(str(tmp_path), (3, *SIZE))
    picture().save(tmp_path / "cat" / "2.png")
    with pytest.raises(MoceError, match="one class"):
        load_task(str(tmp_path), (3, *SIZE))
    with pytest.raises(MoceError, match="labels"):
        load_task("demo:pretrain", (3, *SIZE))


# --- the embedded images --------------------------------------------------------------------------


def pixel_hashes(rows: list[dict]) -> set[str]:
    """Hashes of decoded pixels: the same picture in another file is found, too."""
    found = set()
    for row in rows:
        with Image.open(io.BytesIO(row["image"])) as image:
            found.add(hashlib.sha256(image.convert("RGBA").tobytes()).hexdigest())
    return found


def test_embedded_images_are_many_small_and_of_several_sources() -> None:
    table = demo_table()
    assert table.num_rows >= 6000
    assert len(set(table["source"].to_pylist())) >= 4
    assert len(set(table["id"].to_pylist())) == table.num_rows
    file = Path(str(files("moce.data") / "assets" / "demo.parquet"))
    assert file.stat().st_size <= 10 * 2**20
    sources = (file.parent / "SOURCES.md").read_text().lower()
    for name in ("cifar", "mnist", "fashion", "noto", "twemoji", "optdigits"):
        assert name in sources


def test_embedded_tasks_share_no_picture_with_pretraining() -> None:
    rows = demo_table().to_pylist()
    pretrain = [row for row in rows if row["role"] == "pretrain"]
    tasks = [row for row in rows if row["role"] == "task"]
    assert len(pretrain) + len(tasks) == len(rows)
    assert not pixel_hashes(pretrain) & pixel_hashes(tasks)
    assert not {"twemoji", "optdigits"} & {row["source"] for row in pretrain}


def test_embedded_training_and_test_images_differ() -> None:
    rows = demo_table().to_pylist()
    for task in demo_tasks():
        splits = [
            pixel_hashes([r for r in rows if r["task"] == task and r["split"] == split])
            for split in ("train", "test")
        ]
        assert not splits[0] & splits[1], task


@pytest.mark.parametrize("task", demo_tasks())
def test_embedded_tasks_have_labels_and_both_splits(task: str) -> None:
    samples = open_source(f"demo:{task}")
    assert all(sample.label for sample in samples)
    classes = {split: {e.label for e in samples if e.split == split} for split in ("train", "test")}
    assert classes["train"] == classes["test"] and len(classes["train"]) >= 2


@pytest.mark.parametrize(
    "path",
    [
        "a/b",
        "/a/b.jpg",
        "./a",
        "a//b",
        "//a",
        "a/./b",
        "a/",
        "a/.",
        ".",
        "",
        "..",
        "a/../b",
        ".a",
        "é",
    ],
)
def test_paths_are_written_as_pathlib_does(path: str) -> None:
    assert plain_path(path) == Path(path).as_posix()
