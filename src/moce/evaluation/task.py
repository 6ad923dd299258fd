"""A labeled task: training and test images with class numbers, one or several per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moce.data.dataset import ImageDataset
from moce.data.load import load_images
from moce.data.readers.factory import open_source
from moce.data.readers.packed import find_packed
from moce.data.readers.sample import Label, Sample
from moce.errors import MoceError

TEST_SHARE = 0.2  # if the source has no splits
SPLITS = ("train", "test")


@dataclass
class Task:
    """train, test: images; train_labels, test_labels: [n] int64 indices into `classes`.

    multi_label: an image may have any number of classes; labels are then [n, C] float32, 0 or 1.
    """

    name: str
    classes: list[str]
    train: ImageDataset
    test: ImageDataset
    train_labels: np.ndarray
    test_labels: np.ndarray
    multi_label: bool = False

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return self.train.skipped + self.test.skipped


def load_task(
    data: str,
    shape: tuple[int, int, int],
    store: Path | None = None,
    max_skipped: float = 1.0,
) -> Task:
    """Load the labeled images of a DATA argument. shape: (channels, h, w).

    If the source has no splits, a fifth of each class (of all images, if they have several classes)
    becomes the test set. Validation images are used for training, or as the test set if there is no
    other. Raises MoceError if there are no labels or a split is missing.
    """
    everything = open_source(data)
    labeled = [row for row, sample in enumerate(everything) if sample.label is not None]
    if not labeled:
        raise MoceError(f"{data} has no labels; put every class in its own folder")
    samples = [everything[row] for row in labeled]
    splits = _splits(samples)
    packed = _packed_as_needed(data, shape)

    def read(wanted: str) -> ImageDataset:
        rows = [row for row, split in zip(labeled, splits, strict=True) if split == wanted]
        if packed is not None:
            return packed.subset(rows)
        chosen = [everything[row] for row in rows]
        return load_images(
            chosen,
            shape[1:],
            store,
            channels=shape[0],
            max_skipped=max_skipped,
            keep_tiny=wanted == "train",
        )

    train, test = read("train"), read("test")
    classes = sorted(_names(train.labels))
    if len(classes) < 2:
        raise MoceError(
            f"{data} has only one class ({', '.join(classes)}); a task needs at least two"
        )
    unknown = sorted(_names(test.labels) - set(classes))
    if unknown:
        raise MoceError(f"classes of the test images without training images: {', '.join(unknown)}")
    multi_label = any(isinstance(sample.label, tuple) for sample in samples)
    labels = [_encode(split.labels, classes, multi_label) for split in (train, test)]
    return Task(data, classes, train, test, labels[0], labels[1], multi_label)


def _packed_as_needed(data: str, shape: tuple[int, int, int]) -> ImageDataset | None:
    """All images of a packed file that has this shape already; None for other sources."""
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


def _splits(samples: list[Sample]) -> list[str]:
    named = {sample.split for sample in samples}
    if named == {None}:
        return _split_by_class(samples)
    becomes = {None: "train", "train": "train", "test": "test"}
    becomes["val"] = "train" if "test" in named else "test"
    splits = [becomes[sample.split] for sample in samples]
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise MoceError(f"no {missing[0]} images: there must be both a train/ and a test/ folder")
    return splits


def _split_by_class(samples: list[Sample]) -> list[str]:
    """The last fifth of each class, in a fixed shuffled order, is the test set.

    Images with several classes are split without regard to them.
    """
    several = any(isinstance(sample.label, tuple) for sample in samples)
    splits = ["train"] * len(samples)
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    rows_of: dict[Label | None, list[int]] = {}
    for row in order:
        rows_of.setdefault(None if several else samples[row].label, []).append(row)
    for label, rows in rows_of.items():
        if len(rows) < 2:
            kind = f"class '{label}'" if label is not None else "the task"
            raise MoceError(f"{kind} has one image; give at least two, or a test/ folder")
        for row in rows[-max(1, round(TEST_SHARE * len(rows))) :]:
            splits[row] = "test"
    return splits


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
