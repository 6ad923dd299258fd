"""Images as one uint8 tensor: decoded and resized once, in parallel, held in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from moce.data.decode import open_encoded
from moce.data.decoding import Decoding
from moce.data.kinds.entry import Entry, is_image_name
from moce.data.packed import Packed, PixelReader, find_packed
from moce.data.sources import Part, open_parts, open_source
from moce.data.storage import allocate, in_file, passing_file
from moce.data.torchvision_sets import Label
from moce.errors import MoceError
from moce.launch import launch
from moce.machine import free_memory
from moce.processes import is_local_main, of_local_main, wait_for_all, world

BLOCK = 1024  # images of a stream that are held as they come
MEMORY_SHARE = 0.4  # of the free memory, beyond which pixels are kept in a file


@dataclass
class ImageSet:
    """Images [n, c, h, w] uint8 with n stable names (ids) and their labels, or None, and splits.

    Look at the pixels by `take`: the set may be a part of what is stored, and that may be a file.
    stored: [m, c, h, w] uint8, not to be written to. index: [n] int64, the stored row of each
    image; None where it is its own. skipped: (id, reason) of images that could not be decoded.
    reader: of the file that `stored` is mapped from; `take` goes by it, because a mapping has no
    way to tell that it cannot be read.
    """

    stored: Tensor
    ids: list[str]
    labels: list[Label | None]
    splits: list[str | None]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    reader: PixelReader | None = None
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, c, h, w)."""
        channels, height, width = self.stored.shape[1:]
        return len(self), channels, height, width

    @property
    def pixels(self) -> Tensor:
        """All that is stored, [n, c, h, w]. Raises ValueError of a part: that would be a copy."""
        if self.index is not None:
            raise ValueError("a part of what is stored: use take, take(slice(None)) for all of it")
        return self.stored

    def take(self, rows: Tensor | slice) -> Tensor:
        """Pixels of these rows ([b] int64 or a slice), uint8 [b, c, h, w] on the device of `stored`."""
        if self.index is not None:
            rows = self.index[rows if isinstance(rows, slice) else rows.cpu()]
        if self.reader is not None:
            numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
            return self.reader.read(numbers)
        if isinstance(rows, slice):
            return self.stored[rows]
        return self.stored.index_select(
            0, rows.to(self.stored.device)
        )  # many times as fast as [rows]

    def subset(self, rows: Sequence[int]) -> ImageSet:
        """The images of these rows, in this order. Their pixels are not copied."""
        picked = list(rows)
        if picked == list(range(len(self))):
            return self
        pick = lambda values: [values[row] for row in picked]  # noqa: E731
        index = torch.tensor(picked, dtype=torch.int64)
        return replace(
            self,
            index=index if self.index is None else self.index[index],
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
    work = Decoding(entries, (len(entries), channels, *size), max_skipped, name)
    if world() > 1 and store is not None:
        pixels, reasons = _decode_once_a_node(work, store)
    else:
        fits = _fits(int(np.prod(work.shape, dtype=np.int64)))
        pixels = allocate(work.shape, store, in_memory=fits)
        reasons = work.into(pixels)
    images = ImageSet(
        torch.from_numpy(pixels),
        ids=[entry.id for entry in entries],
        labels=[entry.label for entry in entries],
        splits=[entry.split for entry in entries],
        skipped=[(entries[row].id, reason) for row, reason in reasons.items()],
    )
    return images.subset([row for row in range(len(entries)) if row not in reasons])


def _decode_once_a_node(work: Decoding, store: Path) -> tuple[np.ndarray, dict[int, str]]:
    """The first process of each node decodes into a file, and all of the node map it.

    A file even where the memory has room: the system keeps what is read of it in memory, once for
    all processes, and none of them has to know how much the others take.
    """
    file = store.with_name(f"{store.name}.{launch().node}")

    def decode() -> dict[int, str]:
        file.unlink(missing_ok=True)  # of a run that was killed
        pixels = in_file(work.shape, file)
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
    in_memory = world() == 1 and _fits(packed.num_bytes)
    return ImageSet(
        packed.tensor(in_memory=in_memory),
        packed.ids,
        packed.labels,
        packed.splits,
        packed.skipped,
        None if in_memory else packed.reader(),
    )


def _fits(num_bytes: int) -> bool:
    """Whether the memory has room for so many bytes of pixels."""
    return num_bytes <= MEMORY_SHARE * free_memory()


def as_image_set(images: object, size: tuple[int, int], channels: int = 3) -> ImageSet:
    """Images in any form as an ImageSet.

    A DATA argument, an ImageSet, a list of paths, sources, PIL images or arrays [h, w(, c)], any
    other iterable of paths, PIL images or arrays, or a uint8 tensor or array [n, channels, h, w] of
    the right size. Raises MoceError otherwise.
    """
    if isinstance(images, ImageSet):
        return images
    if isinstance(images, str | Path):
        return load_images(str(images), size, passing_file(), channels=channels)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = torch.from_numpy(np.ascontiguousarray(images))  # flipped views have no tensor
    if isinstance(images, Tensor):
        return _from_tensor(images, size, channels)
    if isinstance(images, Sequence) and len(images) > 0:
        return load_images(_as_entries(images), size, passing_file(), channels=channels)
    if isinstance(images, Iterable) and not isinstance(images, Sized):
        return _from_stream(images, size, channels)
    raise MoceError("images must be a folder, a parquet file, a list of images, or a uint8 tensor")


def _from_stream(stream: Iterable[object], size: tuple[int, int], channels: int) -> ImageSet:
    """Images that come one by one, nobody knows how many: decoded block by block as they come."""
    blocks: list[np.ndarray] = []
    ids: list[str] = []
    skipped: list[tuple[str, str]] = []
    numbered = enumerate(stream)
    while block := [_as_entry(number, item) for number, item in islice(numbered, BLOCK)]:
        pixels = np.empty((len(block), channels, *size), np.uint8)
        reasons = Decoding(block, pixels.shape, 1.0, "the stream").decode(pixels)
        good = [row for row in range(len(block)) if row not in reasons]
        blocks.append(pixels[good])
        ids += [block[row].id for row in good]
        skipped += [(block[row].id, reason) for row, reason in reasons.items()]
    if not ids:
        raise MoceError(f"no readable image among the {len(skipped)} of the stream")
    pixels, count = np.concatenate(blocks), len(ids)
    return ImageSet(torch.from_numpy(pixels), ids, [None] * count, [None] * count, skipped)


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
