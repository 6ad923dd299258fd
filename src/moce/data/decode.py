"""One image file to uint8 pixels, of the size and channels of an encoder.

8-bit values are kept, of 16 bits the upper 8 are kept, floats must be in 0..1. Values are never
stretched to an image's own range, so that a value means the same brightness in all images.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from moce.data.formats import formats
from moce.models.fit import Fit

Raster = Image.Image | np.ndarray  # an array: [h, w] or [h, w, c]
Box = tuple[int, int]

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused here instead
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**28 // 3  # Pillow's limit, to protect memory
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
FLOAT_SLACK = 1e-3  # beyond 0..1, from resampling
TO_8_BITS: dict[str, Callable[[int], int]] = {  # by Pillow's raw mode of the file
    "1": lambda value: value * 255,
    "L;2": lambda value: value * 85,
    "L;4": lambda value: value * 17,
    "RGB;16B": lambda value: value >> 8,
}
MOST_CHANNELS, MOST_VALUES = 1024, 2**30
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
MARGIN = 2.5  # times the pixels needed: with less, reduced decoding shows (docs/log.md)


def open_encoded(source: Path | bytes) -> Raster:
    """Open an image file or its content. Reads TIFFs that Pillow cannot with tifffile, if installed.

    Raises errors of the decoders, or ValueError for images of more than `MOST_PIXELS` pixels.
    """
    file: Path | io.BytesIO = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = Image.open(file, formats=formats())
    except UnidentifiedImageError:
        if _start(source) in TIFF_STARTS:
            return _read_tiff(source)
        raise ValueError("not an image, or of an unsupported format") from None
    _check_area(image.width, image.height)
    _scale_transparency(image)
    return image


def _scale_transparency(image: Image.Image) -> None:
    """Scale a PNG's transparent color to 8 bits, like its pixels: Pillow keeps the file's depth."""
    color = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    if image.format == "PNG" and color is not None and tiles:
        scale = TO_8_BITS.get(str(tiles[0][3]), lambda value: value)
        many = isinstance(color, tuple)
        image.info["transparency"] = tuple(map(scale, color)) if many else scale(color)


def _start(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:4]
    with source.open("rb") as file:
        return file.read(4)


def _check_area(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS:,}")


def _read_tiff(source: Path | bytes) -> np.ndarray:
    """The first page of a TIFF, [h, w] or [h, w, c]: any number of channels, 16 bits, floats."""
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            "Pillow cannot read this TIFF; pip install 'moce[tiff]' may help"
        ) from None
    # Its errors are listed with the skipped images.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        _check_area(page.imagewidth, page.imagelength)
        if page.size > MOST_VALUES or page.samplesperpixel > MOST_CHANNELS:
            raise ValueError(f"a TIFF of shape {list(page.shape)} is too large")
        pixels = page.asarray()
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            raise ValueError("in this TIFF 0 means white; convert it")
        planes = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
    return np.moveaxis(pixels, 0, -1) if planes and pixels.ndim == 3 else pixels


def to_pixels(image: Raster, fit: Box | Fit, channels: int = 3) -> np.ndarray:
    """[channels, h, w] uint8 of an image, upright, transparency on white, resized and cropped by timm.

    fit: how; a size (h, w) means by the shorter side and center-cropped, without a margin. Large
    JPEGs are decoded at a reduced size, see `resized_box`.

    Converts between gray and color. Any other number of channels must be the image's own; 4 are
    those of an image with alpha. Raises ValueError if the channels do not match.
    """
    fit = fit if isinstance(fit, Fit) else Fit(fit)
    if isinstance(image, Image.Image):
        height, width = upright_size(image)
        ratio = min(height / fit.size[0], width / fit.size[1]) * fit.crop_pct
        _reduce(image, ratio / MARGIN, exactly=True)
    planes = _planes(_decoded(image), channels)
    return np.concatenate([_fitted(plane, fit) for plane in planes])


def to_picture(image: Raster) -> Image.Image:
    """An image as moce reads it, at its own size: 8 bits, gray or color, upright, transparency on white.

    Raises ValueError for other numbers of channels than 1 and 3.
    """
    image = _decoded(image)
    if isinstance(image, np.ndarray):
        channels = 3 if image.shape[2] == 3 else 1
    else:
        channels = 1 if image.mode in ("1", "L", "LA") else 3
    planes = _planes(image, channels)
    return planes[0] if len(planes) == 1 else Image.merge("RGB", planes)


def _fitted(image: Image.Image, fit: Fit) -> np.ndarray:
    """[c, h, w]"""
    if fit.is_plain and image.size == fit.size[::-1]:
        return as_channels_first(image)
    return np.asarray(_transform(fit)(image))


@lru_cache
def _transform(fit: Fit) -> Callable[[Image.Image], Any]:
    """timm's own, from an image to a tensor [c, h, w] uint8."""
    from timm.data.transforms_factory import transforms_imagenet_eval

    return transforms_imagenet_eval(
        fit.size,
        crop_pct=fit.crop_pct,
        crop_mode=fit.crop_mode,
        interpolation=fit.interpolation,
        mean=fit.mean,
        normalize=False,
    )


