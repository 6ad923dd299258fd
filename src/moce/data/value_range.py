"""Before images are decoded: whole numbers of an unlikely scale, and sets of images of one value each.

Whole numbers of more than 8 bits are read as 16 bits. Values up to 255 in such images are a mistake of
whoever saved them, and would come out black. A single dark image shows nothing: the scale belongs to
the whole source, so some of its images are looked at together.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image

from moce.data.decode import Raster
from moce.data.readers.sample import Sample
from moce.errors import MoceError, Unreachable
from moce.runtime.progress import log

MOST_OPENED = 32  # images, spread over the source
EIGHT_BITS, TWELVE_BITS = 255, 4095
SMALL = (64, 64)  # enough of a JPEG to tell if it has one value only


@dataclass(frozen=True)
class _Look:
    """What one image shows. highest: of whole numbers of more than 8 bits, None for others."""

    highest: int | None
    constant: bool


def check_values(samples: Sequence[Sample], where: str) -> None:
    """Look at some images of a source; log what is odd. Images that cannot be read are passed over.

    Raises MoceError, which names `where`, if most images have more than 8 bits and hold values up to
    255 only.
    """
    every = max(1, len(samples) // MOST_OPENED)
    looks: list[_Look] = []
    varied = False
    for sample in samples[::every]:
        look = _look_at(sample, only_wide=varied)
        if look is not None:
            looks.append(look)
            varied = varied or not look.constant
    highest = max((look.highest for look in looks if look.highest is not None), default=None)
    if highest is not None and 0 < highest <= EIGHT_BITS:
        wide, opened = sum(look.highest is not None for look in looks), len(samples[::every])
        which = "images" if 2 * wide >= opened else f"{wide} of {opened} images looked at, those"
        text = (
            f"{where}: {which} of 16 or 32 bits hold values up to {highest} only, so they would come "
            "out black; save them with 8 bits (uint8)"
        )
        if 2 * wide >= opened:
            raise MoceError(text)
        log(text)
    if highest is not None and EIGHT_BITS < highest <= TWELVE_BITS:
        log(
            f"{where}: images of 16 bits hold values up to {highest} of 65535, so they come out dark; "
            "if they have 12 bits, multiply them by 16"
        )
    if looks and not varied:
        log(
            f"{where}: every image looked at ({len(looks)}) comes out in one color: is that intended?"
        )


def _look_at(sample: Sample, only_wide: bool) -> _Look | None:
    """None if the image cannot be read, or has 8 bits and only others are of interest."""
    try:
        image = sample.open()
        with closing(image) if isinstance(image, Image.Image) else nullcontext():
            wide = _is_wide(image)
            if only_wide and not wide:
                return None
            return _look(image, wide)
    except Unreachable:
        raise
    except Exception:  # decoders raise errors of any type; reported where all images are read
        return None


def _is_wide(image: Raster) -> bool:
    if isinstance(image, np.ndarray):
        return image.dtype.kind in "iu" and image.dtype.itemsize > 1
    return image.mode.startswith("I")


def _look(image: Raster, wide: bool) -> _Look:
    if isinstance(image, Image.Image) and not wide:
        image.draft(None, SMALL)
        bands = image.getextrema()
        pairs = bands if isinstance(bands[0], tuple) else (bands,)
        return _Look(None, all(low == high for low, high in pairs))
    values = np.asarray(image)
    seen = values >> 8 if wide else values
    flat = seen.reshape(-1, seen.shape[2] if seen.ndim == 3 else 1)
    return _Look(int(values.max()) if wide else None, bool((flat == flat[0]).all()))
