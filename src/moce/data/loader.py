"""Batch order, this rank's share, prefetching."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from moce.data.augment import fitted
from moce.data.dataset import ImageDataset
from moce.data.load import decode_rows
from moce.data.rng import Stream, keyed_generator
from moce.data.run_ahead import run_ahead
from moce.data.views import Views
from moce.data.workers import PREFETCHED, views_ahead
from moce.errors import MoceError
from moce.models.fit import Fit
from moce.runtime.device import fits_on, to_device
from moce.runtime.distributed import all_reduce, shard_range, world_size

SHUFFLED = 2**14  # images that far files are mixed among
REPEAT = 2**32  # between the numbers of an epoch for an image that it has several times
COPY_BYTES = 2**26  # bytes of pixels copied to a device at a time


@dataclass(frozen=True)
class Loading:
    """How batches are read.

    cache_on_gpu: keep pixels on a GPU with room for them. workers: processes that read and crop
    images (None: one per core; 0: a thread). on_unreadable: is told (row, reason) of images that
    cannot be read.
    """

    cache_on_gpu: bool = False
    workers: int | None = None
    on_unreadable: Callable[[list[tuple[int, str]]], None] | None = None


@dataclass
class Batch:
    """rows: [b] int64 into the data set. epochs: [b], of each image. pixels: [b, c, h, w] uint8.

    are_views: the pixels are views of the images already, not the images.
    """

    rows: Tensor
    epochs: Tensor
    pixels: Tensor
    are_views: bool = False

    def take(self, places: slice | Tensor) -> Batch:
        return Batch(self.rows[places], self.epochs[places], self.pixels[places], self.are_views)

    def views(self, views: Views) -> Tensor:
        """[b, c, *views.size] 0..255, uint8 if made by processes, else float32."""
        if self.are_views:
            return self.pixels
        return views.of_pixels(self.pixels, self.rows, self.epochs)


class BatchOrder:
    """Endless epochs over n images, each in its own order; step s takes the s-th slice of them.

    Batches can span epochs, so all have the same size, and each step is computed without those
    before it. Images of far files come file by file, the files in random order, and mixed with those
    up to SHUFFLED places away: as from a shuffle buffer, but known without reading. With classes, an
    epoch has as many images of each class as of any other: some of a frequent one, others repeatedly.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        far_files: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> None:
        """far_files: [count] int64, the file of each image; None if they can be read at random.

        classes: [count] int64, to draw evenly; None: each image once an epoch.
        """
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._far_files = far_files
        self._members = None if classes is None else _members(classes)
        self._epoch_order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> Tensor:
        generator = keyed_generator(self.seed, Stream.ORDER, epoch)
        if self._members is not None:
            return _draw_evenly(self._members, self.count, generator)
        if self._far_files is None:
            return torch.randperm(self.count, generator=generator)
        turn = torch.randperm(int(self._far_files.max()) + 1, generator=generator)
        by_file = turn[self._far_files].argsort(stable=True)
        ahead = torch.rand(self.count, generator=generator, dtype=torch.float64) * SHUFFLED
        return by_file[(torch.arange(self.count) + ahead).argsort()]

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows and epochs, [batch_size] int64 each, of step 0, 1, ...

        A repeated image has another number of the epoch each time, so other crops and masks.
        """
        positions = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = positions // self.count, positions % self.count
        rows = torch.empty_like(places)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            rows[here] = self._epoch_order(epoch)[places[here]]
        if self._members is None:
            return rows, epochs
        return rows % self.count, epochs + rows // self.count * REPEAT

    def micro_batches(
        self, first: int, end: int, size: int | None, with_previous: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and epochs of this process's micro-batches of the steps first .. end - 1.

        with_previous: prepend the image before the first one, for mixup with the previous image.
        """
        for step in range(first, end):
            rows, epochs = self(step)
            for micro_batch in shard_micro_batches(len(rows), size):
                places = torch.arange(micro_batch.start, micro_batch.stop)
                if with_previous:
                    before = _previous(micro_batch.start, len(rows), size)
                    places = torch.cat([torch.tensor([before]), places])
                yield rows[places], epochs[places]


def _members(classes: Tensor) -> list[Tensor]:
    """The rows of each class that occurs."""
    return [(classes == number).nonzero()[:, 0] for number in classes.unique()]


