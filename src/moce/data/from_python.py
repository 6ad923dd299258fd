"""Arrays, tensors, PIL images, streams as an ImageDataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moce.data.dataset import ImageDataset
from moce.data.load import Choose, decode_all, load_images, temporary_file
from moce.data.readers.factory import Source, open_sources
from moce.data.readers.left_out import LeftOut
from moce.data.readers.sample import Encoded, Sample, is_image_name
from moce.data.value_range import check_values
from moce.errors import MoceError
from moce.models.fit import Fit
from moce.runtime.progress import log

BLOCK = 1024  # images of a stream decoded at a time


def as_image_dataset(
    images: object, fit: tuple[int, int] | Fit, channels: int = 3, choose: Choose | None = None
) -> ImageDataset:
    """Images in any form as an ImageDataset.

    images: DATA as on the command line; an ImageDataset; a list of paths, sources, PIL images or
    arrays [h, w] or [h, w, c]; another iterable of paths, PIL images or arrays; a uint8 tensor or
    array [n, channels, h, w] of the right size. fit: see `load_images`. choose: which rows of DATA,
    and of a list of sources, to load (see `load_images`). Says which images cannot be read. Raises
    MoceError for anything else.
    """
    if isinstance(images, ImageDataset):
        return images
    found = _read(images, fit if isinstance(fit, Fit) else Fit(fit), channels, choose)
    for name, reason in found.skipped:
        log(f"skipped {name}: {reason}")
    return found


def _read(images: object, fit: Fit, channels: int, choose: Choose | None) -> ImageDataset:
    if isinstance(images, str | Path):
        return load_images(str(images), fit, temporary_file(), channels=channels, choose=choose)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.from_numpy(np.ascontiguousarray(images))  # torch takes no flipped views
    if isinstance(images, Tensor):
        return _from_tensor(images, fit.size, channels)
    if isinstance(images, Sequence) and len(images) > 0:
        samples = _as_samples(images)
        return load_images(samples, fit, temporary_file(), channels=channels, choose=choose)
    if isinstance(images, Iterable) and not isinstance(images, Sized):
        return _from_stream(images, fit, channels)
    raise MoceError("images must be a folder, a parquet file, a list of images, or a uint8 tensor")


def as_samples(images: ImageDataset) -> list[Sample]:
    """The images of a dataset one by one; without their originals they open as arrays [h, w, channels]."""
    if images.originals is not None:
        return [images.original(row) for row in range(len(images))]
    columns = zip(images.ids, images.labels, images.splits, strict=True)
    return [
        Sample(name, partial(_array, images, row), label, split)
        for row, (name, label, split) in enumerate(columns)
    ]


def _array(images: ImageDataset, row: int) -> np.ndarray:
    return images.take(torch.tensor([row]))[0].permute(1, 2, 0).numpy()


def _from_stream(stream: Iterable[object], fit: Fit, channels: int) -> ImageDataset:
    """Images of an iterable of unknown length, decoded block by block."""
    blocks: list[np.ndarray] = []
    ids: list[str] = []
    skipped: list[tuple[str, str]] = []
    numbered = enumerate(stream)
    while block := [_as_sample(number, item) for number, item in islice(numbered, BLOCK)]:
        if not blocks:
            check_values(block, "the stream")
        pixels = np.empty((len(block), channels, *fit.size), np.uint8)
        reasons, _ = decode_all(block, pixels, fit)
        good = [row for row in range(len(block)) if row not in reasons]
        blocks.append(pixels[good])
        ids += [block[row].id for row in good]
        skipped += [(block[row].id, reason) for row, reason in reasons.items()]
    if not ids:
        raise MoceError(f"no readable image among the {len(skipped)} of the stream")
    images = _unlabeled(torch.from_numpy(np.concatenate(blocks)), ids, skipped)
    return replace(images, fit=fit)


def _as_samples(items: Sequence[object]) -> Sequence[Sample]:
    left_out = LeftOut("the list of images")
    items = [item for item in items if not (_is_path(item) and left_out.is_hidden(Path(item).name))]
    left_out.report()
    texts = [str(item) for item in items if _is_path(item)]
    if len(texts) == len(items) and not all(is_image_name(text) for text in texts):
        return open_sources([Source(text, text) for text in texts])
    return [_as_sample(number, item) for number, item in enumerate(items)]


def _is_path(item: object) -> TypeGuard[str | Path]:
    return isinstance(item, str | Path)


def _as_sample(number: int, item: object) -> Sample:
    if isinstance(item, Image.Image | np.ndarray):
        return Sample(str(number), item.copy)
    if isinstance(item, str | Path):
        return Sample(str(item), Encoded(Path(item)))
    raise MoceError(f"image {number} is a {type(item).__name__}; give paths or PIL images")


def _from_tensor(pixels: Tensor, size: tuple[int, int], channels: int) -> ImageDataset:
    wanted = (channels, *size)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted:
        raise MoceError(
            f"a tensor of images must be uint8 [n, {channels}, {size[0]}, {size[1]}], "
            f"not {pixels.dtype} {list(pixels.shape)}"
        )
    if len(pixels) == 0:
        raise MoceError("no images in the tensor")
    return _unlabeled(pixels, [str(row) for row in range(len(pixels))], [])


def _unlabeled(pixels: Tensor, ids: list[str], skipped: list[tuple[str, str]]) -> ImageDataset:
    return ImageDataset(pixels, ids, [None] * len(ids), [None] * len(ids), skipped)
