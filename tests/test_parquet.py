"""Parquet files: one or many, ours or those of `datasets` and pandas, opened and read as needed."""

from __future__ import annotations

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from builders import picture
from PIL import Image

from moce.data.encode import Row
from moce.data.pack_shards import ShardWriter
from moce.data.readers.factory import open_source
from moce.data.readers.parquet_rows import OFFSETS
from moce.data.readers.table import SampleTable
from moce.errors import MoceError


def png(value: int) -> bytes:
    file = io.BytesIO()
    picture((value, 0, 0), (8, 8)).save(file, "PNG")
    return file.getvalue()


def red(sample) -> int:
    with sample.open() as image:
        return image.convert("RGB").getpixel((0, 0))[0]


def write(path: Path, start: int, count: int, rows_per_group: int = 4, **columns: list) -> Path:
    """A file of plain bytes whose images are red by start, start + 1, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": [png(start + row) for row in range(count)], **columns}
    pq.write_table(pyarrow.table(table), path, row_group_size=rows_per_group)
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three files of ten, nine and eight images."""
    for number, count in enumerate((10, 9, 8)):
        write(tmp_path / "all" / f"part-{number}.parquet", 10 * number, count)
    return tmp_path / "all"


@pytest.mark.parametrize("pattern", ["", "/*.parquet", "/part-{0..2}.parquet", "/part-?.parquet"])
def test_many_files_are_one_source(shards: Path, pattern: str) -> None:
    samples = open_source(f"{shards}{pattern}")
    assert isinstance(samples, SampleTable) and len(samples) == 27
    assert [sample.id for sample in samples][8:12] == [
        "part-0/8",
        "part-0/9",
        "part-1/0",
        "part-1/1",
    ]
    assert list(map(red, samples)) == [*range(10), *range(10, 19), *range(20, 28)]
    assert red(samples[-1]) == 27 and [red(s) for s in samples[9:11]] == [9, 10]


def test_images_are_read_when_needed_by_any_thread_or_process(shards: Path) -> None:
    samples = pickle.loads(pickle.dumps(open_source(str(shards))))
    rows = np.random.default_rng(0).permutation(27).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: red(samples[row]), rows))
    values = [*range(10), *range(10, 19), *range(20, 28)]
    assert found == [values[row] for row in rows]
    assert pickle.loads(pickle.dumps(samples[3])).open().size == (8, 8)


def test_the_index_is_small_and_holds_no_images(tmp_path: Path) -> None:
    count = 2000
    noise = np.random.default_rng(0).integers(0, 256, (count, 5000), np.uint8)
    ids = [f"class/{row:07d}.jpg" for row in range(count)]
    table = {"image": [row.tobytes() for row in noise], "id": ids, "label": ["cat", "dog"] * 1000}
    pq.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    samples = open_source(str(tmp_path / "a.parquet"))
    assert samples.nbytes <= 60 * count
    assert len(pickle.dumps(samples)) <= 60 * count + 10_000
    assert samples[1].label == "dog" and samples[1999].id == "class/0001999.jpg"


