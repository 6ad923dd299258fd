"""Data sets of Hugging Face's library: folders of save_to_disk, and names on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moce.data.decode import Raster, open_encoded
from moce.data.readers.sample import SPLITS, Sample
from moce.data.readers.torchvision import Label
from moce.errors import MoceError

HUB_PREFIX = "hf:"
LABELS = ("label", "labels", "fine_label", "class")
MARKS = ("dataset_dict.json", "state.json")


def is_saved(path: Path) -> bool:
    """Whether a folder is one that `save_to_disk` leaves."""
    return any((path / mark).is_file() for mark in MARKS)


def read_saved(path: Path) -> list[Sample]:
    """The images of a folder of save_to_disk. Raises MoceError if it has none, or without the library."""
    datasets = _library()
    return _load(partial(datasets.load_from_disk, str(path)), str(path))


def read_hub(name: str) -> list[Sample]:
    """The images of NAME or NAME:SPLIT, downloaded if need be. Raises MoceError as `read_saved`."""
    datasets = _library()
    name, _, split = name.partition(":")
    load = partial(datasets.load_dataset, name, split=split or None)
    return _load(load, f"{HUB_PREFIX}{name}")


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise MoceError("Hugging Face data sets need a library: pip install 'moce[hf]'") from None
    return datasets


def _load(load: Any, name: str) -> list[Sample]:
    try:
        found = load()
        parts = {"": found} if hasattr(found, "features") else dict(found)
        samples = [sample for split, part in parts.items() for sample in _part(part, split, name)]
    except MoceError:
        raise
    except Exception as error:  # sockets, files, configurations: all sorts
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise MoceError(f"cannot read {name}: {reason}") from None
    if not samples:
        raise MoceError(f"no images in {name}")
    return samples


def _part(part: Any, split: str, name: str) -> Iterator[Sample]:
    """The rows of one split, called SPLIT/ROW, or ROW where there are no splits."""
    datasets = _library()
    columns = [key for key, kind in part.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise MoceError(f"{name} has no column of images (columns: {', '.join(part.features)})")
    encoded = part.select_columns(columns[0]).cast_column(columns[0], datasets.Image(decode=False))
    labels = _labels(part)
    for row in range(len(part)):
        identity = f"{split}/{row}" if split else str(row)
        opened = partial(_open_row, encoded, row, columns[0])
        yield Sample(identity, opened, labels[row], SPLITS.get(split or str(part.split or "")))


def _open_row(part: Any, row: int, column: str) -> Raster:
    value = part[row][column]
    if value is None or not (value["bytes"] or value["path"]):
        raise ValueError("no content")
    return open_encoded(value["bytes"] or Path(value["path"]))


def _labels(part: Any) -> list[Label | None]:
    """Names of classes, where a column has them: one, or several, per row."""
    column = next((key for key in LABELS if key in part.features), None)
    if column is None:
        return [None] * len(part)
    kind = part.features[column]
    names = getattr(getattr(kind, "feature", kind), "names", None)
    call = (lambda value: str(names[value]) if value >= 0 else None) if names else str

    def label(value: Any) -> Label | None:
        if isinstance(value, list):
            return tuple(sorted({str(call(item)) for item in value}))
        return None if value is None else call(value)

    return [label(value) for value in part.select_columns(column)[:][column]]