def as_channels_first(image: Image.Image) -> np.ndarray:
    """[c, h, w] of an 8-bit image."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def upright_size(image: Raster) -> Box:
    """Height and width of an image once it is upright; of a file only the header is read."""
    if isinstance(image, np.ndarray):
        return _with_channels(image).shape[:2]
    turned = _orientation(image) in TURNED
    return (image.width, image.height) if turned else (image.height, image.width)


def resized_box(image: Raster, box: Sequence[int], size: Box, channels: int = 3) -> np.ndarray:
    """[channels, h, w] uint8: a box of an image, resized to `size` (h, w), antialiased bicubic.

    box: top, left, height, width in the upright image. JPEGs are decoded at 1/2, 1/4 or 1/8 of their
    size where that leaves `MARGIN` times the pixels needed, which changes values by less than a
    rounding error on average. Raises ValueError if the channels do not match.
    """
    scale = 1
    if isinstance(image, Image.Image):
        scale = _reduce(image, min(box[2] / size[0], box[3] / size[1]) / MARGIN)
    upright = _decoded(image)
    top, left, bottom, end = (
        edge / scale for edge in (box[0], box[1], box[0] + box[2], box[1] + box[3])
    )
    # Cropped first, so that pixels outside of the box do not count.
    first_row, first_column = math.floor(top), math.floor(left)
    cut = _cut(upright, first_row, first_column, math.ceil(bottom), math.ceil(end))
    planes = _planes(cut, channels)
    if scale == 1 and planes[0].mode == "RGB":
        return _resized(planes[0], size)
    inside = (left - first_column, top - first_row, end - first_column, bottom - first_row)
    resized = (plane.resize(size[::-1], Image.Resampling.BICUBIC, inside) for plane in planes)
    return np.concatenate([as_channels_first(plane) for plane in resized])


def _resized(image: Image.Image, size: Box) -> np.ndarray:
    """[3, *size] uint8 by torch, three times as fast as Pillow; on average within 0.3 of its values."""
    import torch  # not needed to list images
    from torch.nn.functional import interpolate

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return interpolate(pixels, size, mode="bicubic", antialias=True)[0].numpy()


def _reduce(image: Image.Image, most: float, *, exactly: bool = False) -> int:
    """Let a JPEG be decoded at 1/2, 1/4 or 1/8 of its size, at least 1/`most` of it; 1: whole.

    exactly: only if the scale divides its sides.
    """
    scale = next((scale for scale in (8, 4, 2) if scale <= most), 1)
    if scale == 1 or image.format not in ("JPEG", "MPO"):
        return 1
    width, height = image.size
    if (exactly or _orientation(image) != 1) and (width % scale or height % scale):
        return 1  # the last pixels, which are not whole, would come first
    image.draft(None, (width // scale, height // scale))
    return round(width / image.width)


def _cut(image: Raster, top: int, left: int, bottom: int, right: int) -> Raster:
    if isinstance(image, np.ndarray):
        return image[top:bottom, left:right]
    if (top, left, bottom, right) == (0, 0, image.height, image.width):
        return image
    return image.crop((left, top, right, bottom))


def _decoded(image: Raster) -> Raster:
    """The image, upright and with 8-bit values."""
    if isinstance(image, np.ndarray):
        return to_bytes(_with_channels(image))
    image = _upright(image)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip to 8 bits, not scale
        return _to_8_bits(image)
    return image


def _planes(image: Raster, channels: int) -> list[Image.Image]:
    """8-bit images that together have the required channels."""
    if isinstance(image, np.ndarray):
        return _array_planes(image, channels)
    if channels in (1, 3):
        mode = "RGB" if channels == 3 else "L"
        image = _on_white(image)
        return [image if image.mode == mode else image.convert(mode)]
    if channels == 4 and image.mode != "RGBX" and image.has_transparency_data:
        image = image.convert("RGBA")
    bands = len(image.getbands())
    if bands != channels or image.mode in ("P", "CMYK", "YCbCr"):
        _mismatch(f"an image of mode {image.mode}", channels)
    return list(image.split())


def _to_8_bits(image: Image.Image) -> Image.Image:
    """An 8-bit gray image, with alpha if a value stands for transparent."""
    values = np.asarray(image)
    gray = Image.fromarray(to_bytes(values))
    if "transparency" not in image.info:
        return gray
    opaque = Image.fromarray(to_bytes(values != image.info["transparency"]))
    return Image.merge("LA", [gray, opaque])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # only the metadata is broken
        return 1


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # raises if the pixels are broken
    if _orientation(image) == 1:
        return image
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # only the metadata is broken
        return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _with_channels(pixels: np.ndarray) -> np.ndarray:
    """[h, w, c] of an array [h, w] or [h, w, c]."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or 0 in pixels.shape or pixels.shape[2] > MOST_CHANNELS:
        raise ValueError(f"an array of shape {list(pixels.shape)} is not an image [h, w, c]")
    return pixels


