"""Which images of a labeled source train and which test."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from builders import write_task

from moce.data.readers.parquet import demo_table
from moce.errors import MoceError
from moce.evaluation.task import load_task

SHAPE = (3, 16, 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 training and 6 or fewer test images of each of 3 classes; two a class are for validation."""
    task = write_task(tmp_path / "task", per_class=12)
    for label in (task / "train").iterdir():
        for image in sorted(label.iterdir())[:2]:
            moved = task / "val" / label.name / image.name
            moved.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(image, moved)
    return task


def test_validation_images_train_where_there_are_test_images(folder: Path) -> None:
    task = load_task(str(folder), SHAPE)
    assert {name.split("/")[0] for name in task.train.ids} == {"train", "val"}
    assert {name.split("/")[0] for name in task.test.ids} == {"test"}


def test_validation_images_are_the_test_images_if_there_are_no_others(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    task = load_task(str(folder), SHAPE)
    assert {name.split("/")[0] for name in task.train.ids} == {"train"}
    assert {name.split("/")[0] for name in task.test.ids} == {"val"}


def test_training_images_are_needed_beside_validation_images(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    shutil.rmtree(folder / "train")
    with pytest.raises(MoceError, match="no train images"):
        load_task(str(folder), SHAPE)


def test_images_of_several_classes_are_divided_without_regard_to_them(tmp_path: Path) -> None:
    """Combinations of classes are often the only ones of their kind."""
    encoded = [row["image"] for row in demo_table().to_pylist()[:20]]
    labels = [["a"] if row % 2 else ["b"] for row in range(19)] + [["a", "b"]]
    table = pyarrow.table({"image": encoded, "label": labels})
    pyarrow.parquet.write_table(table, tmp_path / "several.parquet")
    task = load_task(str(tmp_path / "several.parquet"), SHAPE)
    assert (len(task.train), len(task.test)) == (16, 4)
    assert task.multi_label and task.train_labels.dtype == np.float32
