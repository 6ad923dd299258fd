"""How many images DATA has, and how large they are, before a size is decided on."""

from __future__ import annotations

from contextlib import closing, nullcontext
from statistics import median

from PIL import Image

from moce.data.readers.factory import open_source
from moce.data.readers.packed import find_packed
from moce.data.readers.sample import Sample
from moce.errors import MoceError, Unreachable

MOST_OPENED = 32  # images, spread over the source


def count_and_side(data: str) -> tuple[int, int]:
    """The number of images, and the median shorter side, in pixels, of some of them.

    Raises MoceError if there are none, or none of these can be opened.
    """
    packed = find_packed(data)
    if packed is not None:
        return packed.shape[0], min(packed.shape[2:])
    samples = open_source(data)
    every = max(1, len(samples) // MOST_OPENED)
    sides = [side for sample in samples[::every] if (side := _side(sample)) is not None]
    if not sides:
        raise MoceError(f"none of {len(samples[::every])} images of {data} can be opened")
    return len(samples), round(median(sides))


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
