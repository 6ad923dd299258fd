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
from torch import Tensor

from moce.data.dataset import ImageDataset, Originals
from moce.data.decode import to_pixels, upright_size
from moce.data.readers.factory import check_packs, open_source
from moce.data.readers.packed import Packed, PixelReader, check_large_enough, find_packed
from moce.data.readers.sample import Label, Sample, error_line
from moce.data.readers.table import ids_of, labels_and_splits, select
from moce.data.run_ahead import run_ahead
from moce.data.value_range import check_values
from moce.errors import MoceError, Unreachable
from moce.models.fit import Fit
from moce.runtime.distributed import all_gather, barrier, run_on_local_rank0, world_size
from moce.runtime.launch import launch
from moce.runtime.progress import meter
from moce.runtime.system import free_memory, worker_threads

MEMORY_SHARE = 0.4  # of the free memory; more pixels are stored in a file
AHEAD_PER_THREAD = 16  # images: enough to keep threads busy, few enough for sets of any size
TINY, MOST_TINY_BYTES = 64, 2**32  # pixels of a side; bytes of a set that is decoded at once
LOOKED_AT = 16  # images, to find out the size of all
REPORT_EVERY = 32  # images
LISTED = "the list of images"
BAR_AFTER = 2.0  # seconds
Choose = Callable[[Sequence[Label | None], Sequence[str | None], str], Sequence[int] | np.ndarray]
Reasons = dict[int, str]  # by row, why an image could not be decoded


def load_images(
    data: str | Sequence[Sample],
    fit: tuple[int, int] | Fit,
    pixel_file: Path | None = None,
    *,
    channels: int = 3,
    max_skipped: float = 1.0,
    keep_tiny: bool = False,
    required: bool = True,
    choose: Choose | None = None,
    name: str = LISTED,
) -> ImageDataset:
    """Decode all images of DATA, resized and cropped as `fit` says; a size (h, w): see `to_pixels`.

    Broken images, and those with a wrong number of channels, are skipped and listed. Pixels that do
    not fit into memory go to `pixel_file`, a temporary file. Packed files are not decoded: their
    images keep their size, which must be at least that of `fit`. keep_tiny: images for training, too: if
    all are tiny and of one size, they keep it. choose: which rows to load, by labels, splits and the
    name of the source. name: of a list, for messages. Raises MoceError if, unless `required` is False,
    no image is readable or more than the share `max_skipped` is not, or if neither memory nor disk has
    room.
    """
    fit = fit if isinstance(fit, Fit) else Fit(fit)
    packed = find_packed(data) if isinstance(data, str) else None
    if packed is not None:
        return _from_packed(packed, fit.size, channels, choose)
    name, samples = _opened(data, choose, fit.size, name)
    originals = Originals(samples, channels, max_skipped, required)
    own = _tiny_size(originals, None) if keep_tiny else None
    if own == fit.size and not fit.is_plain:
        own = None
    return _decoded(originals, Fit(own) if own else fit, pixel_file, name)


def open_images(
    data: str | Sequence[Sample],
    fit: tuple[int, int] | Fit,
    pixel_file: Path | None = None,
    *,
    channels: int = 3,
    max_skipped: float = 1.0,
    choose: Choose | None = None,
    name: str = LISTED,
) -> ImageDataset:
    """Images of DATA to train on: only listed, and decoded as they are used. name: see `load_images`.

    Images that are all tiny and of one size are decoded at once, as by `load_images`, which raises
    MoceError for the same reasons. Of others only a few are looked at: raises MoceError if there are
    none, or all of these are unreadable.
    """
    fit = fit if isinstance(fit, Fit) else Fit(fit)
    packed = find_packed(data) if isinstance(data, str) else None
    if packed is not None:
        return _from_packed(packed, fit.size, channels, choose)
    name, samples = _opened(data, choose, fit.size, name)
    originals = Originals(samples, channels, max_skipped)
    own = _tiny_size(originals, name)
    if own is not None:
        images = _decoded(originals, Fit(own), pixel_file, name)
        if images.originals is None:
            return images
    return _dataset(originals, None)


def _opened(
    data: str | Sequence[Sample], choose: Choose | None, size: tuple[int, int], name: str
) -> tuple[str, Sequence[Sample]]:
    """A name of the images for messages, and the images. Raises MoceError if there are none."""
    if isinstance(data, str):
        check_packs(data, size)
        name, data = data, open_source(data)
    samples = data
    if not samples:
        raise MoceError(f"no images in {name}")
    if choose is not None:
        samples = select(samples, choose(*labels_and_splits(samples), name))
    check_values(samples, name)
    return name, samples


