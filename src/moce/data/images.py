"""Images as one uint8 tensor: decoded and resized once, in parallel, held in memory or on disk."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moce.data.decode import Raster, open_encoded, to_pixels
from moce.data.kinds.entry import Entry, is_image_name
from moce.data.packed import Packed, PixelReader, find_packed
from moce.data.sources import Part, open_parts, open_source
from moce.data.torchvision_sets import Label
from moce.errors import MoceError
from moce.launch import launch
from moce.machine import free_memory, worker_threads
from moce.processes import is_local_main, of_local_main, wait_for_all, world

MEMORY_SHARE = 0.4  # of the free memory, beyond which pixels are kept in a file


@dataclass
class ImageSet:
    """pixels: [n, c, h, w] uint8, not to be written to: they may be a file.

    ids: n stable names; labels: n names, tuples of names or None.
    skipped: (id, reason) of images that could not be decoded. reader: of the file that the pixels
    are mapped from; `take` goes by it, because a mapping has no way to tell that it cannot be read.
    """

    pixels: Tensor
    ids: list[str]
    labels: list[Label | None]
    splits: list[str | None]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    reader: PixelReader | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Tensor | slice) -> Tensor:
        """Pixels of these rows ([b] int64 or a slice), uint8 [b, c, h, w] on the device of `pixels`."""
        if self.reader is not None:
            return self.reader.read(torch.arange(len(self))[rows].tolist())
        return self.pixels[rows if isinstance(rows, slice) else rows.to(self.pixels.device)]

    def subset(self, rows: Sequence[int]) -> ImageSet:
        """The images of these rows, in this order."""
        picked = list(rows)
        if picked == list(range(len(self))):  # no copy: the pixels may be a file
            return self
        pick = lambda values: [values[row] for row in picked]  # noqa: E731
        return replace(
            self,
            pixels=self.take(torch.tensor(picked, dtype=torch.int64)),
            reader=None,
            ids=pick(self.ids),
            labels=pick(self.labels),
            splits=pick(self.splits),
        )


def load_images(
    data: str | Sequence[Entry],
    size: tuple[int, int],
    store: Path | None = None,
    *,
    channels: int = 3,
    max_skipped: float = 1.0,
) -> ImageSet:
    """Decode all images of a DATA argument, the shorter side resized and the rest cropped to `size`.

    Broken images, and those of another number of channels, are skipped and listed. Pixels that
    would fill the memory go to the file `store`, if given. A packed file is not decoded: its images
    keep their size, at least `size`. Raises MoceError if nothing is readable, more than the share
    `max_skipped` is not, or neither memory nor disk has room.
    """
    packed = find_packed(data) if isinstance(data, str) else None
    if packed is not None:
        return _from_packed(packed, size, channels)
    name = data if isinstance(data, str) else "the list of images"
    entries = open_source(data) if isinstance(data, str) else list(data)
    if not entries:
        raise MoceError(f"no images in {name}")
    work = _Decoding(entries, (len(entries), channels, *size), max_skipped, name)
    if world() > 1 and store is not None:
        pixels, reasons = _decode_once_a_node(work, store)
    else:
        pixels = _allocate(work.shape, store)
        reasons = work.into(pixels)
    good = [entry for row, entry in enumerate(entries) if row not in reasons]
    return ImageSet(
        pixels=torch.from_numpy(pixels)[: len(good)],
        ids=[entry.id for entry in good],
        labels=[entry.label for entry in good],
        splits=[entry.split for entry in good],
        skipped=[(entries[row].id, reason) for row, reason in reasons.items()],
    )


@dataclass
class _Decoding:
    """What is to be decoded. shape: [n, c, h, w]; name: of where it is from."""

    entries: Sequence[Entry]
    shape: tuple[int, ...]
    max_skipped: float
    name: str

    def into(self, pixels: np.ndarray) -> dict[int, str]:
        """Decode into `pixels`, those that could be first; the reason of each row that could not."""
        reasons = self._decode(pixels)
        skipped = [(self.entries[row].id, reason) for row, reason in reasons.items()]
        _check_skipped(skipped, len(self.entries), self.max_skipped, self.name)
        good = (row for row in range(len(self.entries)) if row not in reasons)
        for place, row in enumerate(good):
            if place != row:  # in place: the pixels may be a file larger than memory
                pixels[place] = pixels[row]
        return reasons

    def _decode(self, pixels: np.ndarray) -> dict[int, str]:
        rows = range(len(self.entries))
        with ThreadPoolExecutor(worker_threads()) as pool:
            try:
                told = pool.map(lambda row: decode_into(pixels, row, self.entries[row]), rows)
                return {row: reason for row, reason in enumerate(told) if reason is not None}
            except BaseException:  # Ctrl-C is not to wait for all that have been asked for
                pool.shutdown(cancel_futures=True)
                raise


def _decode_once_a_node(work: _Decoding, store: Path) -> tuple[np.ndarray, dict[int, str]]:
    """The first process of each node decodes into a file, and all of the node map it.

    A file even where the memory has room: the system keeps what is read of it in memory, once for
    all processes, and none of them has to know how much the others take.
    """
    file = store.with_name(f"{store.name}.{launch().node}")

    def decode() -> dict[int, str]:
        file.unlink(missing_ok=True)  # of a run that was killed
        pixels = _in_file(work.shape, file)
        try:
            return work.into(pixels)
        except BaseException:
            file.unlink()
            raise

    reasons = of_local_main(decode)
    # Each with a view of its own: what one writes to it, which none should, the others do not see.
    pixels = np.memmap(file, np.uint8, "c", shape=work.shape)
    wait_for_all()
    if is_local_main():
        file.unlink()  # it stays as long as the processes, and leaves nothing behind
    return pixels, reasons


def _check_skipped(skipped: list[tuple[str, str]], count: int, most: float, name: str) -> None:
    """Raise MoceError, with the commonest reason, if too many images are skipped, or all."""
    if not skipped or (len(skipped) < count and len(skipped) <= most * count):
        return
    reason, times = Counter(reason for _, reason in skipped).most_common(1)[0]
    first = next(identity for identity, why in skipped if why == reason)
    cause = f"{times} x {reason} (as {first})"
    if len(skipped) == count:
        raise MoceError(f"no readable image among the {count} of {name}: {cause}")
    raise MoceError(
        f"{len(skipped)} of the {count} images of {name} cannot be read: {cause}; mend them, or "
        f"allow a larger share than {most:g} by --max-skipped"
    )


def _from_packed(packed: Packed, size: tuple[int, int], channels: int) -> ImageSet:
    """The images of a packed file, in memory if they are few and else mapped from the file.

    Several processes map it: the system keeps what is read of it in memory once for all.
    """
    found, height, width = packed.shape[1:]
    if found != channels:
        raise MoceError(
            f"{packed.path} holds images of {found} channels for an encoder of {channels}; pack them "
            f"again with --channels {channels}"
        )
    if height < size[0] or width < size[1]:
        raise MoceError(
            f"{packed.path} holds images of {height}x{width}, smaller than the {size[0]}x{size[1]} "
            f"that are needed; pack them again with --size {size[0]}x{size[1]} or more"
        )
    in_memory = world() == 1 and packed.num_bytes <= MEMORY_SHARE * free_memory()
    return ImageSet(
        packed.tensor(in_memory=in_memory),
        packed.ids,
        packed.labels,
        packed.splits,
        packed.skipped,
        None if in_memory else packed.reader(),
    )


def _allocate(shape: tuple[int, ...], store: Path | None) -> np.ndarray:
    needed = int(np.prod(shape))
    if needed <= MEMORY_SHARE * free_memory():
        return np.empty(shape, np.uint8)
    if store is None:
        gigabytes = needed / 1e9
        raise MoceError(f"the images take {gigabytes:.1f} GB, more than the memory has room for")
    pixels = _in_file(shape, store)
    store.unlink()  # the file stays as long as the process, and leaves nothing behind
    return pixels


def _in_file(shape: tuple[int, ...], store: Path) -> np.ndarray:
    """Pixels in a new file. Raises MoceError if the disk has no room."""
    needed = int(np.prod(shape))
    store.parent.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(store.parent).free:
        raise MoceError(
            f"the images take {needed / 1e9:.1f} GB, more than is free in {store.parent}"
        )
    with store.open("w+b") as file:
        _take_room(file, needed, store)
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _take_room(file: BinaryIO, needed: int, store: Path) -> None:
    """Take the room of a file at once: a disk that is full later ends the process without a word."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        store.unlink()
        raise MoceError(
            f"no room for {needed / 1e9:.1f} GB of images in {store.parent}: {error.strerror}"
        ) from None


