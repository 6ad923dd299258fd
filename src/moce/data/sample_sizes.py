"""How many images DATA has, and how large they are, before a size is decided on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from statistics import median

import numpy as np
from PIL import Image

from moce.data.divide import learned
from moce.data.readers.factory import open_source
from moce.data.readers.packed import find_packed
from moce.data.readers.sample import Label, Sample
from moce.data.readers.table import labels_and_splits
from moce.errors import MoceError, Unreachable

MOST_OPENED = 32  # images, spread over the source


def count_and_side(data: str, found: Sequence[Sample] | None = None) -> tuple[int, int]:
    """The number of images that a model may learn from, and the median shorter side, in pixels, of some.

    found: the images of DATA, if they are listed already.
    Where it may learn from none, which is refused when they are read: of all images. Raises MoceError
    if there are none, or none of these can be opened.
    """
    packed = find_packed(data)
    if packed is not None:
        count = len(_learning(packed.labels, packed.splits))
        return count, min(packed.shape[2:])
    found = open_source(data) if found is None else found
    rows = _learning(*labels_and_splits(found))
    looked_at = rows[:: max(1, len(rows) // MOST_OPENED)].tolist()
    sides = [side for row in looked_at if (side := _side(found[row])) is not None]
    if not sides:
        raise MoceError(f"none of {len(looked_at)} images of {data} can be opened")
    return len(rows), round(median(sides))


def _learning(labels: Sequence[Label | None], splits: Sequence[str | None]) -> np.ndarray:
    rows, _ = learned(labels, splits)
    return rows if len(rows) else np.arange(len(splits))


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
