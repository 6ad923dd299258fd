"""Parquet files with a column of encoded images: those of `moce pack` and of `datasets`, and the demo's.

Ids, labels and splits are read at once, images when they are needed.
"""

from __future__ import annotations

import json
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

from moce.data.readers.labels import IMAGES, LABELS, SPLITS, column_labels, pick
from moce.data.readers.parquet_rows import ImageColumn, RowReader, decode_offsets
from moce.data.readers.splits import column_splits, source_splits
from moce.data.readers.storage import Storage, are_far, local_file
from moce.data.readers.table import SampleTable
from moce.errors import MoceError

DEMO_PREFIX = "demo:"
TEXT = pyarrow.large_string()
COLUMNS = {"id": ("id",), "label": LABELS, "split": SPLITS}  # beside the images, by preference
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

    Without a column of ids, they are SHARD/ROW; without one of splits, the files' names tell them.
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
    splits = source_splits([shard.images.file.name for shard in shards])
    found = [
        pyarrow.repeat(pyarrow.scalar(split, pyarrow.string()), len(shard.images))
        for split, shard in zip(splits, shards, strict=True)
    ]
    return pyarrow.chunked_array(found)


# --- one file -------------------------------------------------------------------------------------


def _open(file: Storage) -> _Shard:
    """Read the footer and all columns but the images."""
    try:
        with file.open(sparse=True) as content:
            parquet = pyarrow.parquet.ParquetFile(content)
            picked = _picked(parquet.schema_arrow.names)
            table = parquet.read(columns=list(picked.values()))
    except (OSError, EOFError, pyarrow.ArrowException) as error:
        raise MoceError(f"cannot read {file.name}: {str(error).splitlines()[0]}") from None
    images = _image_column(file, parquet.schema_arrow, parquet.metadata)
    return _Shard(images, _columns(table, parquet.schema_arrow, file.name))


def _picked(names: Sequence[str]) -> dict[str, str]:
    """The columns of ids, labels and splits, as far as there are any."""
    found = {kind: pick(names, wanted) for kind, wanted in COLUMNS.items()}
    return {kind: name for kind, name in found.items() if name is not None}


def _image_column(file: Storage, schema: pyarrow.Schema, metadata: Any) -> ImageColumn:
    features = _features(schema)
    marked = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    usual = pick((field.name for field in schema if _may_be_images(field.type)), IMAGES)
    name = next((name for name in [usual, *marked, "image"] if name in schema.names), None)
    if name is None:
        raise MoceError(f"{file.name} has no column 'image' (columns: {', '.join(schema.names)})")
    kind = schema.field(name).type
    in_struct = pyarrow.types.is_struct(kind)
    if not _may_be_images(kind):
        raise MoceError(f"column '{name}' of {file.name} holds {kind}, not encoded images")
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    offsets, sizes = decode_offsets(metadata) or (None, None)
    return ImageColumn(file, name, in_struct, np.cumsum([0, *counts]), offsets, sizes)


def _may_be_images(kind: pyarrow.DataType) -> bool:
    """True for bytes, and for structs with bytes, as `datasets` writes them."""
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


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
    picked = _picked(table.column_names)
    found = {}
    if "id" in picked:
        found["id"] = _text(table.column(picked["id"]), picked["id"], name)
    if "split" in picked:
        found["split"] = _splits(table.column(picked["split"]), f"'{picked['split']}' of {name}")
    if "label" in picked:
        feature = _features(schema).get(picked["label"], {})
        found["label"] = _labels(table.column(picked["label"]), feature, picked["label"], name)
    return found


def _text(values: pyarrow.ChunkedArray, column: str, name: str) -> pyarrow.ChunkedArray:
    try:
        return values.cast(TEXT)
    except (pyarrow.ArrowInvalid, NotImplementedError):  # lists, structs; bytes that are not text
        raise MoceError(f"column '{column}' of {name} holds {values.type}, not text") from None


def _splits(values: pyarrow.ChunkedArray, where: str) -> pyarrow.ChunkedArray:
    encoded = values.dictionary_encode().combine_chunks()
    known = column_splits(encoded.dictionary.to_pylist(), f"column {where}")
    return pyarrow.chunked_array([pyarrow.array(known, pyarrow.string()).take(encoded.indices)])


def _labels(
    values: pyarrow.ChunkedArray, feature: dict[str, Any], column: str, name: str
) -> pyarrow.ChunkedArray:
    """Names of classes, where `datasets` has noted them; else the values."""
    kind, text = values.type, pyarrow.string()
    names = _class_names(feature.get("feature", feature))
    name_of = names.__getitem__ if names else None
    if (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    ):
        found = column_labels(values.to_pylist(), name_of)
        return pyarrow.chunked_array([pyarrow.array(found, pyarrow.list_(text))])
    if pyarrow.types.is_nested(kind):
        raise MoceError(f"column '{column}' of {name} holds {kind}, not text")
    encoded = values.dictionary_encode().combine_chunks()
    found = column_labels(encoded.dictionary.to_pylist(), name_of)
    return pyarrow.chunked_array([pyarrow.array(found, text).take(encoded.indices)])


def _class_names(feature: Any) -> list[str]:
    return list(feature.get("names") or []) if isinstance(feature, dict) else []


# --- the embedded images --------------------------------------------------------------------------


def demo_table() -> pyarrow.Table:
    """The embedded images: columns id, image, source, role, task, split, label (see assets/SOURCES.md)."""
    # read_table would do the same by pyarrow.dataset, which imports pandas.
    path = Path(str(files("moce.data") / "assets" / "demo.parquet"))
    return pyarrow.parquet.ParquetFile(path).read()


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
