"""Whole images and masks: upright and uncropped, as the labels refer to them."""

from __future__ import annotations

from contextlib import closing, nullcontext

import numpy as np
from PIL import Image, ImageOps

from moce.data.decode import Raster, to_pixels, upright_size


def whole_pixels(image: Raster, channels: int = 3) -> np.ndarray:
    """[channels, h, w] uint8 of an upright image of its own size. Raises ValueError as `to_pixels`."""
    with closing(image) if isinstance(image, Image.Image) else nullcontext():
        return to_pixels(image, upright_size(image), channels)


def mask_values(image: Raster) -> np.ndarray:
    """[h, w] int64: the palette's index, or the gray value, of every pixel of the upright mask.

    Raises ValueError for masks in color.
    """
    if isinstance(image, np.ndarray):
        values = image
    else:
        with closing(image):
            values = np.asarray(ImageOps.exif_transpose(image))
    if values.ndim == 3 and (values == values[:, :, :1]).all():
        values = values[:, :, 0]  # gray, saved as color
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise ValueError("a mask in color: save the number of its class as every pixel's value")
    return values.astype(np.int64)
