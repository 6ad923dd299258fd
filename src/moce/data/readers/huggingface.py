"""Hugging Face data sets: folders of save_to_disk, and names on the hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from moce.data.readers.columns import label_column, text_column
from moce.data.readers.labels import IMAGES, LABELS, SPLITS, column_labels, pick
from moce.data.readers.sample import Label, error_line
from moce.data.readers.splits import column_splits
from moce.data.readers.table import JoinedTable, SampleTable
from moce.errors import MoceError
from moce.runtime.hub import NOT_HERE, cache_if_unreachable

HUB_PREFIX = "hf:"
MARKERS = ("dataset_dict.json", "state.json")


def is_saved(path: Path) -> bool:
    """True if a folder was written by `save_to_disk`."""
    return any((path / marker).is_file() for marker in MARKERS)


def read_saved(path: Path) -> SampleTable:
    """The images of a folder of save_to_disk. Raises MoceError without images or the library."""
    datasets = _library()
    return _load(partial(datasets.load_from_disk, str(path)), str(path))


def read_hub(name: str) -> SampleTable:
    """The images of NAME or NAME:SPLIT, downloaded if necessary. Raises MoceError as `read_saved`."""
    datasets = _library()
    name, _, split = name.partition(":")
    load = partial(datasets.load_dataset, name, split=split or None)
    with cache_if_unreachable() as online:
        try:
            return _load(load, f"{HUB_PREFIX}{name}")
        except MoceError as error:
            if online or Path(name).exists():
                raise
            raise MoceError(f"cannot read {HUB_PREFIX}{name}: {NOT_HERE}") from error


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise MoceError("Hugging Face data sets need a library: pip install 'moce[hf]'") from None
    return datasets


def _load(load: Any, name: str) -> SampleTable:
    try:
        found = load()
        tables = {"": found} if hasattr(found, "features") else dict(found)
        of_tables = column_splits(tables, name)
        parts = [
            _table(table, part, split, name)
            for (part, table), split in zip(tables.items(), of_tables, strict=True)
        ]
        return parts[0] if len(parts) == 1 else JoinedTable(parts)
    except MoceError:
        raise
    except Exception as error:  # of the network, files and configurations: any type
        raise MoceError(f"cannot read {name}: {error_line(error)}") from None


def _table(table: Any, part: str, split: str | None, name: str) -> SampleTable:
    """The rows of one part, named PART/ROW, or ROW if there are no parts."""
    datasets = _library()
    columns = [key for key, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise MoceError(f"{name} has no column of images (columns: {', '.join(table.features)})")
    column = pick(columns, IMAGES) or columns[0]
    encoded = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    labels, splits = _labels(table), _splits(table, split, name)
    ids = [f"{part}/{row}" if part else str(row) for row in range(len(table))]
    read = partial(_read_row, encoded, column)
    return SampleTable(text_column(ids), read, label_column(labels), text_column(splits))


def _splits(table: Any, split: str | None, name: str) -> list[str | None]:
    """The split of the part, or of a part without one, its column."""
    column = pick(table.features, SPLITS) if split is None else None
    if column is None:
        return [split] * len(table)
    return column_splits(table.select_columns(column)[:][column], f"column '{column}' of {name}")


def _read_row(table: Any, column: str, row: int) -> bytes:
    value = table[row][column]
    if value is None or not (value["bytes"] or value["path"]):
        raise ValueError("no content")
    return value["bytes"] or Path(value["path"]).read_bytes()


def _labels(table: Any) -> list[Label | None]:
    """Class names, or values if the column has no names; one, or several, per row."""
    column = pick(table.features, LABELS)
    if column is None:
        return [None] * len(table)
    kind = table.features[column]
    names = getattr(getattr(kind, "feature", kind), "names", None)
    values = table.select_columns(column)[:][column]
    return column_labels(values, names.__getitem__ if names else None)