def _dataset(originals: Originals, stored: Tensor | None) -> ImageDataset:
    samples = originals.samples
    labels, splits = labels_and_splits(samples)
    return ImageDataset(stored, ids_of(samples), labels, splits, originals=originals)


def _tiny_size(originals: Originals, name: str | None) -> tuple[int, int] | None:
    """The size (h, w) of the images, if those looked at are tiny, of one size, and few enough.

    Raises MoceError if all of these are unreadable, unless `name` is None.
    """
    samples, count = originals.samples, len(originals.samples)
    rows = sorted({round(i * (count - 1) / (LOOKED_AT - 1)) for i in range(LOOKED_AT)})
    looked_at = [samples[row] for row in rows]
    sizes: set[tuple[int, int]] = set()
    reasons: Reasons = {}
    for place, sample in enumerate(looked_at):
        try:
            sizes.add(_size(sample, decode=count <= LOOKED_AT, channels=originals.channels))
        except Unreachable:
            raise
        except Exception as error:  # decoders raise errors of any type
            reasons[place] = error_line(error)
    if name is not None and (len(reasons) == len(rows) or count <= LOOKED_AT):
        check_reasons(looked_at, reasons, originals.max_skipped, name)
    if len(sizes) != 1:
        return None
    (size,) = sizes
    num_bytes = count * originals.channels * math.prod(size)
    return size if max(size) <= TINY and num_bytes <= MOST_TINY_BYTES else None


def _size(sample: Sample, *, decode: bool, channels: int) -> tuple[int, int]:
    """The size (h, w) of an image by its header; decode: read the whole, to see whether it can be."""
    image = sample.open()
    with closing(image) if isinstance(image, Image.Image) else nullcontext():
        size = upright_size(image)
        if decode:
            to_pixels(image, (1, 1), channels)
    return size


def chosen_samples(data: str, choose: Choose) -> Sequence[Sample]:
    """The images of DATA that `choose` picks, as in `load_images`, not yet decoded."""
    samples = open_source(data)
    return select(samples, choose(*labels_and_splits(samples), data))


# --- decoding -----------------------------------------------------------------------------------------


def _decoded(originals: Originals, fit: Fit, pixel_file: Path | None, name: str) -> ImageDataset:
    """The images decoded to one size; without their originals if these are the same."""
    samples = originals.samples
    shape = (len(samples), originals.channels, *fit.size)

    if world_size() > 1 and pixel_file is not None:
        pixels, (reasons, resized) = _decode_once_per_node(samples, shape, fit, pixel_file)
    else:
        pixels = _allocate(shape, pixel_file)
        reasons, resized = decode_all(samples, pixels, fit)
    if originals.required:
        check_reasons(samples, reasons, originals.max_skipped, name)
    images = _dataset(originals, torch.from_numpy(pixels))
    images.skipped = [(samples[row].id, reason) for row, reason in reasons.items()]
    if not resized and fit.is_plain:
        images.originals = None
    else:
        images.fit = fit
    return images.subset(np.setdiff1d(np.arange(len(samples)), [*reasons]))


