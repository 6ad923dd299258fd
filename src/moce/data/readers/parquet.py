"""Parquet files with a column of encoded images, such as the demo images embedded in moce."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from moce.data.decode import Raster, open_encoded
from moce.data.readers.labels import IMAGES, LABELS, SPLITS, column_labels, pick
from moce.data.readers.sample import Label, Sample
from moce.data.readers.splits import column_splits
from moce.errors import MoceError

DEMO_PREFIX = "demo:"


def read_parquet(path: Path) -> list[Sample]:
    """The images of a parquet file. Raises MoceError if they cannot be read."""
    return _samples(_read_table(path), str(path))


def _read_table(path: Path) -> pyarrow.Table:
    """The table of a parquet file. Raises MoceError if it cannot be read or has no image column."""
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise MoceError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if _image_column(table) is None:
        raise MoceError(f"{path} has no column 'image' (columns: {', '.join(table.column_names)})")
    return table


def _samples(table: pyarrow.Table, name: str) -> list[Sample]:
    """Rows with encoded images in column image (bytes, or a struct with bytes); id, label, split optional.

    A label that is a list stands for any number of classes.
    """
    images = table.column(_image_column(table))
    if pyarrow.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        images = pyarrow.compute.struct_field(images, "bytes")
    if not pyarrow.types.is_binary(images.type) and not pyarrow.types.is_large_binary(images.type):
        raise MoceError(f"column 'image' of {name} holds {images.type}, not encoded images")
    ids = _strings(table, "id", name) or [str(row) for row in range(table.num_rows)]
    labels = _labels(table, name)
    splits = _splits(table, name)

    def sample(row: int) -> Sample:
        return Sample(str(ids[row]), lambda: _decode(images[row].as_py()), labels[row], splits[row])

    return [sample(row) for row in range(table.num_rows)]


def _decode(content: bytes | None) -> Raster:
    if content is None:
        raise ValueError("no content")
    return open_encoded(content)


def _image_column(table: pyarrow.Table) -> str | None:
    return pick(table.column_names, IMAGES)


def _labels(table: pyarrow.Table, name: str) -> Sequence[Label | None]:
    column = pick(table.column_names, LABELS)
    if column is None:
        return [None] * table.num_rows
    kind = table[column].type
    if pyarrow.types.is_struct(kind):
        raise MoceError(f"column '{column}' of {name} holds {kind}, not text")
    return column_labels(table[column].to_pylist())


def _splits(table: pyarrow.Table, name: str) -> Sequence[str | None]:
    column = pick(table.column_names, SPLITS)
    values = table[column].to_pylist() if column else [None] * table.num_rows
    return column_splits(values, f"column '{column}' of {name}")


def _strings(table: pyarrow.Table, column: str, name: str) -> Sequence[str | None]:
    if column not in table.column_names:
        return []
    values = table.column(column)
    try:
        return values.cast(pyarrow.string()).to_pylist()
    except (pyarrow.ArrowInvalid, NotImplementedError):  # lists, structs; bytes that are not text
        raise MoceError(f"column '{column}' of {name} holds {values.type}, not text") from None


def demo_table() -> pyarrow.Table:
    """The embedded images: columns id, image, source, role, task, split, label (see assets/SOURCES.md)."""
    return _read_table(Path(str(files("moce.data") / "assets" / "demo.parquet")))


def demo_tasks() -> list[str]:
    """Names of the embedded tasks; DATA is demo:NAME."""
    tasks = demo_table().column("task").cast(pyarrow.string()).drop_null()
    return sorted(pyarrow.compute.unique(tasks).to_pylist())


def demo_samples(name: str) -> list[Sample]:
    """The embedded images for pretraining, or of a task. Raises MoceError for unknown names."""
    table = demo_table()
    column, value = ("role", name) if name == "pretrain" else ("task", name)
    chosen = table.filter(pyarrow.compute.equal(table[column].cast(pyarrow.string()), value))
    if chosen.num_rows == 0:
        valid = ", ".join(DEMO_PREFIX + task for task in ["pretrain", *demo_tasks()])
        raise MoceError(f"no embedded images '{DEMO_PREFIX}{name}' (valid: {valid})")
    return _samples(chosen, DEMO_PREFIX + name)
