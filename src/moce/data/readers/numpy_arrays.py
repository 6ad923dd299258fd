"""NumPy files: .npy and .npz of many images, .npy of one image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moce.data.readers.columns import label_column, text_column
from moce.data.readers.labels import IMAGES, LABELS, SPLITS, column_labels, pick
from moce.data.readers.left_out import hidden_part
from moce.data.readers.sample import Label, error_line
from moce.data.readers.splits import column_splits
from moce.data.readers.table import JoinedTable, RasterTable, SampleTable
from moce.errors import MoceError

# MedMNIST and others keep all splits in one file: train_images, test_labels.
MOST_COLORS = 4
PREFIXES = {"": None, "train_": "train", "val_": "val", "valid_": "val", "test_": "test"}


def read_arrays(path: Path) -> SampleTable:
    """The images of a .npy or .npz file; of .npz files also labels, ids and splits, if there are any.

    The array is [n, h, w] or [n, h, w, c], or [n, c, h, w] if c is then the smallest side.
    Raises MoceError if there is no such array.
    """
    name, arrays = str(path), _load(path)
    found = [
        (p, key) for p in PREFIXES if (key := _of_prefix(arrays, p, (*IMAGES, "x"))) is not None
    ]
    if len(arrays) == 1 or not found:
        found = [("", _only_key(arrays, name))]
    parts = [_table(arrays, key, prefix, name) for prefix, key in found]
    return parts[0] if len(parts) == 1 else JoinedTable(parts)


def _of_prefix(arrays: Iterable[str], prefix: str, wanted: Sequence[str]) -> str | None:
    """The key of a split's array: test_images for "test_", or images_test, x_test."""
    word = prefix.rstrip("_")
    keys = {key: key for key in arrays}
    if word:
        keys = {}
        for key in arrays:
            lower = key.casefold()
            if lower.startswith(prefix):
                keys[lower.removeprefix(prefix)] = key
            elif lower.endswith(f"_{word}"):
                keys[lower.removesuffix(f"_{word}")] = key
    found = pick(keys, wanted)
    return None if found is None else keys[found]


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {"images": content}
        # Archives made on a Mac have members such as __MACOSX/._images.npy.
        return {key: content[key] for key in content if hidden_part(key) is None}
    except Exception as error:  # errors of zip files, headers and data, of many types
        reason = error_line(error)
        if "pickle" in reason or "Python objects" in reason:  # NumPy would advise to allow pickle
            reason = "it is not an array of numbers"
        raise MoceError(f"cannot read {path}: {reason}") from None


def _only_key(arrays: Mapping[str, np.ndarray], name: str) -> str:
    key = next(iter(arrays)) if len(arrays) == 1 else pick(arrays, ("arr_0",))
    if key is None:
        raise MoceError(f"{name} has no array 'images' (arrays: {', '.join(arrays)})")
    return key


def _table(arrays: Mapping[str, np.ndarray], key: str, prefix: str, name: str) -> RasterTable:
    """The images of one array, with the columns of the same prefix."""
    images = _checked(arrays[key], key, name)
    count = len(images)
    numbers = [f"{prefix.replace('_', '/')}{row}" for row in range(count)]
    ids = [str(each) for each in _column(arrays, prefix, ("ids", "id"), count, name)] or numbers
    labels: list[Label | None] = [None] * count
    if found := _column(arrays, prefix, LABELS, count, name):
        labels = column_labels(found)
    splits: list[str | None] = [PREFIXES[prefix]] * count
    if not prefix and (found := _column(arrays, prefix, SPLITS, count, name)):
        splits = column_splits(found, name)
    columns = (label_column(labels), text_column(splits))
    return RasterTable(text_column(ids), images.__getitem__, *columns)


def _checked(images: object, key: str, name: str) -> np.ndarray:
    """The array as [n, h, w] or [n, h, w, c]. Raises MoceError if it cannot be images."""
    if not isinstance(images, np.ndarray):  # a .npz can contain any file
        raise MoceError(f"cannot read {name}: {key} is not an array")
    if images.ndim not in (3, 4):
        raise MoceError(
            f"{name}: images must be [n, h, w] or [n, h, w, c], not {list(images.shape)}"
        )
    if images.dtype.kind not in "buif":
        raise MoceError(f"{name}: images of type {images.dtype}; give uint8, uint16 or float 0..1")
    if images.ndim == 3 and _is_doubtful(images.shape):
        raise MoceError(
            f"{name}: {key} of shape {list(images.shape)} could be one image, or images in another "
            "order; give [n, h, w, c], with c 1 for gray ones"
        )
    if images.ndim == 4 and _has_two_orders(images.shape[1:]):
        raise MoceError(
            f"{name}: {key} of shape {list(images.shape)} could have its channels first or last; "
            "save the images as files"
        )
    if images.ndim == 4 and _channels_first(images.shape[1:]):
        images = np.moveaxis(images, 1, 3)
    return images


def _column(
    arrays: Mapping[str, np.ndarray], prefix: str, wanted: Sequence[str], count: int, name: str
) -> list[Any]:
    """One value, or one list of values, per image; empty without such an array."""
    key = _of_prefix(arrays, prefix, wanted)
    if key is None:
        return []
    values = np.asarray(arrays[key])
    if len(values.reshape(-1)) == count:
        values = values.reshape(-1)
    if len(values) != count:
        raise MoceError(f"{name}: {key} has {len(values)} values for {count} images")
    if values.ndim > 2 or (values.ndim == 2 and not _are_marks(values)):
        raise MoceError(
            f"{name}: {key} of shape {list(values.shape)} for {count} images; give one value per "
            "image, or 0 and 1 for every class"
        )
    return values.tolist()


def _are_marks(values: np.ndarray) -> bool:
    return values.dtype.kind in "buif" and bool(np.isin(values, (0, 1)).all())


def _is_doubtful(shape: Sequence[int]) -> bool:
    """True for three axes that may not be [n, h, w]: [h, w, 3], or [28, 28, n] as in Matlab."""
    return shape[2] <= MOST_COLORS < min(shape[:2]) or (shape[0] == shape[1] != shape[2])


def _has_two_orders(shape: Sequence[int]) -> bool:
    """True for [a, b, c] that could be [c, h, w] as well as [h, w, c]: 3 x 32 x 3, 64 x 3 x 64."""
    return shape[0] == shape[2] or (shape[1] == shape[2] < shape[0])


def _channels_first(shape: Sequence[int]) -> bool:
    """True if the first of [a, b, c] is the smallest, so that it must be the channels."""
    return shape[0] < min(shape[1], shape[2])


def open_array(path: Path) -> np.ndarray:
    """The one image of a .npy file, [h, w] or [h, w, c]."""
    pixels = np.load(path, allow_pickle=False)
    if not isinstance(pixels, np.ndarray):
        raise ValueError("not an array")
    if pixels.ndim == 3 and _has_two_orders(pixels.shape):
        raise ValueError(f"channels of shape {list(pixels.shape)} could be first or last")
    if pixels.ndim == 3 and _channels_first(pixels.shape):
        pixels = np.moveaxis(pixels, 0, 2)
    return pixels