def _draw_evenly(members: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, as many of each class, in random order; a repeated one is larger by `count` each time."""
    share, rest = divmod(count, len(members))
    lucky = set(torch.randperm(len(members), generator=generator)[:rest].tolist())
    drawn = []
    for number, rows in enumerate(members):
        needed = share + (number in lucky)
        for time in range(-(-needed // len(rows))):
            order = torch.randperm(len(rows), generator=generator)[: needed - time * len(rows)]
            drawn.append(rows[order] + time * count)
    every = torch.cat(drawn)
    return every[torch.randperm(count, generator=generator)]


def _previous(place: int, count: int, size: int | None) -> int:
    """The place before one in the micro-batch of all processes; before the first is the last."""
    whole = count if size is None else size * world_size()
    start = place - place % whole
    return place - 1 if place > start else min(start + whole, count) - 1


def shard_micro_batches(count: int, size: int | None) -> list[slice]:
    """This process's slices of a batch of `count` images, one per forward pass.

    size: images per forward pass and process (None: all in one pass). Two processes with half the
    size go through a batch as one process does.
    """
    whole = count if size is None else size * world_size()
    micro_batches = []
    for start in range(0, count, whole):
        own = shard_range(min(whole, count - start))
        micro_batches.append(slice(start + own.start, start + own.stop))
    return micro_batches


def check_batch_size(size: int, micro: int | None) -> None:
    """Raise MoceError if a process would get no image in some forward pass."""
    own = shard_micro_batches(size, micro)
    shortest = torch.tensor(min(part.stop - part.start for part in own))
    if int(all_reduce((shortest == 0).long())):
        of = f", {micro} a pass" if micro else ""
        raise MoceError(
            f"a batch of {size} images{of} leaves some of {world_size()} processes without an image in a "
            "forward pass; start fewer processes, or give another batch_size or micro_batch_size"
        )


def cached_on_gpu(images: ImageDataset, device: torch.device) -> ImageDataset:
    """The images with their pixels on a CUDA device if it has room, else unchanged."""
    if images.stored is None:
        return images
    return all_on_device(images, device) if fits_on(device, math.prod(images.shape)) else images


def all_on_device(images: ImageDataset, device: torch.device) -> ImageDataset:
    """The images with their pixels on `device`, copied in pieces, since they may be in a file."""
    pixels = torch.empty(images.shape, dtype=torch.uint8, device=device)
    size = max(1, COPY_BYTES // math.prod(images.shape[1:]))
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        pixels[rows] = images.take(rows)
    return replace(images, stored=pixels, index=None, reader=None)


def fetch(images: ImageDataset, rows: Tensor, epochs: Tensor, device: torch.device) -> Batch:
    """The batch of these rows on `device`."""
    placed = to_device(rows, device)
    on_gpu = images.stored is not None and images.stored.is_cuda
    pixels = images.take(placed if on_gpu else rows)
    return Batch(placed, to_device(epochs, device), to_device(pixels, device))


def prefetched(
    images: ImageDataset, order: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Generator[Batch]:
    """The batch of each (rows, epochs), fetched by a thread while the previous ones are used."""
    jobs = (partial(fetch, images, rows, epochs, device) for rows, epochs in order)
    return run_ahead(jobs, 1, PREFETCHED)


def view_batches(
    images: ImageDataset,
    order: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    views: Views | None,
    loading: Loading = Loading(),
) -> Generator[Batch]:
    """The batch of each (rows, epochs), to be asked for its views; made ahead of its use.

    Tiny images of one size are fetched, to be cropped on `device`; so are all without views. Others
    are cropped, and a policy is applied, by processes. Instead of an image that is found to be
    unreadable comes another, with its own row.
    """
    if views is None or (images.originals is None and views.policy is None):
        images = cached_on_gpu(images, device) if loading.cache_on_gpu else images
        yield from prefetched(images, order, device)
        return
    with closing(views_ahead(images, order, views, device, loading.workers)) as chunks:
        for chunk in chunks:
            if loading.on_unreadable is not None and chunk.unreadable:
                loading.on_unreadable(chunk.unreadable)
            yield Batch(chunk.rows, chunk.epochs, torch.as_tensor(chunk.pixels), are_views=True)


def in_order(
    images: ImageDataset,
    batch_size: int,
    device: torch.device,
    fit: tuple[int, int] | Fit,
    rows: slice | None = None,
    share: slice = slice(None),
) -> Generator[Tensor]:
    """All images, or a slice, once and in order: batches [b, c, h, w] uint8 on `device`.

    share: which of the batches. A thread reads them while the previous ones are used.
    """
    first, end = (rows.start, rows.stop) if rows else (0, len(images))
    starts = range(first, end, batch_size)[share]
    slices = (slice(start, min(start + batch_size, end)) for start in starts)
    fit = fit if isinstance(fit, Fit) else Fit(fit)
    jobs = (partial(_read, images, where, fit, device) for where in slices)
    with closing(run_ahead(jobs, 1, PREFETCHED)) as batches:
        for pixels in batches:
            # What is cropped once is not cropped twice.
            yield fitted(pixels, fit if images.fit is None else Fit(fit.size))


def _read(images: ImageDataset, rows: slice, fit: Fit, device: torch.device) -> Tensor:
    """Stored pixels, or what fits from the originals if what is stored does not."""
    fits = images.stored is not None and images.fit in (None, fit)
    if fits or images.originals is None:
        return to_device(images.take(rows), device)
    return to_device(decode_rows(images, range(len(images))[rows], fit), device)


def to_cpu(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every result on the CPU; copies from a CUDA device while the next result is computed."""
    pending: deque[tuple[Tensor, torch.cuda.Event]] = deque()
    for result in results:
        if not result.is_cuda:
            yield result.cpu()
            continue
        copy = result.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(result.device))
        pending.append((copy, copied))
        if len(pending) > 1:
            yield _synchronized(*pending.popleft())
    while pending:
        yield _synchronized(*pending.popleft())


def _synchronized(values: Tensor, copied: torch.cuda.Event) -> Tensor:
    copied.synchronize()
    return values
