"""Parquet files with a column of encoded images: those of `moce pack` and of `datasets`, and the demo's.

Ids, labels and splits are read at once, images when they are needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from moce.data.readers.parquet_rows import ImageColumn, RowReader, decode_offsets
from moce.data.readers.sample import SPLITS
from moce.data.readers.storage import Storage, are_far, local_file
from moce.data.readers.table import SampleTable
from moce.errors import MoceError

DEMO_PREFIX = "demo:"
TEXT = pyarrow.large_string()
COLUMNS = ("id", "label", "split")  # what a file may have beside its images
OPENED_AT_ONCE = 16  # files


@dataclass(frozen=True)
class _Shard:
    """The images of one file, and the columns that it has."""

    images: ImageColumn
    columns: dict[str, pyarrow.ChunkedArray]

    @property
    def kind(self) -> dict[str, str]:
        return {name: str(values.type) for name, values in self.columns.items()}


def read_parquet(path: Path) -> SampleTable:
    """The images of a parquet file. Raises MoceError if they cannot be read."""
    return read_parquet_files([local_file(path)])


def read_parquet_files(shards: Sequence[Storage]) -> SampleTable:
    """The images of several parquet files, in order. Raises MoceError if their columns differ.

    Without a column of ids, they are SHARD/ROW; without one of splits, a file whose name starts with
    train, test or val is that split.
    """
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        opened = list(pool.map(_open, shards))
    for shard in opened[1:]:
        if shard.kind != opened[0].kind:
            raise MoceError(
                f"{opened[0].images.file.name} and {shard.images.file.name} have different columns: "
                f"{_described(opened[0])}, and {_described(shard)}; give them as two sources, "
                "separated by a comma"
            )
    columns = {
        name: pyarrow.chunked_array(
            [chunk for shard in opened for chunk in shard.columns[name].chunks],
            opened[0].columns[name].type,
        )
        for name in opened[0].columns
    }
    rows = pyarrow.chunked_array(_row_ids(opened), TEXT)
    ids = pyarrow.compute.coalesce(columns["id"], rows) if "id" in columns else rows
    splits = columns.get("split") or _splits_by_name(opened)
    reader = RowReader([shard.images for shard in opened])
    first_rows = reader.first_rows if are_far(shards) else None
    return SampleTable(ids.combine_chunks(), reader, columns.get("label"), splits, first_rows)


def _described(shard: _Shard) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in shard.kind.items()) or "only images"


def _row_ids(shards: Sequence[_Shard]) -> list[pyarrow.Array]:
    """ROW, or with several files SHARD/ROW; the shard's whole path if names repeat."""
    paths = [PurePosixPath(shard.images.file.name) for shard in shards]
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    rows = [pyarrow.array(np.arange(len(shard.images))).cast(TEXT) for shard in shards]
    if len(shards) == 1:
        return rows
    join = pyarrow.compute.binary_join_element_wise
    slash = pyarrow.scalar("/", TEXT)
    return [join(pyarrow.scalar(n, TEXT), r, slash) for n, r in zip(names, rows, strict=True)]


def _splits_by_name(shards: Sequence[_Shard]) -> pyarrow.ChunkedArray | None:
    """As data sets on the Hugging Face hub are named: train-00000-of-00012.parquet."""
    if len(shards) == 1:
        return None
    starts = [re.split(r"[^a-z]", PurePosixPath(s.images.file.name).stem)[0] for s in shards]
    found = [
        pyarrow.repeat(pyarrow.scalar(SPLITS.get(start), pyarrow.string()), len(shard.images))
        for start, shard in zip(starts, shards, strict=True)
    ]
    return pyarrow.chunked_array(found)


# --- one file -------------------------------------------------------------------------------------


def _open(file: Storage) -> _Shard:
    """Read the footer and all columns but the images."""
    try:
        with file.open(sparse=True) as content:
            parquet = pyarrow.parquet.ParquetFile(content)
            names = [name for name in COLUMNS if name in parquet.schema_arrow.names]
            table = parquet.read(columns=names)
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise MoceError(f"cannot read {file.name}: {str(error).splitlines()[0]}") from None
    images = _image_column(file, parquet.schema_arrow, parquet.metadata)
    return _Shard(images, _columns(table, parquet.schema_arrow, file.name))


def _image_column(file: Storage, schema: pyarrow.Schema, metadata: Any) -> ImageColumn:
    features = _features(schema)
    marked = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    name = next((name for name in ["image", *marked] if name in schema.names), None)
    if name is None:
        raise MoceError(f"{file.name} has no column 'image' (columns: {', '.join(schema.names)})")
    kind = schema.field(name).type
    in_struct = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    content = kind.field("bytes").type if in_struct else kind
    if not pyarrow.types.is_binary(content) and not pyarrow.types.is_large_binary(content):
        raise MoceError(f"column '{name}' of {file.name} holds {kind}, not encoded images")
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    offsets, sizes = decode_offsets(metadata) or (None, None)
    return ImageColumn(file, name, in_struct, np.cumsum([0, *counts]), offsets, sizes)


