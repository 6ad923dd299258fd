"""Hugging Face data sets: folders of save_to_disk, and names on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moce.data.readers.sample import SPLITS, Encoded, Label, Sample, error_line
from moce.errors import MoceError
from moce.runtime.hub import NOT_HERE, cache_if_unreachable

HUB_PREFIX = "hf:"
LABELS = ("label", "labels", "fine_label", "class")
MARKERS = ("dataset_dict.json", "state.json")


def is_saved(path: Path) -> bool:
    """True if a folder was written by `save_to_disk`."""
    return any((path / marker).is_file() for marker in MARKERS)


def read_saved(path: Path) -> list[Sample]:
    """The images of a folder of save_to_disk. Raises MoceError without images or the library."""
    datasets = _library()
    return _load(partial(datasets.load_from_disk, str(path)), str(path))


def read_hub(name: str) -> list[Sample]:
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


def _load(load: Any, name: str) -> list[Sample]:
    try:
        found = load()
        splits = {"": found} if hasattr(found, "features") else dict(found)
        return [sample for split in splits for sample in _samples(splits[split], split, name)]
    except MoceError:
        raise
    except Exception as error:  # of the network, files and configurations: any type
        raise MoceError(f"cannot read {name}: {error_line(error)}") from None


def _samples(table: Any, split: str, name: str) -> Iterator[Sample]:
    """The rows of one split, named SPLIT/ROW, or ROW if there are no splits."""
    datasets = _library()
    columns = [key for key, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise MoceError(f"{name} has no column of images (columns: {', '.join(table.features)})")
    encoded = table.select_columns(columns[0])
    encoded = encoded.cast_column(columns[0], datasets.Image(decode=False))
    labels = _labels(table)
    for row in range(len(table)):
        identity = f"{split}/{row}" if split else str(row)
        opened = Encoded(partial(_read_row, encoded, row, columns[0]))
        yield Sample(identity, opened, labels[row], SPLITS.get(split or str(table.split or "")))


def _read_row(table: Any, row: int, column: str) -> bytes:
    value = table[row][column]
    if value is None or not (value["bytes"] or value["path"]):
        raise ValueError("no content")
    return value["bytes"] or Path(value["path"]).read_bytes()


def _labels(table: Any) -> list[Label | None]:
    """Class names, or values if the column has no names; one, or several, per row."""
    column = next((key for key in LABELS if key in table.features), None)
    if column is None:
        return [None] * len(table)
    kind = table.features[column]
    names = getattr(getattr(kind, "feature", kind), "names", None)
    to_name = (lambda value: str(names[value]) if value >= 0 else None) if names else str

    def label(value: Any) -> Label | None:
        if isinstance(value, list):
            return tuple(sorted({str(to_name(item)) for item in value}))
        return None if value is None else to_name(value)

    return [label(value) for value in table.select_columns(column)[:][column]]
