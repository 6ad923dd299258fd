"""What `moce pack` keeps of an image: its bytes as they are, or a JPEG of a bounded shorter side."""

from __future__ import annotations

import io
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from moce.data.decode import Raster, open_encoded, to_picture
from moce.data.readers.sample import Encoded, Label, Sample, error_line
from moce.errors import Unreachable

DRAFT = 2  # a JPEG is decoded at the smallest scale that has this many times the pixels needed


@dataclass(frozen=True)
class Encoding:
    """shorter_side: the most pixels that it may have, or None; quality: of the JPEGs made for it."""

    shorter_side: int | None = None
    quality: int = 90

    def __str__(self) -> str:
        if self.shorter_side is None:
            return "as encoded; pixels without an encoding as PNG"
        return (
            f"as encoded; where the shorter side has more than {self.shorter_side} pixels, a JPEG "
            f"of that side (bicubic, antialiased) of quality {self.quality}, chroma 4:2:0"
        )


@dataclass(frozen=True)
class Row:
    """One image of a file. content: encoded; path: a file name with its suffix."""

    content: bytes
    path: str
    id: str
    label: Label | None
    split: str | None


def encode(sample: Sample, encoding: Encoding) -> Row | str:
    """The image to keep, or why it cannot be read: every image is decoded once."""
    try:
        content, suffix = _encode(sample, encoding)
    except Unreachable:
        raise
    except Exception as error:  # decoders raise errors of any type
        return error_line(error)
    name = PurePosixPath(sample.id).name
    path = str(PurePosixPath(name).with_suffix(suffix)) if suffix else name
    return Row(content, path, sample.id, sample.label, sample.split)


def _encode(sample: Sample, encoding: Encoding) -> tuple[bytes, str]:
    """Encoded bytes, and the suffix of a new encoding."""
    opened = sample.open
    content = opened.read() if isinstance(opened, Encoded) else None
    image = opened() if content is None else open_encoded(content)
    with closing(image) if isinstance(image, Image.Image) else nullcontext():
        limit = encoding.shorter_side
        if limit is not None and min(_size(image)) > limit:
            return _as_jpeg(image, limit, encoding.quality), ".jpg"
        if content is None:
            return _as_png(to_picture(image)), ".png"
        if isinstance(image, Image.Image):
            if image.format == "JPEG":
                image.draft(None, (1, 1))  # reads all of the file, and computes little
            image.load()
        return content, ""


def _size(image: Raster) -> tuple[int, int]:
    """Width and height."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    return image.size


def _as_jpeg(image: Raster, limit: int, quality: int) -> bytes:
    width, height = _size(image)
    scale = limit / min(width, height)
    size = max(limit, round(width * scale)), max(limit, round(height * scale))
    profile = None
    if isinstance(image, Image.Image):
        profile = image.info.get("icc_profile")
        image.draft(None, (DRAFT * size[0], DRAFT * size[1]))
    picture = to_picture(image)
    if (picture.width < picture.height) != (width < height):  # turned upright
        size = size[::-1]
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    resized.save(file, "JPEG", quality=quality, subsampling="4:2:0", icc_profile=profile)
    return file.getvalue()


def _as_png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