def _features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """What `datasets` notes of each column, if it wrote the file."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in found.items() if isinstance(kind, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _columns(
    table: pyarrow.Table, schema: pyarrow.Schema, name: str
) -> dict[str, pyarrow.ChunkedArray]:
    """Ids, labels and splits as text; a label may be a list, of any number of classes."""
    found = {}
    if "id" in table.column_names:
        found["id"] = _text(table.column("id"), "id", name)
    if "split" in table.column_names:
        found["split"] = _splits(_text(table.column("split"), "split", name))
    if "label" in table.column_names:
        found["label"] = _labels(table.column("label"), _features(schema).get("label", {}), name)
    return found


def _text(values: pyarrow.ChunkedArray, column: str, name: str) -> pyarrow.ChunkedArray:
    try:
        return values.cast(TEXT)
    except (pyarrow.ArrowInvalid, NotImplementedError):  # lists, structs; bytes that are not text
        raise MoceError(f"column '{column}' of {name} holds {values.type}, not text") from None


def _splits(values: pyarrow.ChunkedArray) -> pyarrow.ChunkedArray:
    encoded = values.dictionary_encode().combine_chunks()
    known = [SPLITS.get(each or "") for each in encoded.dictionary.to_pylist()]
    return pyarrow.chunked_array([pyarrow.array(known, pyarrow.string()).take(encoded.indices)])


def _labels(
    values: pyarrow.ChunkedArray, feature: dict[str, Any], name: str
) -> pyarrow.ChunkedArray:
    """Names of classes, where `datasets` has noted them; else the values."""
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        lists = values.combine_chunks().cast(pyarrow.list_(values.type.value_type))
        names = _class_names(feature.get("feature", feature))
        flat = _text(_named(pyarrow.chunked_array([lists.values]), names), "label", name)
        mask = lists.is_null() if lists.null_count else None
        again = pyarrow.ListArray.from_arrays(lists.offsets, flat.combine_chunks(), mask=mask)
        return pyarrow.chunked_array([again])
    return _text(_named(values, _class_names(feature)), "label", name)


def _class_names(feature: Any) -> list[str]:
    return list(feature.get("names") or []) if isinstance(feature, dict) else []


def _named(values: pyarrow.ChunkedArray, names: list[str]) -> pyarrow.ChunkedArray:
    """Numbers of classes as their names; -1, the number of unlabeled images, as null."""
    if not names or not pyarrow.types.is_integer(values.type):
        return values
    known = pyarrow.compute.if_else(
        pyarrow.compute.greater_equal(values, 0), values, pyarrow.scalar(None, values.type)
    )
    return pyarrow.chunked_array([pyarrow.array(names).take(known.combine_chunks())])


# --- the embedded images --------------------------------------------------------------------------


def demo_table() -> pyarrow.Table:
    """The embedded images: columns id, image, source, role, task, split, label (see assets/SOURCES.md)."""
    return pyarrow.parquet.read_table(Path(str(files("moce.data") / "assets" / "demo.parquet")))


def demo_tasks() -> list[str]:
    """Names of the embedded tasks; DATA is demo:NAME."""
    tasks = demo_table().column("task").cast(pyarrow.string()).drop_null()
    return sorted(pyarrow.compute.unique(tasks).to_pylist())


def demo_samples(name: str) -> SampleTable:
    """The embedded images for pretraining, or of a task. Raises MoceError for unknown names."""
    table = demo_table()
    column, value = ("role", name) if name == "pretrain" else ("task", name)
    chosen = table.filter(pyarrow.compute.equal(table[column].cast(pyarrow.string()), value))
    if chosen.num_rows == 0:
        valid = ", ".join(DEMO_PREFIX + task for task in ["pretrain", *demo_tasks()])
        raise MoceError(f"no embedded images '{DEMO_PREFIX}{name}' (valid: {valid})")
    columns = _columns(chosen, chosen.schema, DEMO_PREFIX + name)
    reader = _InMemory(chosen.column("image").combine_chunks())
    return SampleTable(columns["id"].combine_chunks(), reader, columns["label"], columns["split"])


@dataclass(frozen=True)
class _InMemory:
    """The bytes of images of a table in memory."""

    images: pyarrow.Array

    def __call__(self, row: int) -> bytes:
        return self.images[row].as_py()
