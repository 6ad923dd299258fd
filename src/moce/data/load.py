"""All images of DATA: decoded in parallel, in memory or on disk."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from moce.data.dataset import ImageDataset
from moce.data.decode import to_pixels
from moce.data.readers.factory import open_source
from moce.data.readers.packed import Packed, PixelReader, find_packed
from moce.data.readers.sample import Label, Sample, error_line
from moce.data.run_ahead import run_ahead
from moce.errors import MoceError
from moce.runtime.distributed import barrier, run_on_local_rank0, world_size
from moce.runtime.launch import launch
from moce.runtime.progress import meter
from moce.runtime.system import free_memory, worker_threads

MEMORY_SHARE = 0.4  # of the free memory; more pixels are stored in a file
AHEAD_PER_THREAD = 16  # images: enough to keep threads busy, few enough for sets of any size
REPORT_EVERY = 32  # images
BAR_AFTER = 2.0  # seconds
Choose = Callable[[Sequence[Label | None], Sequence[str | None], str], list[int]]
Reasons = dict[int, str]  # by row, why an image could not be decoded


def load_images(
    data: str | Sequence[Sample],
    size: tuple[int, int],
    pixel_file: Path | None = None,
    *,
    channels: int = 3,
    max_skipped: float = 1.0,
    choose: Choose | None = None,
) -> ImageDataset:
    """Decode all images of DATA, resized by the shorter side and center-cropped to `size` (h, w).

    Broken images, and those with a wrong number of channels, are skipped and listed. Pixels that do
    not fit into memory go to `pixel_file`, a temporary file. Packed files are not decoded: their
    images keep their size, which must be at least `size`. choose: which rows to load, by labels,
    splits and the name of the source. Raises MoceError if no image is readable, more than the share
    `max_skipped` is not, or neither memory nor disk has room.
    """
    packed = find_packed(data) if isinstance(data, str) else None
    if packed is not None:
        images = _from_packed(packed, size, channels)
        rows = choose(images.labels, images.splits, str(packed.path)) if choose else None
        return images if rows is None else images.subset(rows)
    name = data if isinstance(data, str) else "the list of images"
    samples = open_source(data) if isinstance(data, str) else list(data)
    if not samples:
        raise MoceError(f"no images in {name}")
    if choose is not None:
        rows = choose([s.label for s in samples], [s.split for s in samples], name)
        samples = [samples[row] for row in rows]
    shape = (len(samples), channels, *size)

    def decode(pixels: np.ndarray) -> Reasons:
        reasons = decode_all(samples, pixels)
        _check_skipped(samples, reasons, max_skipped, name)
        return reasons

    if world_size() > 1 and pixel_file is not None:
        pixels, reasons = _decode_once_per_node(decode, shape, pixel_file)
    else:
        pixels = _allocate(shape, pixel_file)
        reasons = decode(pixels)
    images = ImageDataset(
        torch.from_numpy(pixels),
        ids=[sample.id for sample in samples],
        labels=[sample.label for sample in samples],
        splits=[sample.split for sample in samples],
        skipped=[(samples[row].id, reason) for row, reason in reasons.items()],
    )
    return images.subset([row for row in range(len(samples)) if row not in reasons])


def chosen_samples(data: str, choose: Choose) -> list[Sample]:
    """The images of DATA that `choose` picks, as in `load_images`, not yet decoded."""
    samples = open_source(data)
    rows = choose([s.label for s in samples], [s.split for s in samples], data)
    return [samples[row] for row in rows]


# --- decoding -----------------------------------------------------------------------------------------


def decode_all(samples: Sequence[Sample], pixels: np.ndarray) -> Reasons:
    """Decode each image into its row of `pixels`, [n, c, h, w] uint8, in threads."""
    reasons: Reasons = {}
    threads = worker_threads()
    jobs = (partial(decode_into, pixels, row, sample) for row, sample in enumerate(samples))
    with (
        meter("read images", len(samples), wait=BAR_AFTER) as progress,
        closing(run_ahead(jobs, threads, AHEAD_PER_THREAD * threads)) as results,
    ):
        for row, reason in enumerate(results):
            if reason is not None:
                reasons[row] = reason
            if row % REPORT_EVERY == REPORT_EVERY - 1:
                progress.advance(f"{len(reasons)} unreadable", REPORT_EVERY)
        progress.advance(count=len(samples) % REPORT_EVERY)
    return reasons


def decode_into(pixels: np.ndarray, row: int, sample: Sample) -> str | None:
    """Decode one image into its row; returns the reason if that is not possible."""
    try:
        image = sample.open()
        with closing(image) if isinstance(image, Image.Image) else nullcontext():
            pixels[row] = to_pixels(image, (pixels.shape[2], pixels.shape[3]), pixels.shape[1])
    except Exception as error:  # decoders raise errors of any type
        return error_line(error)
    return None


def _check_skipped(samples: Sequence[Sample], reasons: Reasons, most: float, name: str) -> None:
    """Raise MoceError, with the most frequent reason, if too many images are skipped, or all."""
    skipped, count = len(reasons), len(samples)
    if not skipped or (skipped < count and skipped <= most * count):
        return
    reason, times = Counter(reasons.values()).most_common(1)[0]
    first = next(samples[row].id for row, why in reasons.items() if why == reason)
    cause = f"{times} x {reason} (as {first})"
    if skipped == count:
        raise MoceError(f"no readable image among the {count} of {name}: {cause}")
    raise MoceError(
        f"{skipped} of the {count} images of {name} cannot be read: {cause}; fix them, or allow a "
        f"larger share than {most:g} with --max-skipped"
    )


# --- where pixels are stored --------------------------------------------------------------------------


def temporary_file() -> Path:
    """An unpredictable path for pixels, for use without an output folder."""
    return Path(tempfile.gettempdir()) / f".moce-{secrets.token_hex(8)}.pixels"


def _fits_in_memory(num_bytes: int) -> bool:
    return num_bytes <= MEMORY_SHARE * free_memory()


def _allocate(shape: tuple[int, ...], pixel_file: Path | None) -> np.ndarray:
    """uint8 in memory, or mapped from `pixel_file`, which is unlinked at once.

    Raises MoceError if neither has room.
    """
    if _fits_in_memory(math.prod(shape)):
        return np.empty(shape, np.uint8)
    if pixel_file is None:
        raise MoceError(
            f"the images take {math.prod(shape) / 1e9:.1f} GB, more than fits into memory; pack them "
            "once (moce pack): a packed file is read image by image"
        )
    pixels = _allocate_file(shape, pixel_file)
    pixel_file.unlink()  # its space is freed when the process ends
    return pixels


def _allocate_file(shape: tuple[int, ...], pixel_file: Path) -> np.ndarray:
    """uint8 mapped from a new file. Raises MoceError if the disk has no room."""
    needed = math.prod(shape)
    pixel_file.parent.mkdir(parents=True, exist_ok=True)
    if needed > shutil.disk_usage(pixel_file.parent).free:
        raise MoceError(
            f"the images take {needed / 1e9:.1f} GB, more than is free in {pixel_file.parent}; make "
            "room, or give --out (without it TMPDIR) on a larger disk"
        )
    with pixel_file.open("w+b") as file:
        _reserve(file, needed, pixel_file)
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _reserve(file: BinaryIO, needed: int, pixel_file: Path) -> None:
    """Reserve disk space: writing to a mapping on a full disk would kill the process silently."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        pixel_file.unlink()
        raise MoceError(
            f"no room for {needed / 1e9:.1f} GB of images in {pixel_file.parent}: {error.strerror}"
        ) from None