def decode_into(pixels: np.ndarray, row: int, entry: Entry) -> str | None:
    """Decode one image into its row; the reason if it cannot be."""
    try:
        with _closing(entry.open()) as image:
            pixels[row] = to_pixels(image, (pixels.shape[2], pixels.shape[3]), pixels.shape[1])
    except Exception as error:  # decoders raise whatever they like on broken files
        return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]
    return None


@contextmanager
def _closing(image: Raster) -> Iterator[Raster]:
    """The image, its file closed afterwards."""
    try:
        yield image
    finally:
        if isinstance(image, Image.Image):
            image.close()


def as_image_set(images: object, size: tuple[int, int], channels: int = 3) -> ImageSet:
    """Images in any form as an ImageSet.

    A DATA argument, an ImageSet, a list of paths, sources, PIL images or arrays [h, w(, c)], or a
    uint8 tensor or array [n, channels, h, w] of the right size. Raises MoceError otherwise.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        return load_images(str(images), size, channels=channels)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.from_numpy(np.ascontiguousarray(images))  # flipped views have no tensor
    if isinstance(images, Tensor):
        return _from_tensor(images, size, channels)
    if isinstance(images, Sequence) and len(images) > 0:
        return load_images(_as_entries(images), size, channels=channels)
    raise MoceError("images must be a folder, a parquet file, a list of images, or a uint8 tensor")


def _as_entries(items: Sequence[object]) -> list[Entry]:
    texts = [str(item) for item in items if isinstance(item, str | Path)]
    if len(texts) == len(items) and not all(is_image_name(text) for text in texts):
        return open_parts([Part(text, text) for text in texts])
    return [_as_entry(number, item) for number, item in enumerate(items)]


def _as_entry(number: int, item: object) -> Entry:
    if isinstance(item, Image.Image | np.ndarray):
        return Entry(str(number), item.copy)
    if isinstance(item, str | Path):
        return Entry(str(item), partial(open_encoded, Path(item)))
    raise MoceError(f"image {number} is a {type(item).__name__}; give paths or PIL images")


def _from_tensor(pixels: Tensor, size: tuple[int, int], channels: int) -> ImageSet:
    wanted = (channels, *size)
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted:
        raise MoceError(
            f"a tensor of images must be uint8 [n, {channels}, {size[0]}, {size[1]}], "
            f"not {pixels.dtype} {list(pixels.shape)}"
        )
    if len(pixels) == 0:
        raise MoceError("no images in the tensor")
    ids = [str(row) for row in range(len(pixels))]
    return ImageSet(pixels, ids, labels=[None] * len(pixels), splits=[None] * len(pixels))
