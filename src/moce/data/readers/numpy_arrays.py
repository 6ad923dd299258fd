"""NumPy files: .npy and .npz of many images, .npy of one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moce.data.readers.sample import SPLITS, Sample, error_line
from moce.errors import MoceError

IMAGES = ("images", "image", "x", "arr_0")
PREFIXES = ("", "train_", "val_", "test_")  # MedMNIST and others keep all splits in one file


def read_arrays(path: Path) -> list[Sample]:
    """The images of a .npy or .npz file; of .npz files also labels, ids and splits, if there are any.

    The array is [n, h, w] or [n, h, w, c], or [n, c, h, w] if c is then the smallest side.
    Raises MoceError if there is no such array.
    """
    name, arrays = str(path), _load(path)
    found = [prefix for prefix in PREFIXES if f"{prefix}images" in arrays]
    if len(arrays) == 1 or not found:
        return _samples(arrays, _image_key(arrays, name), "", name)
    return [s for p in found for s in _samples(arrays, f"{p}images", p, name)]


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        return {"images": content} if isinstance(content, np.ndarray) else dict(content)
    except Exception as error:  # errors of zip files, headers and data, of many types
        reason = error_line(error)
        if "pickle" in reason or "Python objects" in reason:  # NumPy would advise to allow pickle
            reason = "it is not an array of numbers"
        raise MoceError(f"cannot read {path}: {reason}") from None


def _image_key(arrays: Mapping[str, np.ndarray], name: str) -> str:
    if len(arrays) == 1:
        return next(iter(arrays))
    for key in IMAGES:
        if key in arrays:
            return key
    raise MoceError(f"{name} has no array 'images' (arrays: {', '.join(arrays)})")


def _samples(arrays: Mapping[str, np.ndarray], key: str, prefix: str, name: str) -> list[Sample]:
    """The images of one array, with the columns of the same prefix."""
    images = _checked(arrays[key], key, name)
    count = len(images)
    numbers = [f"{prefix.replace('_', '/')}{row}" for row in range(count)]
    ids = _column(arrays, f"{prefix}ids", count, name) or numbers
    labels = _column(arrays, f"{prefix}labels", count, name)
    splits = _column(arrays, f"{prefix}splits", count, name) or [prefix.rstrip("_")] * count
    return [
        Sample(
            ids[row],
            partial(images.__getitem__, row),
            labels[row] if labels else None,
            SPLITS.get(splits[row]),
        )
        for row in range(count)
    ]


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
    if images.ndim == 4 and _channels_first(images.shape[1:]):
        images = np.moveaxis(images, 1, 3)
    return images


def _column(arrays: Mapping[str, np.ndarray], key: str, count: int, name: str) -> list[str]:
    """One string per image; empty without such an array."""
    if key not in arrays:
        return []
    values = np.asarray(arrays[key])
    if values.size != count:
        raise MoceError(f"{name}: {key} has {values.size} values for {count} images")
    return [str(value) for value in values.reshape(-1).tolist()]


def _channels_first(shape: Sequence[int]) -> bool:
    """True if the first of [a, b, c] is the smallest, so that it must be the channels."""
    return shape[0] < min(shape[1], shape[2])


def open_array(path: Path) -> np.ndarray:
    """The one image of a .npy file, [h, w] or [h, w, c]."""
    pixels = np.load(path, allow_pickle=False)
    if not isinstance(pixels, np.ndarray):
        raise ValueError("not an array")
    if pixels.ndim == 3 and _channels_first(pixels.shape):
        pixels = np.moveaxis(pixels, 0, 2)
    return pixels
