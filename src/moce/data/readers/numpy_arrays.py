"""Arrays of NumPy's: .npy and .npz files of many images, and .npy files of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from moce.data.readers.sample import SPLITS, Sample
from moce.data.readers.torchvision import Label
from moce.errors import MoceError

IMAGES = ("images", "image", "x", "arr_0")
PARTS = ("", "train_", "val_", "test_")  # MedMNIST and others keep the splits in one file


def read_arrays(path: Path, name: str) -> list[Sample]:
    """The images of an array file. .npz: labels, ids and splits are read too, if they are there.

    An array is [n, h, w] or [n, h, w, c], or [n, c, h, w] where that makes c the smallest side.
    Raises MoceError if there is no such array.
    """
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = {"images": content} if isinstance(content, np.ndarray) else dict(content)
    except Exception as error:  # zip, header and data errors of all sorts
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "pickle" in reason or "Python objects" in reason:  # NumPy's advice would be to trust it
            reason = "it is no array of numbers"
        raise MoceError(f"cannot read {name}: {reason}") from None
    parts = [part for part in PARTS if f"{part}images" in arrays] if len(arrays) > 1 else []
    samples = [sample for part in parts for sample in _part(arrays, f"{part}images", part, name)]
    if not parts:
        samples = _part(arrays, _image_array(arrays, name), "", name)
    if not samples:
        raise MoceError(f"no images in {name}")
    return samples


def _image_array(arrays: Mapping[str, np.ndarray], name: str) -> str:
    if len(arrays) == 1:
        return next(iter(arrays))
    for key in IMAGES:
        if key in arrays:
            return key
    raise MoceError(f"{name} has no array 'images' (arrays: {', '.join(arrays)})")


def _part(arrays: Mapping[str, np.ndarray], key: str, part: str, name: str) -> list[Sample]:
    images = arrays[key]
    if not isinstance(images, np.ndarray):  # any file may lie in a zip
        raise MoceError(f"cannot read {name}: {key} is no array")
    if images.ndim not in (3, 4):
        raise MoceError(
            f"{name}: images must be [n, h, w] or [n, h, w, c], not {list(images.shape)}"
        )
    if images.dtype.kind not in "buif":
        raise MoceError(f"{name}: images of type {images.dtype}; give uint8, uint16 or float 0..1")
    if images.ndim == 4 and _channels_first(images.shape[1:]):
        images = np.moveaxis(images, 1, 3)
    count = len(images)
    ids = _column(arrays, f"{part}ids", count, name) or [
        f"{part.replace('_', '/')}{row}" for row in range(count)
    ]
    labels: Sequence[Label | None] = _column(arrays, f"{part}labels", count, name) or [None] * count
    own = _column(arrays, f"{part}splits", count, name) or [part.rstrip("_")] * count
    return [
        Sample(str(ids[row]), partial(images.__getitem__, row), labels[row], SPLITS.get(own[row]))
        for row in range(count)
    ]


def _column(arrays: Mapping[str, np.ndarray], key: str, count: int, name: str) -> list[str]:
    """One string per image; none if there is no such array."""
    if key not in arrays:
        return []
    values = np.asarray(arrays[key])
    if values.size != count:
        raise MoceError(f"{name}: {key} has {values.size} values for {count} images")
    return [str(value) for value in values.reshape(-1).tolist()]


def _channels_first(shape: Sequence[int]) -> bool:
    """Whether [a, b, c] are channels, height, width: the channels are the fewest; last if in doubt."""
    return shape[0] < min(shape[1], shape[2])


def open_array(path: Path) -> np.ndarray:
    """The one image of a .npy file, [h, w] or [h, w, c]."""
    pixels = np.load(path, allow_pickle=False)
    if not isinstance(pixels, np.ndarray):
        raise ValueError("not an array")
    if pixels.ndim == 3 and _channels_first(pixels.shape):
        pixels = np.moveaxis(pixels, 0, 2)
    return pixels
