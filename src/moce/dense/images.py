"""Whole images: upright and uncropped, as the boxes and masks refer to them."""

from __future__ import annotations

from contextlib import closing, nullcontext

import numpy as np
from PIL import Image

from moce.data.decode import Raster, to_pixels, upright_size


def whole_pixels(image: Raster, channels: int = 3) -> np.ndarray:
    """[channels, h, w] uint8 of an upright image of its own size. Raises ValueError as `to_pixels`."""
    with closing(image) if isinstance(image, Image.Image) else nullcontext():
        return to_pixels(image, upright_size(image), channels)
