"""Processes that decode, crop and augment images ahead of their use (torch's DataLoader).

A batch is made in chunks, by as many processes as there are: what an image becomes depends only on
seed, epoch and image, so batches are the same for any number of processes.
"""

from __future__ import annotations

import math
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from moce.data.dataset import ImageDataset
from moce.data.readers.sample import error_line
from moce.data.rng import Stream, keyed_uniform
from moce.data.run_ahead import run_ahead
from moce.data.views import Views
from moce.errors import MoceError, Unreachable
from moce.runtime.device import to_device
from moce.runtime.launch import launch
from moce.runtime.system import worker_threads

PREFETCHED = 2  # batches that wait, with their pixels in memory
MOST_IN_CHUNK = 32  # images
MOST_AHEAD = 2**29  # bytes of views in shared memory
REPLACEMENTS = 64  # images tried instead of an unreadable one
SHARED_MEMORY = "/dev/shm"

Places = tuple[Tensor, Tensor]  # rows and epochs, [b] int64 each


@dataclass
class Chunk:
    """Part of a batch. rows, epochs: [b] int64. pixels: [b, c, h, w] uint8.

    unreadable: (row, reason) of images that others replace. failed: why there is no chunk. last: of
    its batch.
    """

    rows: Tensor
    epochs: Tensor
    pixels: Tensor | np.ndarray
    unreadable: list[tuple[int, str]]
    last: bool
    failed: str = ""


