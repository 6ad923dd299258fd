"""Whole images: upright and uncropped, as the boxes and masks refer to them."""

from __future__ import annotations

from contextlib import closing, nullcontext

import numpy as np
from PIL import Image

from moce.data.decode import Raster, to_pixels

ORIENTATION = 0x0112  # EXIF
TURNED = frozenset({5, 6, 7, 8})  # orientations that swap height and width


def upright_size(image: Raster) -> tuple[int, int]:
    """(h, w) of an image after its EXIF orientation is applied; does not decode it."""
    if isinstance(image, np.ndarray):
        return image.shape[0], image.shape[1]
    width, height = image.size
    try:
        turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception:  # only the metadata is broken; decoding ignores it, too
        turned = False
    return (width, height) if turned else (height, width)


def whole_pixels(image: Raster, channels: int = 3) -> np.ndarray:
    """[channels, h, w] uint8 of an upright image of its own size. Raises ValueError as `to_pixels`."""
    with closing(image) if isinstance(image, Image.Image) else nullcontext():
        return to_pixels(image, upright_size(image), channels)
