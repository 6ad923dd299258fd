"""All images of a set to pixels: decoded in parallel, those that cannot be skipped and counted."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image

from moce.data.dataset import ImageDataset
from moce.data.decode import Raster, to_pixels
from moce.data.readers.factory import open_source
from moce.data.readers.packed import Packed, find_packed
from moce.data.readers.sample import Sample
from moce.errors import MoceError
from moce.runtime.distributed import barrier, is_local_rank0, run_on_local_rank0, world_size
from moce.runtime.launch import launch
from moce.runtime.progress import Meter, meter
from moce.runtime.system import free_memory, worker_threads

MEMORY_SHARE = 0.4  # of the free memory, beyond which pixels are kept in a file

ASKED_AHEAD = 16  # images a thread: enough to keep it busy, few enough to hold for any number
TOLD_EVERY = 32  # images
BAR_AFTER = 2.0  # seconds

T = TypeVar("T")


@dataclass
class Decoding:
    """What is to be decoded. shape: [n, c, h, w]; name: of where it is from."""

    samples: Sequence[Sample]
    shape: tuple[int, ...]
    max_skipped: float
    name: str

    def into(self, pixels: np.ndarray) -> dict[int, str]:
        """Decode each image into its row of `pixels`; the reason of each row that could not be.

        Raises MoceError if these are more than the share `max_skipped`, or all.
        """
        reasons = self.decode(pixels)
        skipped = [(self.samples[row].id, reason) for row, reason in reasons.items()]
        _check_skipped(skipped, len(self.samples), self.max_skipped, self.name)
        return reasons

    def decode(self, pixels: np.ndarray) -> dict[int, str]:
        """As `into`, however many cannot be decoded."""
        with meter("read images", len(self.samples), wait=BAR_AFTER) as progress:
            return self._decode(pixels, progress)

    def _decode(self, pixels: np.ndarray, progress: Meter) -> dict[int, str]:
        reasons: dict[int, str] = {}
        threads = worker_threads()
        with ThreadPoolExecutor(threads) as pool:
            try:
                jobs = (
                    pool.submit(decode_into, pixels, row, sample)
                    for row, sample in enumerate(self.samples)
                )
                for row, reason in enumerate(_in_turn(jobs, ASKED_AHEAD * threads)):
                    if reason is not None:
                        reasons[row] = reason
                    if row % TOLD_EVERY == TOLD_EVERY - 1:
                        progress.advance(f"{len(reasons)} unreadable", TOLD_EVERY)
            except BaseException:  # Ctrl-C is not to wait for all that have been asked for
                pool.shutdown(cancel_futures=True)
                raise
        progress.advance(count=len(self.samples) % TOLD_EVERY)
        return reasons


def _in_turn(jobs: Iterable[Future[T]], most: int) -> Iterator[T]:
    """The results in their order, of which no more than `most` are asked for ahead."""
    ahead: deque[Future[T]] = deque()
    for job in jobs:
        ahead.append(job)
        if len(ahead) > most:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


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


def decode_into(pixels: np.ndarray, row: int, sample: Sample) -> str | None:
    """Decode one image into its row; the reason if it cannot be."""
    try:
        with _closing(sample.open()) as image:
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


def allocate(shape: tuple[int, ...], store: Path | None, *, in_memory: bool) -> np.ndarray:
    """uint8 of this shape, in memory or in the file `store`, whose name is taken away at once.

    Raises MoceError if there is no room, or no file to use instead of memory.
    """
    if in_memory:
        return np.empty(shape, np.uint8)
    if store is None:
        raise MoceError(
            f"the images take {_bytes_of(shape) / 1e9:.1f} GB, more than the memory has room for; pack them "
            "once (moce pack): a packed file is read image by image"
        )
    pixels = in_file(shape, store)
    store.unlink()  # the file stays as long as the process, and leaves nothing behind
    return pixels


def in_file(shape: tuple[int, ...], store: Path) -> np.ndarray:
    """Pixels in a new file. Raises MoceError if the disk has no room."""
    needed = _bytes_of(shape)
    store.parent.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(store.parent).free:
        raise MoceError(
            f"the images take {needed / 1e9:.1f} GB, more than is free in {store.parent}; make "
            "room, or give --out (without it TMPDIR) on a larger disk"
        )
    with store.open("w+b") as file:
        _take_room(file, needed, store)
        return np.memmap(file, np.uint8, "w+", shape=shape)


def temporary_file() -> Path:
    """A file for pixels where there is no output folder to put it beside; no name to be guessed."""
    return Path(tempfile.gettempdir()) / f".moce-{secrets.token_hex(8)}.pixels"


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


def _bytes_of(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def load_images(
    data: str | Sequence[Sample],
    size: tuple[int, int],
    store: Path | None = None,
    *,
    channels: int = 3,
    max_skipped: float = 1.0,
) -> ImageDataset:
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
    samples = open_source(data) if isinstance(data, str) else list(data)
    if not samples:
        raise MoceError(f"no images in {name}")
    work = Decoding(samples, (len(samples), channels, *size), max_skipped, name)
    if world_size() > 1 and store is not None:
        pixels, reasons = _decode_once_a_node(work, store)
    else:
        fits = _fits(int(np.prod(work.shape, dtype=np.int64)))
        pixels = allocate(work.shape, store, in_memory=fits)
        reasons = work.into(pixels)
    images = ImageDataset(
        torch.from_numpy(pixels),
        ids=[sample.id for sample in samples],
        labels=[sample.label for sample in samples],
        splits=[sample.split for sample in samples],
        skipped=[(samples[row].id, reason) for row, reason in reasons.items()],
    )
    return images.subset([row for row in range(len(samples)) if row not in reasons])


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

    reasons = run_on_local_rank0(decode)
    # Each with a view of its own: what one writes to it, which none should, the others do not see.
    pixels = np.memmap(file, np.uint8, "c", shape=work.shape)
    barrier()
    if is_local_rank0():
        file.unlink()  # it stays as long as the processes, and leaves nothing behind
    return pixels, reasons


def _from_packed(packed: Packed, size: tuple[int, int], channels: int) -> ImageDataset:
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
    in_memory = world_size() == 1 and _fits(packed.num_bytes)
    return ImageDataset(
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
