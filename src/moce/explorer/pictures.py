"""Images as small WebP files for the page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import lru_cache

import numpy as np
from PIL import Image
from torch import Tensor

from moce.data.decode import to_picture, to_pixels
from moce.data.readers.sample import Sample

MOST_KEPT = 4096  # thumbnails in memory, of some KB each
SHARP_BELOW = 64  # pixels: smaller images are enlarged without blur, and saved without loss


class Thumbnails:
    """Thumbnails of the images of a map, made when they are asked for."""

    def __init__(self, samples: Sequence[Sample], channels: int) -> None:
        self._samples, self._channels = samples, channels
        self.get = lru_cache(MOST_KEPT)(self._get)

    def _get(self, row: int, size: int) -> bytes:
        """The image of a row as WebP, at most `size` pixels a side. Raises what decoders raise."""
        return thumbnail(self._samples[row], size, self._channels)


def thumbnail(sample: Sample, size: int, channels: int = 3) -> bytes:
    """An image as WebP, at most `size` pixels a side, whole. Raises what decoders raise.

    channels: that models see; of other numbers than 1 and 3 the first three are shown.
    """
    image = sample.open()
    with closing(image) if isinstance(image, Image.Image) else nullcontext():
        if isinstance(image, Image.Image):
            image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at a smaller size
        if channels in (1, 3):
            picture = to_picture(image)
        else:
            picture = _as_picture(to_pixels(image, (size, size), channels))
        picture.thumbnail((size, size), Image.Resampling.BICUBIC)
        return _webp(picture)


def picture_of(pixels: Tensor) -> bytes:
    """Pixels [c, h, w] uint8 as WebP. Of more than three channels the first three are shown."""
    return _webp(_as_picture(pixels.numpy()))


def _as_picture(planes: np.ndarray) -> Image.Image:
    color = planes[:3] if len(planes) >= 3 else np.repeat(planes[:1], 3, axis=0)
    return Image.fromarray(np.ascontiguousarray(color.transpose(1, 2, 0)))


def _webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    lossless = max(picture.size) < SHARP_BELOW
    picture.convert("RGB").save(buffer, "WEBP", lossless=lossless, quality=85)
    return buffer.getvalue()