def default_workers() -> int:
    """As many as there are cores, divided among the training processes of this machine."""
    return max(1, worker_threads() // launch().local)


def views_ahead(
    images: ImageDataset,
    order: Iterable[Places],
    views: Views,
    device: torch.device,
    workers: int | None = None,
) -> Generator[Chunk]:
    """The views of each (rows, epochs) on `device`, whole batches as one chunk, made by processes.

    workers: None for `default_workers`, 0 for a thread of this process. Raises MoceError if no image
    can be read, or a process is killed.
    """
    workers = default_workers() if workers is None else workers
    chunks = _started(_loader(images, order, views, workers))
    with closing(_joined(chunks, device)) as batches:
        ahead = run_ahead((partial(next, batches, None) for _ in repeat(None)), 1, PREFETCHED)
        with closing(ahead):
            for batch in ahead:
                if batch is None:
                    return
                yield batch


def _loader(
    images: ImageDataset, order: Iterable[Places], views: Views, workers: int
) -> DataLoader[Chunk]:
    height, width = views.size
    channels = images.originals.channels if images.originals else images.shape[1]
    size = channels * height * width * MOST_IN_CHUNK
    options: dict[str, Any] = {}
    shared = False
    if workers:
        ahead = max(2, min(PREFETCHED * 8, MOST_AHEAD // (size * workers)))
        shared = _shared_memory() > 2 * ahead * workers * size
        options = {
            "prefetch_factor": ahead,
            "worker_init_fn": _start_worker,
            # It starts at once, and needs no image source to be picklable.
            "multiprocessing_context": "fork" if sys.platform == "linux" else None,
        }
    return DataLoader(
        _Chunks(images, views, channels, shared=shared),
        batch_size=None,
        sampler=_split(order, workers),
        num_workers=workers,
        generator=torch.Generator(),  # the global one is training's
        **options,
    )


def _started(loader: DataLoader[Chunk]) -> Iterator[Chunk]:
    """Start the processes of a loader, by a thread of its own.

    One that is forked by a thread of a pool waits for itself at its end, and fails; forked by the main
    thread, torch would let one that is killed raise its error anywhere in training.
    """
    found: list[Iterator[Chunk]] = []
    failures: list[BaseException] = []

    def start() -> None:
        try:
            found.append(iter(loader))
        except BaseException as error:
            failures.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    starting.join()
    for failure in failures:
        raise failure
    return found[0]


def _shared_memory() -> int:
    """Free bytes of memory that processes share; containers may have little."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return 0


def _start_worker(worker: int) -> None:
    """The training process decides when to stop."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _split(order: Iterable[Places], workers: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Rows and epochs of the chunks of every batch, and whether a chunk is the last of its batch."""
    for rows, epochs in order:
        size = max(1, min(MOST_IN_CHUNK, math.ceil(len(rows) / max(1, workers))))
        parts = list(zip(rows.split(size), epochs.split(size), strict=True))
        for number, (some_rows, some_epochs) in enumerate(parts):
            yield some_rows, some_epochs, number == len(parts) - 1


def _joined(chunks: Iterator[Chunk], device: torch.device) -> Generator[Chunk]:
    """Whole batches on `device`."""
    parts: list[Chunk] = []
    while (chunk := _next(chunks)) is not None:
        if chunk.failed:
            raise MoceError(chunk.failed)
        parts.append(chunk)
        if chunk.last:
            yield Chunk(
                to_device(torch.cat([part.rows for part in parts]), device),
                to_device(torch.cat([part.epochs for part in parts]), device),
                to_device(torch.cat([torch.as_tensor(part.pixels) for part in parts]), device),
                [pair for part in parts for pair in part.unreadable],
                last=True,
            )
            parts = []


def _next(chunks: Iterator[Chunk]) -> Chunk | None:
    try:
        return next(chunks, None)
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise MoceError(
            "a process that reads images was killed, perhaps for lack of memory; give fewer --workers"
        ) from None


class _Chunks(Dataset[Chunk]):
    """Makes chunks, in the processes of a DataLoader."""

    def __init__(self, images: ImageDataset, views: Views, channels: int, *, shared: bool) -> None:
        self._images, self._views = images, views
        self._channels, self._shared = channels, shared

    def __getitem__(self, places: tuple[Tensor, Tensor, bool]) -> Chunk:
        rows, epochs, last = places
        try:
            rows, pixels, unreadable = self._read(rows, epochs)
        except MoceError as error:  # re-raised by the training process, as it is
            return Chunk(rows, epochs, torch.empty(0), [], last, str(error))
        return Chunk(rows, epochs, pixels if self._shared else pixels.numpy(), unreadable, last)

    def _read(self, rows: Tensor, epochs: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        """The rows that were read, their views, and (row, reason) of those that were not."""
        views, unreadable = self._views, []
        if self._images.originals is None:
            return rows, views.of_pixels(self._images.take(rows), rows, epochs), []
        numbers = views.numbers(rows, epochs)
        rows = rows.clone()
        pixels = np.empty((len(rows), self._channels, *views.size), np.uint8)
        for place, (row, epoch) in enumerate(zip(rows.tolist(), epochs.tolist(), strict=True)):
            for candidate in chain([row], self._replacements(row, epoch)):
                if candidate != row:
                    numbers[place] = views.numbers(torch.tensor([candidate]), epochs[[place]])[0]
                reason = self._read_one(pixels[place], candidate, numbers[place])
                if reason is None:
                    rows[place] = candidate
                    break
                unreadable.append((candidate, reason))
            else:
                raise MoceError(
                    f"{REPLACEMENTS + 1} images in a row cannot be read; the last: {reason}"
                )
        made = torch.from_numpy(pixels)
        return rows, made if views.policy is None else views.policy(made, rows, epochs), unreadable

    def _read_one(self, pixels: np.ndarray, row: int, numbers: Tensor) -> str | None:
        """Write the view of a row to `pixels`; returns the reason if that is not possible."""
        try:
            sample = self._images.original(row)
            pixels[:] = self._views.of_sample(sample, numbers, self._channels)
        except Unreachable:
            raise
        except Exception as error:  # decoders raise errors of any type
            return error_line(error)
        return None

    def _replacements(self, row: int, epoch: int) -> Iterator[int]:
        """Other images, drawn for this image and epoch: nobody else's batch changes."""
        where = torch.tensor([epoch]), torch.tensor([row])
        numbers = keyed_uniform(self._views.seed, Stream.REPLACEMENT, *where, REPLACEMENTS)[0]
        yield from (numbers.double() * len(self._images)).long().tolist()
