"""A labeled task: training and test images with class numbers, one or several per image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moce.data.dataset import ImageDataset
from moce.data.divide import divide
from moce.data.load import load_images
from moce.data.readers.factory import check_packs, open_source
from moce.data.readers.labels import in_order
from moce.data.readers.packed import find_packed
from moce.data.readers.sample import Label
from moce.data.readers.table import labels_and_splits, select
from moce.errors import MoceError
from moce.models.fit import Fit
from moce.runtime.progress import log


@dataclass
class Task:
    """train, test: images; train_labels, test_labels: [n] int64 indices into `classes`.

    multi_label: an image may have any number of classes; labels are then [n, C] float32, 0 or 1.
    scored_on: which images are the test images, in words.
    """

    name: str
    classes: list[str]
    train: ImageDataset
    test: ImageDataset
    train_labels: np.ndarray
    test_labels: np.ndarray
    multi_label: bool = False
    scored_on: str = ""

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return self.train.skipped + self.test.skipped


def by_name(tasks: Iterable[str]) -> dict[str, str]:
    """DATA arguments by the names of the tasks. Raises MoceError if two share one."""
    found: dict[str, str] = {}
    for data in tasks:
        name = Path(data.rstrip("/").partition(":")[2] or data).stem
        if name in found:
            raise MoceError(f"two tasks are named {name}: {found[name]} and {data}")
        found[name] = data
    return found


def load_task(
    data: str,
    shape: tuple[int, int, int],
    store: Path | None = None,
    max_skipped: float = 1.0,
    fit: Fit | None = None,
) -> Task:
    """Load the labeled images of a DATA argument. shape: (channels, h, w).

    Which images train and which are scored: `moce.data.divide`; a line says it. Raises MoceError if
    there are no labels or a split is missing.
    """
    everything = open_source(data)
    all_labels, splits = labels_and_splits(everything)
    if all(label is None for label in all_labels):
        raise MoceError(f"{data} has no labels; put every class in its own folder")
    division = divide(all_labels, splits)
    packed = _packed_as_needed(data, shape)

    def read(wanted: str) -> ImageDataset:
        rows = [row for row, part in enumerate(division.parts) if part == wanted]
        if packed is not None:
            return packed.subset(rows)
        return load_images(
            select(everything, rows),
            fit or shape[1:],
            store,
            channels=shape[0],
            max_skipped=max_skipped,
            keep_tiny=True,
            name=data,
        )

    train, test = read("train"), read("test")
    classes = sorted(_names(train.labels), key=in_order)
    if len(classes) < 2:
        raise MoceError(
            f"{data} has only one class ({', '.join(classes)}); a task needs at least two"
        )
    unknown = sorted(_names(test.labels) - set(classes), key=in_order)
    if unknown:
        raise MoceError(f"classes of the test images without training images: {', '.join(unknown)}")
    multi_label = any(isinstance(label, tuple) for label in all_labels)
    labels = [_encode(split.labels, classes, multi_label) for split in (train, test)]
    scored_on = f"{len(test)} test images: {division.rule}"
    log(f"{data}: {len(train)} training images, scored on {scored_on}")
    if unused := division.parts.count(None):
        log(f"{data}: left out: {unused} images without a label (-1, NaN, null or empty)")
    return Task(data, classes, train, test, labels[0], labels[1], multi_label, scored_on)


def _packed_as_needed(data: str, shape: tuple[int, int, int]) -> ImageDataset | None:
    """All images of a packed file that has this shape already; None for other sources.

    Raises MoceError if its images are smaller, as every command does.
    """
    check_packs(data, shape[1:])
    packed = find_packed(data)
    if packed is None or packed.shape[1:] != shape:
        return None
    return replace(load_images(data, shape[1:], channels=shape[0]), skipped=[])


def _names_of(label: Label | None) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else (str(label),)


def _names(labels: Sequence[Label | None]) -> set[str]:
    return {name for label in labels for name in _names_of(label)}


def _encode(labels: Sequence[Label | None], classes: list[str], multi_label: bool) -> np.ndarray:
    """Class numbers [n] int64, or [n, C] float32: 1 where the image has the class, rows may be zero."""
    if multi_label:
        rows = [[name in _names_of(label) for name in classes] for label in labels]
        return np.array(rows, np.float32)
    number = {name: index for index, name in enumerate(classes)}
    return np.array([number[str(label)] for label in labels], np.int64)


def draw_labels(labels: np.ndarray, count: int | None, seed: int, number: int = 0) -> np.ndarray:
    """Rows of random draw `number` of `count` labels, [count]; no two seeds share a draw.

    labels: [n] class numbers, drawn as evenly over the classes as possible, or [n, C] of 0 and 1,
    drawn without regard to classes.
    """
    if count == 1:
        raise MoceError("num_labels 1 leaves only one class; give 2 or more")
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    order = np.random.default_rng([seed, number]).permutation(len(labels))
    if labels.ndim == 2:
        return np.sort(order[:count])
    shuffled = labels[order]
    # Rank of each image within its class: taking the lowest ranks first alternates between classes.
    rank = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(shuffled == label)
        rank[members] = np.arange(len(members))
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])
