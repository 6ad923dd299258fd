"""All images of a set to pixels: decoded in parallel, those that cannot be skipped and counted."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from moce.data.decode import Raster, to_pixels
from moce.data.kinds.entry import Entry
from moce.errors import MoceError
from moce.machine import worker_threads
from moce.progress import Meter, meter

ASKED_AHEAD = 16  # images a thread: enough to keep it busy, few enough to hold for any number
TOLD_EVERY = 32  # images
BAR_AFTER = 2.0  # seconds

T = TypeVar("T")


@dataclass
class Decoding:
    """What is to be decoded. shape: [n, c, h, w]; name: of where it is from."""

    entries: Sequence[Entry]
    shape: tuple[int, ...]
    max_skipped: float
    name: str

    def into(self, pixels: np.ndarray) -> dict[int, str]:
        """Decode each image into its row of `pixels`; the reason of each row that could not be.

        Raises MoceError if these are more than the share `max_skipped`, or all.
        """
        reasons = self.decode(pixels)
        skipped = [(self.entries[row].id, reason) for row, reason in reasons.items()]
        _check_skipped(skipped, len(self.entries), self.max_skipped, self.name)
        return reasons

    def decode(self, pixels: np.ndarray) -> dict[int, str]:
        """As `into`, however many cannot be decoded."""
        with meter("read images", len(self.entries), wait=BAR_AFTER) as progress:
            return self._decode(pixels, progress)

    def _decode(self, pixels: np.ndarray, progress: Meter) -> dict[int, str]:
        reasons: dict[int, str] = {}
        threads = worker_threads()
        with ThreadPoolExecutor(threads) as pool:
            try:
                jobs = (
                    pool.submit(decode_into, pixels, row, entry)
                    for row, entry in enumerate(self.entries)
                )
                for row, reason in enumerate(_in_turn(jobs, ASKED_AHEAD * threads)):
                    if reason is not None:
                        reasons[row] = reason
                    if row % TOLD_EVERY == TOLD_EVERY - 1:
                        progress.advance(f"{len(reasons)} unreadable", TOLD_EVERY)
            except BaseException:  # Ctrl-C is not to wait for all that have been asked for
                pool.shutdown(cancel_futures=True)
                raise
        progress.advance(count=len(self.entries) % TOLD_EVERY)
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
