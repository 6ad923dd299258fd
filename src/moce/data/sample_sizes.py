"""How many images DATA has, and how large they are, before a size is decided on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from statistics import median

from PIL import Image

from moce.data.divide import unlearned_splits
from moce.data.readers.factory import open_source
from moce.data.readers.packed import find_packed
from moce.data.readers.sample import Label, Sample
from moce.errors import MoceError, Unreachable

MOST_OPENED = 32  # images, spread over the source


def count_and_side(data: str) -> tuple[int, int]:
    """The number of images that a model may learn from, and the median shorter side, in pixels, of some.

    Where it may learn from none, which is refused when they are read: of all images. Raises MoceError
    if there are none, or none of these can be opened.
    """
    packed = find_packed(data)
    if packed is not None:
        count = len(_learning(packed.labels, packed.splits))
        return count, min(packed.shape[2:])
    found = open_source(data)
    rows = _learning([s.label for s in found], [s.split for s in found])
    samples = [found[row] for row in rows]
    every = max(1, len(samples) // MOST_OPENED)
    sides = [side for sample in samples[::every] if (side := _side(sample)) is not None]
    if not sides:
        raise MoceError(f"none of {len(samples[::every])} images of {data} can be opened")
    return len(samples), round(median(sides))


def _learning(labels: Sequence[Label | None], splits: Sequence[str | None]) -> Sequence[int]:
    kept_apart = unlearned_splits(labels, splits)
    rows = [row for row, split in enumerate(splits) if split not in kept_apart]
    return rows or range(len(splits))


def _side(sample: Sample) -> int | None:
    """The shorter side; None if the image cannot be opened, which is reported where all are read."""
    try:
        image = sample.open()
        with closing(image) if isinstance(image, Image.Image) else nullcontext():
            return min(image.size if isinstance(image, Image.Image) else image.shape[:2])
    except Unreachable:
        raise
    except Exception:  # decoders raise errors of any type
        return None