def _decode_once_per_node(
    decode: Callable[[np.ndarray], Reasons], shape: tuple[int, ...], pixel_file: Path
) -> tuple[np.ndarray, Reasons]:
    """Decode into a file in the first process of each node, and map it in all of them.

    A file even if memory has room: the system caches it once for all processes.
    """
    file = pixel_file.with_name(f"{pixel_file.name}.{launch().node}")

    def decode_to_file() -> Reasons:
        file.unlink(missing_ok=True)  # of a run that was killed
        pixels = _allocate_file(shape, file)
        try:
            return decode(pixels)
        except BaseException:
            file.unlink()
            raise

    reasons = run_on_local_rank0(decode_to_file)
    pixels = np.memmap(file, np.uint8, "c", shape=shape)  # copy-on-write
    barrier()
    if launch().local_rank == 0:
        file.unlink()  # its space is freed when the processes end
    return pixels, reasons


def _from_packed(packed: Packed, size: tuple[int, int], channels: int) -> ImageDataset:
    """The images of a packed file, in memory if they fit, else mapped.

    Several processes map it: the system caches it once for all of them.
    """
    found, height, width = packed.shape[1:]
    if found != channels:
        raise MoceError(
            f"{packed.path} contains images of {found} channels for an encoder of {channels}; pack "
            f"them again with --channels {channels}"
        )
    if height < size[0] or width < size[1]:
        raise MoceError(
            f"{packed.path} contains images of {height}x{width}, smaller than the "
            f"{size[0]}x{size[1]} needed; pack them again with --size {size[0]}x{size[1]} or more"
        )
    in_memory = world_size() == 1 and _fits_in_memory(packed.num_bytes)
    return ImageDataset(
        packed.tensor(in_memory=in_memory),
        packed.ids,
        packed.labels,
        packed.splits,
        packed.skipped,
        None if in_memory else PixelReader(packed.path, packed.shape),
    )
