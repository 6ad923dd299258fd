"""The order of training: which images make up each optimizer step, and fetching them in time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TypeVar

import torch
from torch import Tensor

from moce.data.augment import fitted
from moce.data.dataset import ImageDataset
from moce.data.rng import Stream, keyed_generator
from moce.runtime.device import fits_on, to_device
from moce.runtime.distributed import shard_range, world_size

T = TypeVar("T")


@dataclass
class Batch:
    """rows: [b] int64 into the image set; epochs: [b], how often each was seen; pixels: [b, c, h, w] uint8."""

    rows: Tensor
    epochs: Tensor
    pixels: Tensor

    def take(self, places: slice | Tensor) -> Batch:
        return Batch(self.rows[places], self.epochs[places], self.pixels[places])


class BatchOrder:
    """Endless passes over n images, each in its own order; step s takes the s-th slice of them all.

    So batches never shrink at the end of a pass, and any step can be made without those before it.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._epoch_order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> Tensor:
        generator = keyed_generator(self.seed, Stream.ORDER, epoch)
        return torch.randperm(self.count, generator=generator)

    def parts(
        self, first: int, end: int, size: int | None, led: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and epochs of this process's micro-batches of the steps first .. end - 1.

        led: before its own the image that comes before them in the micro-batch of all processes.
        """
        for step in range(first, end):
            rows, epochs = self(step)
            for part in shard_micro_batches(len(rows), size):
                places = torch.arange(part.start, part.stop)
                if led:
                    places = torch.cat(
                        [torch.tensor([_before(part.start, len(rows), size)]), places]
                    )
                yield rows[places], epochs[places]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows and epochs, [batch_size] int64 each, of step 0, 1, ..."""
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = positions // self.count, positions % self.count
        rows = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            rows[here] = self._epoch_order(epoch)[places[here]]
        return rows, epochs


def _before(place: int, count: int, size: int | None) -> int:
    """The place before one in the micro-batch of all processes; before the first comes the last."""
    whole = count if size is None else size * world_size()
    start = place - place % whole
    return place - 1 if place > start else min(start + whole, count) - 1


def shard_micro_batches(count: int, size: int | None) -> list[slice]:
    """Which of a batch of `count` images this process takes, a slice per forward pass.

    A pass is of `size` images in each process (None: of all the images there are): two processes
    with half the size go through a batch as one process does.
    """
    whole = count if size is None else size * world_size()
    parts = []
    for start in range(0, count, whole):
        own = shard_range(min(whole, count - start))
        parts.append(slice(start + own.start, start + own.stop))
    return parts


FETCHED_AHEAD = 2  # batches that wait, with their pixels in memory
SENT_TOGETHER = 2**26  # bytes of pixels that go to a device at a time


def cached_on_gpu(images: ImageDataset, device: torch.device) -> ImageDataset:
    """The images with their pixels on a CUDA device, if it has room: no batch has to be sent then."""
    return all_on_device(images, device) if fits_on(device, math.prod(images.shape)) else images


def all_on_device(images: ImageDataset, device: torch.device) -> ImageDataset:
    """The images, all their pixels and no others on `device`: part by part, as they may be a file's."""
    pixels = torch.empty(images.shape, dtype=torch.uint8, device=device)
    size = max(1, SENT_TOGETHER // math.prod(images.shape[1:]))
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        pixels[part] = images.take(part)
    return replace(images, stored=pixels, index=None, reader=None)


def fetch(images: ImageDataset, rows: Tensor, epochs: Tensor, device: torch.device) -> Batch:
    """The batch of these rows on `device`."""
    placed = to_device(rows, device)
    pixels = images.take(placed if images.stored.is_cuda else rows)
    return Batch(placed, to_device(epochs, device), to_device(pixels, device))


def prefetched(
    images: ImageDataset, parts: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Generator[Batch]:
    """The batch of every part (rows, epochs), fetched by a thread while the one before is used."""
    return _ahead(partial(fetch, images, rows, epochs, device) for rows, epochs in parts)


def _ahead(jobs: Iterable[Callable[[], T]]) -> Generator[T]:
    """What every job returns, in their order; a thread does them while results before are used.

    So pixels that have to come from a disk, or go to a device, are there when they are needed.
    """
    with ThreadPoolExecutor(1, "prefetch") as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for job in jobs:
                ahead.append(pool.submit(job))
                if len(ahead) > FETCHED_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_order(
    images: ImageDataset,
    batch_size: int,
    device: torch.device,
    size: tuple[int, int],
    part: slice | None = None,
) -> Generator[Tensor]:
    """All images once, or a part, in their order, fitted to `size`: [b, c, *size] uint8 at a time.

    They are read, and sent to the device, by a thread while the ones before are used.
    """
    first, end = (part.start, part.stop) if part else (0, len(images))
    starts = range(first, end, batch_size)
    slices = (slice(start, min(start + batch_size, end)) for start in starts)
    with closing(_ahead(partial(_read, images, own, device) for own in slices)) as batches:
        for pixels in batches:
            yield fitted(pixels, size)


def _read(images: ImageDataset, own: slice, device: torch.device) -> Tensor:
    return to_device(images.take(own), device)


def brought_back(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every result on the CPU. From a CUDA device each comes while the next is computed."""
    coming: deque[tuple[Tensor, torch.cuda.Event]] = deque()
    for result in results:
        if not result.is_cuda:
            yield result.cpu()
            continue
        here = result.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(result.device))
        coming.append((here, arrived))
        if len(coming) > 1:
            yield _waited_for(*coming.popleft())
    while coming:
        yield _waited_for(*coming.popleft())


def _waited_for(values: Tensor, arrived: torch.cuda.Event) -> Tensor:
    arrived.synchronize()
    return values
