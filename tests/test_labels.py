"""What labels people's files hold, and in what order classes come."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_splits import png, shard, tree

from moce.data.readers.factory import open_source
from moce.data.readers.labels import column_labels, from_text, in_order, label_of, pick
from moce.data.readers.tar_keys import other_parts
from moce.errors import MoceError
from moce.evaluation.task import load_task

SHAPE = (3, 16, 16)


def found(data: object) -> dict[str, object]:
    return {sample.id: sample.label for sample in open_source(str(data))}


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (None, None), (-1, None), ("-1", None), (math.nan, None), ("NaN", None), ("", None),
        ("  ", None), ("null", None), (-1.0, None), (0, "0"), (3.0, "3"), (2.5, "2.5"),
        (" cat ", "cat"), (True, "True"), (b"dog", "dog"), ("none", "none"),
        (["b", "a", "b"], ("a", "b")), ([10, 9], ("9", "10")), ([], ()),
    ],
)  # fmt: skip
def test_values(value: object, label: object) -> None:
    assert label_of(value) == label


MARKS = [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
CLASSES = [("1", "2"), ("0",), ()]


def test_lists_of_0_and_1_are_several_labels() -> None:
    assert column_labels(MARKS) == CLASSES
    assert column_labels([[1.0, 0.0], None], "ab".__getitem__) == [("a",), None]
    assert column_labels([[0, 1], [1]]) == [("0", "1"), ("1",)]  # lists of class numbers
    assert column_labels([1, -1, 0], ["x", "y"].__getitem__) == ["y", None, "x"]


def test_lists_of_0_and_1_mean_the_same_in_every_container(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = pyarrow.table({"image": [png()] * 3, "labels": MARKS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 9, 9, 3), np.uint8), labels=MARKS)
    rows = datasets.Dataset.from_dict({"img": [png()] * 3, "labels": MARKS})
    rows.cast_column("img", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "a.npz", "saved"):
        assert list(found(tmp_path / name).values()) == CLASSES, name


def test_values_that_are_no_label_mean_the_same_in_every_container(tmp_path: Path, capsys) -> None:
    datasets = pytest.importorskip("datasets")
    values = [0.0, 1.0, -1.0, math.nan] + [0.0, 1.0] * 4
    table = pyarrow.table({"image": [png(n) for n in range(12)], "label": values})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", images=np.zeros((12, 9, 9, 3), np.uint8), labels=values)
    rows = datasets.Dataset.from_dict({"image": [png(n) for n in range(12)], "fine_label": values})
    rows.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "saved"))
    for name in ("a.parquet", "a.npz", "saved"):
        task = load_task(str(tmp_path / name), SHAPE)
        assert task.classes == ["0", "1"] and len(task.train) + len(task.test) == 10
        assert "left out: 2 images without a label" in capsys.readouterr().err


def test_preferred_columns(tmp_path: Path) -> None:
    assert pick(["Annotation", "Img", "LABELS"], ("label", "labels")) == "LABELS"
    datasets = pytest.importorskip("datasets")
    columns = {"annotation": [png(1)], "img": [png(2)], "coarse_label": [5], "fine_label": [7]}
    rows = datasets.Dataset.from_dict(columns)
    for name in ("annotation", "img"):
        rows = rows.cast_column(name, datasets.Image())
    rows.save_to_disk(str(tmp_path / "saved"))
    rows.to_parquet(str(tmp_path / "a.parquet"))
    for name in ("saved", "a.parquet"):
        (sample,) = open_source(str(tmp_path / name))
        assert sample.label == "7"
        assert np.asarray(sample.open())[0, 0].tolist() == [74, 182, 60]  # png(2), not png(1)


def test_numbers_are_ordered_by_value(tmp_path: Path) -> None:
    assert sorted(["10", "9", "cat", "0", "1.5"], key=in_order) == ["0", "1.5", "9", "10", "cat"]
    root = tree(tmp_path, *(f"{label}/{n}.png" for label in range(12) for n in range(2)))
    task = load_task(str(root), SHAPE)
    assert task.classes == [str(number) for number in range(12)]
    for name, label in zip(task.train.ids, task.train_labels, strict=True):
        assert name.split("/")[0] == str(label)


# --- tar ------------------------------------------------------------------------------------------


def test_every_key_has_its_own_label(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", "v1.0000.jpg", "v1.0001.jpg", "w.png")
    import io
    import tarfile

    texts = {"v1.0000.cls": b"3\n", "v1.0001.json": b'{"label": 4}', "w.json": b'{"class": "cat"}'}
    with tarfile.open(path, "a") as archive:
        for name, content in texts.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert found(path) == {"a/v1.0000.jpg": "3", "a/v1.0001.jpg": "4", "a/w.png": "cat"}


def test_parts_of_a_sample_are_no_second_image(tmp_path: Path, capsys) -> None:
    names = ["0001.jpg", "0001.seg.png", "0002.jpg", "0002.seg.png", "3.rgb.png", "3.depth.png"]
    assert other_parts(names) == {
        "0001.seg.png": ".seg.png", "0002.seg.png": ".seg.png", "3.depth.png": ".depth.png"
    }  # fmt: skip
    assert other_parts(["v1.0000.jpg", "v1.0001.jpg", "a.seg.png", "b.jpg", "b.2.jpg"]) == {}
    assert list(found(shard(tmp_path / "a.tar", *names))) == [
        "a/0001.jpg", "a/0002.jpg", "a/3.rgb.png"
    ]  # fmt: skip
    assert "left out: 1 .depth.png, 2 .seg.png" in capsys.readouterr().err


def test_an_unpacked_tar_file_is_read_as_the_tar_file(tmp_path: Path, capsys) -> None:
    root = tree(tmp_path / "d", "v1.0000.jpg", "v1.0001.jpg", "2.jpg", "2.seg.png", "2.edited.jpg")
    (root / "v1.0000.cls").write_text("3")
    (root / "v1.0001.json").write_text('{"label": 4}')
    assert found(root) == {
        "2.edited.jpg": None, "2.jpg": None, "v1.0000.jpg": "3", "v1.0001.jpg": "4"
    }  # fmt: skip
    assert "left out: 1 .seg.png" in capsys.readouterr().err


def test_texts() -> None:
    assert from_text(" 7\n") == "7" and from_text("-1") is None
    assert from_text('{"caption": "x", "labels": [2, 1]}', ".json") == ("1", "2")
    assert from_text("5", ".json") == "5" and from_text("{", ".json") is None
    assert from_text('{"caption": "x"}', ".json") is None


# --- tables beside a folder -----------------------------------------------------------------------

PLAIN = {"a.png": "cat", "b.png": "dog", "c.png": None}
TABLES = {
    "labels.csv": "file_name,label\na.png,cat\nb.png,dog\nc.png,\n",
    "meta.tsv": "id\tsex\tlabel\na\tm\tcat\nb\tf\tdog\n",
    "noheader.csv": "a.png,cat\nb.png,dog\n",
    "german.csv": "\ufeffBild;Klasse\r\na.png;cat\r\nb.png;dog\r\n",
    "list.json": json.dumps(
        [{"file": "x/a.png", "class": "cat"}, {"file": "b.png", "class": "dog"}]
    ),
    "map.json": json.dumps({"a.png": "cat", "b.png": "dog"}),
    "dataset.json": json.dumps({"labels": [["a.png", "cat"], ["b.png", "dog"]]}),
    "metadata.jsonl": '{"file_name": "a.png", "label": "cat"}\n{"file_name": "b.png", "label": "dog"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_a_folder_label_its_images(tmp_path: Path, name: str, capsys) -> None:
    root = tree(tmp_path / "d", *PLAIN)
    (root / name).write_text(TABLES[name], encoding="utf-8")
    assert found(root) == PLAIN
    assert f"of 3 images are from {name}" in capsys.readouterr().err


def test_a_table_beside_a_folder_with_splits_and_numbers(tmp_path: Path, capsys) -> None:
    root = tree(tmp_path / "d", "images/1.png", "images/2.png", "images/3.png")
    (tmp_path / "d.csv").write_text(
        "image_id,label,split\n1,0.0,train\n2,1.0,TEST\n3,,train\n9,1,test\n"
    )
    samples = {s.id: (s.label, s.split) for s in open_source(str(root))}
    assert samples == {
        "images/1.png": ("0", "train"), "images/2.png": ("1", "test"), "images/3.png": (None, "train")
    }  # fmt: skip
    assert "labels of 2 of 3 images are from d.csv" in capsys.readouterr().err


def test_a_column_of_0_and_1_per_class(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", "a.png", "b.png")
    (root / "train.csv").write_text("image,rust,scab\na.png,1,1\nb.png,0,0\n")
    assert found(root) == {"a.png": ("rust", "scab"), "b.png": ()}


def test_other_tables_change_nothing_or_say_so(tmp_path: Path, capsys) -> None:
    root = tree(tmp_path / "d", "cat/a.png", "dog/b.png")
    (root / "classes.csv").write_text("number,name\n0,cat\n1,dog\n")
    (root / "cat" / "a.json").write_text('{"caption": "x"}')
    assert found(root) == {"cat/a.png": "cat", "dog/b.png": "dog"}
    (root / "exif.csv").write_text("file,camera,iso\na.png,x,100\nb.png,y,200\n")
    assert found(root) == {"cat/a.png": "cat", "dog/b.png": "dog"}
    assert "none of its columns is called label" in capsys.readouterr().err
    (root / "1.csv").write_text("file,label\na.png,x\n")
    (root / "2.csv").write_text("file,label\na.png,y\n")
    with pytest.raises(MoceError, match="another label"):
        open_source(str(root))


# --- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfcat/a.png\r\n'dog/b.png'\r\n",
        "cat/a.png\ndog/b.png\n".encode("utf-16"),
        b"cat/a.png\0dog/b.png\0",
        b'cat\\a.png\n"dog\\b.png"\n',
        b"cat/a.png cat\ndog/b.png\tdog\n",
        b"./cat/a.png,cat\ndog/b.png, dog\n",
    ],
)
def test_lists_as_other_programs_write_them(tmp_path: Path, content: bytes) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "list.txt").write_bytes(content)
    assert list(found(f"@{tmp_path}/list.txt").values()) == ["cat", "dog"]


def test_labels_and_names_with_spaces_in_a_list(tmp_path: Path) -> None:
    tree(tmp_path, "x/a 1.png", "x/b.png", "x/c.png")
    (tmp_path / "list.txt").write_text("x/a 1.png 10\nx/b.png 9\nx/c.png -1\n")
    assert list(found(f"@{tmp_path}/list.txt").values())[:2] == ["10", "9"]