def test_names_of_classes_are_those_that_datasets_notes(tmp_path: Path) -> None:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "eel"])
    )
    rows = {"image": [picture((n, 0, 0)) for n in range(4)], "label": [2, 0, -1, 1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    samples = open_source(str(tmp_path / "a.parquet"))
    assert [sample.label for sample in samples] == ["eel", "cat", None, "dog"]
    assert list(map(red, samples)) == [0, 1, 2, 3]


def test_several_classes_of_an_image_are_named_too(tmp_path: Path) -> None:
    kinds = datasets.ClassLabel(names=["cat", "dog", "eel"])
    features = datasets.Features(picture=datasets.Image(), label=datasets.List(kinds))
    rows = {"picture": [picture()] * 3, "label": [[2, 0], [], None]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    samples = open_source(str(tmp_path / "a.parquet"))
    assert [sample.label for sample in samples] == [("cat", "eel"), (), None]


def test_files_named_by_split_have_that_split(tmp_path: Path) -> None:
    for number, name in enumerate(["train-00000-of-00002", "train-00001-of-00002", "validation"]):
        write(tmp_path / f"{name}.parquet", number, 1)
    found = {sample.id: sample.split for sample in open_source(str(tmp_path))}
    assert list(found.values()) == ["train", "train", "val"]
    write(tmp_path / "x.parquet", 3, 1)
    with pytest.raises(MoceError, match="which split is it"):
        open_source(str(tmp_path))


def test_ids_are_those_of_the_column_and_repeated_ones_are_numbered(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.parquet", 0, 3, id=["x", "y", None])
    write(tmp_path / "a" / "1.parquet", 3, 2, id=["x", "z"])
    samples = open_source(str(tmp_path / "a"))
    assert [sample.id for sample in samples] == ["x", "y", "0/2", "x#2", "z"]
    assert red(samples[3]) == 3


def test_two_sources_of_parquet_keep_their_names(shards: Path, tmp_path: Path) -> None:
    write(tmp_path / "more.parquet", 100, 2)
    samples = open_source(f"{shards},{tmp_path / 'more.parquet'}")
    assert [samples[row].id for row in (0, 26, 27)] == [
        "all/part-0/0", "all/part-2/7", "more.parquet/0"
    ]  # fmt: skip
    assert red(samples[28]) == 101


def packed(path: Path, values: range, path_in_file: str = "a.png") -> Path:
    """A file as `moce pack` writes it."""
    with path.open("w+b") as file, ShardWriter(file, several_labels=False) as writer:
        writer.append([Row(png(row), path_in_file, str(row), None, None) for row in values])
    return path


def test_notes_of_places_that_another_program_copied_are_not_believed(tmp_path: Path) -> None:
    """pandas and pyarrow keep the footer's notes of a table when they write some of its rows."""
    path = packed(tmp_path / "ours.parquet", range(8))
    table = pq.read_table(path)
    assert OFFSETS in pq.read_metadata(path).metadata
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(table.slice(3), tmp_path / "theirs.parquet")
    pq.write_table(table.slice(3), tmp_path / "plain.parquet", **plain)
    pq.write_table(table.take([*range(7, -1, -1)]), tmp_path / "turned.parquet", **plain)
    expected = {
        "ours": range(8),
        "theirs": range(3, 8),
        "plain": range(3, 8),
        "turned": range(7, -1, -1),
    }
    for name, values in expected.items():
        samples = open_source(str(tmp_path / f"{name}.parquet"))
        assert list(map(red, samples)) == list(values), name
        assert (samples.reader.files[0].offsets is not None) == (name == "ours")


def test_a_file_replaced_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    for write_file in (packed, lambda path, values: write(path, values[0], len(values))):
        write_file(tmp_path / "a.parquet", range(8))
        samples = open_source(str(tmp_path / "a.parquet"))
        write_file(tmp_path / "b.parquet", range(9)).replace(tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="has changed since it was opened"):
            samples[7].open()


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 3, 50, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    content = write(tmp_path / "a.parquet", 0, 4).read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:length])
    with pytest.raises(MoceError, match=r"cannot read .*a\.parquet") as refusal:
        open_source(str(tmp_path / "a.parquet"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            {"label": ["a", "b"]},
            r"0\.parquet and .*1\.parquet have different columns: only images, and",
        ),
        ({"id": ["a", "b"]}, "different columns"),
    ],
)
def test_files_with_different_columns_are_refused(tmp_path: Path, other: dict, reason: str) -> None:
    write(tmp_path / "0.parquet", 0, 2)
    write(tmp_path / "1.parquet", 0, 2, **other)
    with pytest.raises(MoceError, match=reason):
        open_source(str(tmp_path))


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no parquet")
    pq.write_table(pyarrow.table({"image": [1, 2]}), tmp_path / "b.parquet")
    pq.write_table(pyarrow.table({"content": [b"x"]}), tmp_path / "c.parquet")
    for name, reason in [("a", "cannot read"), ("b", "holds int64"), ("c", "no column 'image'")]:
        with pytest.raises(MoceError, match=rf"{name}\.parquet") as refusal:
            open_source(str(tmp_path / f"{name}.parquet"))
        assert reason in str(refusal.value)
    with pytest.raises(MoceError, match="no such images"):
        open_source(str(tmp_path / "part-*.parquet"))


def test_rows_without_an_image_fail_alone(tmp_path: Path) -> None:
    pq.write_table(pyarrow.table({"image": [png(1), None, png(3)]}), tmp_path / "a.parquet")
    samples = open_source(str(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="no content"):
        samples[1].open()
    assert (red(samples[0]), red(samples[2])) == (1, 3)
    assert isinstance(samples[0].open(), Image.Image)
    assert json.loads(json.dumps(samples[0].id)) == "0"
