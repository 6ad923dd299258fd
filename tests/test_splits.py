"""Which images learn and which are scored, however people name and place their splits."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from builders import RUNTIME, picture
from commands import run_command

import moce
from moce.data.divide import divide, learning_rows, voting_rows
from moce.data.load import load_images
from moce.data.readers.factory import open_source
from moce.data.readers.splits import column_splits, source_splits, split_of
from moce.errors import MoceError
from moce.evaluation.task import load_task

SHAPE = (3, 16, 16)


def png(number: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture((number * 37 % 256, number * 91 % 256, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def tree(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def found(data: object) -> dict[str, tuple[object, str | None]]:
    return {sample.id: (sample.label, sample.split) for sample in open_source(str(data))}


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            "train Train TRAIN training Training_set train2017 01_train trainval train-images",
        ),
        ("val", "val Valid VALIDATION validation_set val2017"),
        ("test", "test TEST testing Test1 test_set"),
        ("unlabeled", "unlabeled Unsupervised"),
        (None, "trains bullet_train test_tube latest protest cat validity testcat 2017"),
    ],
)
def test_words_of_splits(split: str | None, names: str) -> None:
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["Train/cat/1.png", "TEST/dog/2.png"], [("cat", "train"), ("dog", "test")]),
        (["Training/cat/1.png", "validation/dog/2.png"], [("cat", "train"), ("dog", "val")]),
        (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"],
         [("cat", "test"), ("cat", "train"), ("dog", "train")]),
        (["images/train/cat/1.png", "images/test/dog/2.png"], [("dog", "test"), ("cat", "train")]),
        (["images/train/1.png", "images/test/2.png"], [(None, "test"), (None, "train")]),
        (["train/images/cat/1.png", "test/cat/2.png"], [("cat", "test"), ("cat", "train")]),
        (["cars_train/a/1.png", "cars_test/a/2.png"], [("a", "test"), ("a", "train")]),
        (["seg_train/seg_train/a/1.png", "seg_test/seg_test/a/2.png"],
         [("a", "test"), ("a", "train")]),
        (["train2017/1.png", "val2017/2.png"], [(None, "train"), (None, "val")]),
        # A folder that holds everything says nothing, whatever its name.
        (["training/train/cat/1.png", "training/test/cat/2.png"],
         [("cat", "test"), ("cat", "train")]),
        (["bullet_train/1.png", "freight_train/2.png"],
         [("bullet_train", None), ("freight_train", None)]),
        (["train_station/1.png", "test_tube/2.png"],
         [("test_tube", None), ("train_station", None)]),
    ],
)  # fmt: skip
def test_splits_of_folders(tmp_path: Path, paths: list[str], expected: list) -> None:
    root = tree(tmp_path / "d", *paths)
    assert sorted(found(root).values(), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    "paths",
    [
        ["train/1.png", "car/2.png", "bus/3.png"],
        ["a/test/1.png", "a/cat/2.png"],
        ["train/1.png", "test/2.png", "extra/3.png"],
        ["train/cat/test/1.png", "test/cat/2.png"],
        ["train/car/1.png", "train/test/2.png", "test/train/3.png"],
    ],
)
def test_doubtful_folders_are_refused(tmp_path: Path, paths: list[str], capsys) -> None:
    root = tree(tmp_path / "d", *paths)
    words = ["pack", root, "--size", 16, "--out", tmp_path / "a.moce"]
    assert run_command(words) == 2
    message = capsys.readouterr().err
    assert "split" in message and "rename" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "a.moce").exists()


def test_a_class_called_train_is_a_class_below_a_folder_of_a_split(tmp_path: Path) -> None:
    root = tree(tmp_path / "train", "train/1.png", "car/2.png")
    assert found(root) == {"car/2.png": ("car", None), "train/1.png": ("train", None)}
    both = tree(tmp_path, "test/train/3.png", "test/car/4.png")
    assert found(both)["train/train/1.png"] == ("train", "train")
    assert found(both)["test/car/4.png"] == ("car", "test")


# --- several sources, shards, lists ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["d/train", "d/test"], ["train", "test"]),
        (["d/Training/images", "d/Test/images"], ["train", "test"]),
        (["train-000.tar", "train-001.tar", "test-000.tar"], ["train", "train", "test"]),
        (["train-00000-of-00002.parquet", "test-00000-of-00001.parquet"], ["train", "test"]),
        (["cifar-train-0.tar", "cifar-test-0.tar"], ["train", "test"]),
        (["hf:x:train", "hf:x:test"], ["train", "test"]),
        (["photos", "birds/test"], [None, "test"]),
        (["photos", "birds-test.tar"], [None, "test"]),
        (["test-000.tar", "test-001.tar"], [None, None]),
        (["d/bullet_train", "d/car"], [None, None]),
        (["a/train", "b/train"], [None, None]),
    ],
)
def test_splits_of_sources(names: list[str], splits: list) -> None:
    assert source_splits(names) == splits


def test_a_third_source_beside_train_and_test_is_refused() -> None:
    with pytest.raises(MoceError, match="d/extra"):
        source_splits(["d/train", "d/test", "d/extra"])


def test_two_sources_are_a_task(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/cat/1.png", "train/dog/2.png", "test/cat/3.png")
    task = load_task(f"{root}/train,{root}/test", SHAPE)
    assert sorted(task.train.ids) == ["train/cat/1.png", "train/dog/2.png"]
    assert task.test.ids == ["test/cat/3.png"]


def shard(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(png(number))
            archive.addfile(info, io.BytesIO(png(number)))
    return path


def test_shards_of_splits_are_a_task(tmp_path: Path) -> None:
    shard(tmp_path / "train-000.tar", "cat/1.png", "dog/2.png")
    shard(tmp_path / "train-001.tar", "cat/3.png")
    shard(tmp_path / "test-000.tar", "dog/4.png")
    one = f"{tmp_path}/{{train-000,train-001,test-000}}.tar"
    for data in (one, one.replace("{", "").replace("}", "").replace(",", f".tar,{tmp_path}/")):
        task = load_task(data, SHAPE)
        assert len(task.train) == 3 and [name.split("/")[-1] for name in task.test.ids] == ["4.png"]


def test_image_files_of_a_list_have_the_splits_of_their_paths(tmp_path: Path) -> None:
    tree(tmp_path, "Train/cat/1.png", "Train/dog/2.png", "Test/cat/3.png")
    lines = ["Train/cat/1.png", "Train/dog/2.png", "Test/cat/3.png"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert found(f"@{tmp_path}/list.txt") == {
        "Train/cat/1.png": ("cat", "train"),
        "Train/dog/2.png": ("dog", "train"),
        "Test/cat/3.png": ("cat", "test"),
    }


# --- columns --------------------------------------------------------------------------------------


def test_columns_of_splits(tmp_path: Path) -> None:
    values = ["Training", "TEST", " validation ", None, ""]
    assert column_splits(values, "x") == ["train", "test", "val", None, None]
    with pytest.raises(MoceError, match="'extra'"):
        column_splits(["train", "test", "extra"], "x")
    table = pyarrow.table({"image": [png()] * 2, "Split": ["TRAIN", "Testing"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [split for _, split in found(tmp_path / "a.parquet").values()] == ["train", "test"]
    np.savez(tmp_path / "a.npz", x_train=np.zeros((2, 9, 9), np.uint8),
             y_train=[1, 0], x_test=np.zeros((1, 9, 9), np.uint8), y_test=[1])  # fmt: skip
    assert list(found(tmp_path / "a.npz").values()) == [
        ("1", "train"), ("0", "train"), ("1", "test")]  # fmt: skip


# --- who learns, who is scored --------------------------------------------------------------------


def test_a_task_says_which_images_train_and_which_are_scored(tmp_path: Path, capsys) -> None:
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(10)]
    root = tree(tmp_path / "d", *names)
    task = load_task(str(root), SHAPE)
    expected = "16 training images, scored on 4 test images: a fifth of each class, as there is no"
    assert expected in capsys.readouterr().err
    assert task.scored_on == "4 test images: a fifth of each class, as there is no test/"
    tree(tmp_path / "d2", *(f"{s}/{n}" for s in ("train", "val") for n in names))
    assert load_task(str(tmp_path / "d2"), SHAPE).scored_on == (
        "20 test images: the split val, as there is no test/"
    )


def test_unlabeled_test_images_are_not_scored_and_do_not_learn() -> None:
    """As on Kaggle: the images of test/ have no labels."""
    labels = ["a"] * 5 + ["b"] * 5 + [None] * 3
    splits = ["train"] * 10 + ["test"] * 3
    division = divide(labels, splits)
    assert division.rule == "a fifth of each class, as there is no label in test/"
    assert [division.parts.count(part) for part in ("train", "test", None)] == [8, 2, 3]
    assert learning_rows(labels, splits, "d").tolist() == list(range(10))
    rows = voting_rows(labels, splits, "d").tolist()
    assert rows == [row for row, part in enumerate(division.parts) if part == "train"]


def test_images_that_are_scored_never_learn() -> None:
    splits = ["train", "val", "test", None, "unlabeled"]
    assert learning_rows([None] * 5, splits, "d").tolist() == [0, 1, 3, 4]
    assert learning_rows([None] * 3, ["train", "val", None], "d").tolist() == [0, 2]
    with pytest.raises(MoceError, match="test images only"):
        learning_rows([None] * 2, ["test"] * 2, "d")


def test_commands_that_learn_leave_out_test_images(runs, tmp_path: Path, capsys) -> None:
    cluster = moce.cluster(runs.task, mae=runs.mae, out=tmp_path / "c", num_clusters=2, **RUNTIME)
    table = pyarrow.parquet.read_table(tmp_path / "c" / "assignments.parquet")
    names = table["id"].to_pylist()
    assert names and all(name.startswith("train/") for name in names)
    assert sum(cluster.sizes) == len(names)
    test = sum(1 for _ in (runs.task / "test").rglob("*.png"))
    assert f"left out: {test} test images" in capsys.readouterr().err


def test_customize_votes_with_the_images_that_evaluate_votes_with(runs, tmp_path, capsys) -> None:
    bank = moce.load(runs.moce)
    flat = tmp_path / "flat"
    for number, path in enumerate(sorted(runs.task.rglob("*.png"))):
        target = flat / path.parent.name / f"{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    for data in (runs.task, flat):
        task = load_task(str(data), bank.input_shape)
        expected = bank.select(task.train)
        assert sum(expected.votes.values()) == len(task.train)
        assert bank.select(data).votes == expected.votes
        words = ["customize", runs.moce, data, "--out", tmp_path / f"for_{data.name}", "--device", "cpu",
                 "--precision", "float32", "--threads", 1]  # fmt: skip
        capsys.readouterr()
        assert run_command(words) == 0
        output = capsys.readouterr()
        assert f"{len(task.train)} of {len(task.train) + len(task.test)} images" in output.err
        for route, votes in expected.votes.items():
            assert f"{votes} images" in output.out, route


def test_all_images_of_a_folder_without_classes_vote(runs, tmp_path: Path) -> None:
    root = tree(tmp_path / "d", "1.png", "2.png", "3.png")
    assert sum(moce.load(runs.moce).select(root).votes.values()) == 3
    assert len(load_images(str(root), (16, 16))) == 3
