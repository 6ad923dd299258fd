"""What the training loop keeps of each image, for every kind of source: at most 100 bytes."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import moce.data.readers.folder as folder
import moce.data.readers.packed as packed
import moce.data.readers.tar as tar
from moce.data.dataset import ImageDataset
from moce.data.divide import learning_rows
from moce.data.load import open_images
from moce.data.loader import BatchOrder
from moce.data.readers.label_tables import Entry
from moce.data.readers.packed import HEADER_BYTES

ROWS, MOST = 5_000, 100  # images, bytes
CLASSES = 100
NAMES = [f"n{row % CLASSES:08d}/n{row % CLASSES:08d}_{row:05d}.JPEG" for row in range(ROWS)]


@dataclass
class Source:
    """data: names it; prepare: replaces what would list files that are not there."""

    data: str
    prepare: Callable[[pytest.MonkeyPatch], None] = lambda patch: None


def listed(names: Sequence[str]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(folder, "_files", lambda root, left_out: list(names))


def one_folder(root: Path) -> Source:
    return Source(str(root), listed(NAMES))


def with_test_images(root: Path) -> Source:
    """Every tenth is scored, so that rows are selected."""
    test = [f"test/{name}" if n % 10 == 0 else f"train/{name}" for n, name in enumerate(NAMES)]
    return Source(str(root), listed(test))


def two_folders(root: Path) -> Source:
    for name in ("photos", "more"):
        (root / name).mkdir()
    return Source(f"{root}/photos,{root}/more", listed(NAMES[: ROWS // 2]))


def several_classes(root: Path) -> Source:
    entries = {
        name: Entry((f"class{row % 7}", f"class{row % CLASSES}"), None)
        for row, name in enumerate(NAMES)
    }

    def prepare(patch: pytest.MonkeyPatch) -> None:
        listed(NAMES)(patch)
        patch.setattr(folder, "find_entries", lambda *_: entries)

    return Source(str(root), prepare)


def parquet(root: Path) -> Source:
    columns = {
        "id": NAMES,
        "image": [b"x"] * ROWS,
        "label": [name.split("/")[0] for name in NAMES],
        "split": ["train"] * ROWS,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), root / "images.parquet")
    return Source(str(root / "images.parquet"))


def tar_shards(root: Path) -> Source:
    (root / "images.tar").touch()
    found = [
        tar._Found(f"images/{name}", name, None, 512 * row, 9) for row, name in enumerate(NAMES)
    ]
    return Source(
        str(root / "images.tar"),
        lambda patch: patch.setattr(tar, "_read_shard", lambda *_: list(found)),
    )


def list_of_files(root: Path) -> Source:
    for name in NAMES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    (root / "list.txt").write_text("\n".join(NAMES))
    return Source(f"@{root}/list.txt")


def arrays(root: Path) -> Source:
    labels = np.arange(ROWS) % CLASSES
    np.savez(root / "all.npz", images=np.zeros((ROWS, 5, 4, 3), np.uint8), labels=labels)
    return Source(str(root / "all.npz"))


def pixels(root: Path) -> Source:
    """A packed file of 0.1.0 beside a folder: alone, its pixels are more than its index."""
    labels = [name.split("/")[0] for name in NAMES]
    index = {"ids": NAMES, "labels": labels, "splits": ["train"] * ROWS}
    content = json.dumps({**index, "skipped": [], "chunks": []}).encode()
    header = packed.header_block((ROWS, 3, 16, 16), content, "test")
    with (root / "pixels.moce").open("wb") as file:
        file.write(header)
        file.seek(HEADER_BYTES + ROWS * 3 * 16 * 16)
        file.write(content)
    (root / "few").mkdir()
    return Source(f"{root}/pixels.moce,{root}/few", listed(NAMES[:10]))


SOURCES = {
    make.__name__: make
    for make in (
        one_folder,
        with_test_images,
        two_folders,
        several_classes,
        parquet,
        tar_shards,
        list_of_files,
        arrays,
        pixels,
    )
}


def kept(images: ImageDataset) -> int:
    """The bytes of the orders of two epochs, which torch allocates."""
    return 2 * BatchOrder(len(images), 4, 0)._epoch_order(0).nbytes


@pytest.mark.parametrize("name", SOURCES)
def test_bytes_of_an_image(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES[name](tmp_path)
    source.prepare(monkeypatch)
    monkeypatch.setattr("moce.data.load.check_values", lambda *_: None)
    monkeypatch.setattr("moce.data.load._tiny_size", lambda *_: None)
    open_images(source.data, (16, 16), choose=learning_rows)  # imports and caches
    gc.collect()
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    images = open_images(source.data, (16, 16), choose=learning_rows)
    gc.collect()
    python, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    columns = pyarrow.total_allocated_bytes() - before
    total = python + columns + kept(images)
    assert len(images) >= 0.9 * ROWS
    assert total / len(images) <= MOST, (python, columns)
    assert images.original(7).id == images.ids[7]
    assert images.original(7).label == images.labels[7]