def decode_all(
    samples: Sequence[Sample], pixels: np.ndarray, fit: Fit, rows: slice = slice(None)
) -> tuple[Reasons, bool]:
    """Decode each image, or those of some rows, into its row of `pixels`, [n, c, *fit.size] uint8.

    In threads. Returns the reasons of unreadable images, and whether any image had another size.
    """
    reasons: Reasons = {}
    resized = False
    threads = max(1, worker_threads() // launch().local)
    numbers = range(len(samples))[rows]
    those = samples if rows == slice(None) else map(samples.__getitem__, numbers)
    jobs = (partial(_decode_one, pixels, *job, fit) for job in zip(numbers, those, strict=True))
    with (
        meter("read images", len(numbers), wait=BAR_AFTER) as progress,
        closing(run_ahead(jobs, threads, AHEAD_PER_THREAD * threads)) as results,
    ):
        for row, (reason, size) in zip(numbers, results, strict=True):
            if reason is not None:
                reasons[row] = reason
            elif size != pixels.shape[2:]:
                resized = True
            if row % REPORT_EVERY == REPORT_EVERY - 1:
                progress.advance(f"{len(reasons)} unreadable", REPORT_EVERY)
        progress.advance(count=len(numbers) % REPORT_EVERY)
    return reasons, resized


def decode_rows(images: ImageDataset, rows: Sequence[int], fit: Fit) -> Tensor:
    """Images decoded once more, [n, c, *fit.size] uint8. Raises MoceError if one cannot be read."""
    samples = [images.original(row) for row in rows]
    pixels, reasons = try_decode(samples, images.originals.channels if images.originals else 3, fit)
    for row, reason in reasons.items():
        raise MoceError(f"cannot read {samples[row].id}: {reason}")
    return pixels


def try_decode(samples: Sequence[Sample], channels: int, fit: Fit) -> tuple[Tensor, Reasons]:
    """A few images, [n, channels, *fit.size] uint8, and why some of them cannot be read."""
    pixels = np.empty((len(samples), channels, *fit.size), np.uint8)
    jobs = (partial(_decode_one, pixels, row, sample, fit) for row, sample in enumerate(samples))
    found = enumerate(run_ahead(jobs, worker_threads(), len(samples)))
    return torch.from_numpy(pixels), {row: why for row, (why, _) in found if why is not None}


def _decode_one(
    pixels: np.ndarray, row: int, sample: Sample, fit: Fit
) -> tuple[str | None, tuple[int, int] | None]:
    """Decode one image into its row: the reason if that is not possible, and its own size (h, w)."""
    try:
        image = sample.open()
        with closing(image) if isinstance(image, Image.Image) else nullcontext():
            size = upright_size(image)
            pixels[row] = to_pixels(image, fit, pixels.shape[1])
    except Unreachable:
        raise
    except Exception as error:  # decoders raise errors of any type
        return error_line(error), None
    return None, size


def decode_into(pixels: np.ndarray, row: int, sample: Sample) -> str | None:
    """Decode one image into its row; returns the reason if that is not possible."""
    return _decode_one(pixels, row, sample, Fit((pixels.shape[2], pixels.shape[3])))[0]


def check_reasons(samples: Sequence[Sample], reasons: Reasons, most: float, name: str) -> None:
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
    samples: Sequence[Sample], shape: tuple[int, ...], fit: Fit, pixel_file: Path
) -> tuple[np.ndarray, tuple[Reasons, bool]]:
    """Decode into a file of each node, of which each process there makes its share, and map it in all.

    A file even if memory has room: the system caches it once for all processes.
    """

    def make_file() -> Path:
        file = pixel_file.with_name(f"{pixel_file.name}.{launch().node}")
        file.unlink(missing_ok=True)  # of a run that was killed
        _allocate_file(shape, file)
        return file

    file = run_on_local_rank0(make_file)
    here, local, count = launch().local_rank, launch().local, len(samples)
    own = slice(count * here // local, count * (here + 1) // local)
    try:
        pixels = np.memmap(file, np.uint8, "r+", shape=shape)
        gathered = all_gather((launch().node, *decode_all(samples, pixels, fit, own)))
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    pixels = np.memmap(file, np.uint8, "c", shape=shape)  # copy-on-write
    barrier()
    if here == 0:
        file.unlink()  # its space is freed when the processes end
    of_node = [(found, resized) for node, found, resized in gathered if node == launch().node]
    reasons = {row: why for found, _ in of_node for row, why in found.items()}
    return pixels, (reasons, any(resized for _, resized in of_node))


def _from_packed(
    packed: Packed, size: tuple[int, int], channels: int, choose: Choose | None
) -> ImageDataset:
    """The images of a packed file, in memory if they fit, else mapped.

    Several processes map it: the system caches it once for all of them.
    """
    found = packed.shape[1]
    if found != channels:
        raise MoceError(
            f"{packed.path} contains images of {found} channels for an encoder of {channels}; pack "
            f"them again with --channels {channels}"
        )
    check_large_enough(packed, size)
    in_memory = world_size() == 1 and _fits_in_memory(packed.num_bytes)
    images = ImageDataset(
        packed.tensor(in_memory=in_memory),
        packed.ids,
        packed.labels,
        packed.splits,
        packed.skipped,
        None if in_memory else PixelReader(packed.path, packed.shape),
    )
    if choose is None:
        return images
    return images.subset(choose(images.labels, images.splits, str(packed.path)))