def _array_planes(pixels: np.ndarray, channels: int) -> list[Image.Image]:
    found = pixels.shape[2]
    if found != channels and {found, channels} != {1, 3}:
        _mismatch(f"an image of {found} channels", channels)
    planes = [Image.fromarray(plane) for plane in np.moveaxis(pixels, 2, 0).copy()]
    if found == channels:
        return planes
    return planes * 3 if channels == 3 else [Image.merge("RGB", planes).convert("L")]


def _mismatch(found: str, channels: int) -> None:
    raise ValueError(f"{found} for an encoder of {channels} channels")


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 of any pixels. Raises ValueError if the scale of their values is unknown."""
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    dtype = pixels.dtype
    if dtype == np.uint8:
        return pixels
    if dtype.kind == "b":
        return pixels.astype(np.uint8) * 255
    if dtype in (np.uint16, np.int16, np.int32):  # Pillow and cameras use all three for 16 bits
        if dtype != np.uint16 and (pixels.min() < 0 or pixels.max() > 65535):
            raise ValueError(f"{dtype} pixels outside 0..65535; convert them to 8 or 16 bits")
        return (pixels >> 8).astype(np.uint8)
    if np.issubdtype(dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -FLOAT_SLACK and high <= 1 + FLOAT_SLACK):  # also where they are NaN
            raise ValueError(f"float pixels from {low:g} to {high:g}; scale them to 0..1")
        return (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    raise ValueError(f"{dtype} pixels; convert them to uint8, uint16 or floats in 0..1")
